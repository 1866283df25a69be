"""Fingerprint of the images of a run, so that it is resumed with the same ones.

Of files it holds names, sizes and the beginning of the contents, or of 4,096 evenly spaced contents if there are more.
Times of modification are no part of it: a copy of the files is as good. Of data sets without files it holds the labels,
where they are listed, and a few images.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import PIL.Image

from ddf_convert.errors import DDFError
from ddf_convert.training.dataset import NO_LABEL, ImageDataset
from ddf_convert.training.sampler import seed_for, seeded

FILE = "data.jsonl.gz"  # in the folder of a run
_MAX_HASHED = 4096  # files
_HASHED_BYTES = 2**16  # at the beginning of each
_MAX_PROBED = 16  # images of data sets without files
_MAX_NAMES = 3  # in a message
_THREADS, _CHUNK = 16, 256  # network file systems answer many requests at a time
_THUMBNAIL_SIZE = (4, 4)
_TOLERANCE = 2  # levels of 256, by which versions of a decoder differ


class Entry(NamedTuple):
    """What is known of one image, or of another part of the data."""

    name: str  # relative to the folder of the data
    size: int | None = None  # of a file, in bytes
    content: str | None = None  # if it was read: hash of a file's beginning; otherwise width, height and thumbnail
    label: int | None = None  # if it does not follow from the name


def of_files(files: Sequence[str | Path], root: str | Path, labels: Sequence[int | None] | None = None) -> list[Entry]:
    """Returns the entries of files, with names relative to ``root`` and labels that do not follow from the names."""
    hashed = set(spaced(len(files), _MAX_HASHED))

    def entry(index: int) -> Entry:
        path, label = files[index], None if labels is None else labels[index]
        name = Path(os.path.relpath(path, root)).as_posix()
        try:
            return Entry(name, os.stat(path).st_size, _hash_of_head(path) if index in hashed else None, label)
        except OSError:  # reported when the image is loaded
            return Entry(name, label=label)

    def chunk(start: int) -> list[Entry]:
        return [entry(index) for index in range(start, min(start + _CHUNK, len(files)))]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [each for entries in pool.map(chunk, range(0, len(files), _CHUNK)) for each in entries]


def of_images(images: ImageDataset, part: str) -> list[Entry]:
    """Returns the entries of all images that are files or whose labels are listed, and of a few others.

    ``part`` begins the names of images that are no files.
    """
    samples = images.samples()
    if samples is not None and all(file is not None for file, _ in samples):
        files = [str(file) for file, _ in samples]
        root = images.root or os.path.commonpath([os.path.dirname(file) for file in files])
        return of_files(files, root, [label for _, label in samples])
    labels = {} if samples is None else {index: label for index, (_, label) in enumerate(samples)}
    probed = {index: _probe(images, index) for index in spaced(len(images), _MAX_PROBED)}
    return [
        Entry(f"{part} image {index}", None, *probed.get(index, (None, labels.get(index))))
        for index in sorted({*labels, *probed})
    ]


def digest(entries: Iterable[Entry]) -> str:
    """Returns the hash of entries in their order, in hexadecimal."""
    return hashlib.sha256(b"".join(map(_line, entries))).hexdigest()


def pack(entries: Iterable[Entry]) -> bytes:
    """Returns entries as the contents of a file."""
    return gzip.compress(b"".join(map(_line, entries)), compresslevel=1, mtime=0)


def unpack(content: bytes) -> list[Entry]:
    """Returns the entries in the contents of a file.

    Raises:
        ValueError: It holds none.
    """
    try:
        entries = [Entry(*json.loads(line)) for line in gzip.decompress(content).splitlines()]
    except (OSError, EOFError, TypeError, zlib.error) as error:
        raise ValueError("not entries of data") from error
    if not entries:
        raise ValueError("no entries of data")
    return entries


def differences(before: Sequence[Entry], now: Sequence[Entry]) -> str:
    """Describes what was added, removed and exchanged, with the first names; empty if nothing was."""
    old, new = ({entry.name: entry for entry in entries} for entries in (before, now))
    both = [name for name in new if name in old]
    changes = [
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("exchanged", [name for name in both if _exchanged(old[name], new[name])]),
        ("given another label", [name for name in both if _relabelled(old[name], new[name])]),
    ]
    words = "; ".join(f"{len(names):,} {what} ({first(names)})" for what, names in changes if names)
    return words or ("they come in another order" if [*old] != [*new] else "")


def _exchanged(old: Entry, new: Entry) -> bool:
    read = old.content is not None and new.content is not None
    return old.size != new.size or (read and not _is_same_image(str(old.content), str(new.content)))


def _relabelled(old: Entry, new: Entry) -> bool:
    return None not in (old.label, new.label) and old.label != new.label


def first(names: Sequence[str]) -> str:
    """Joins the first of some names, with "..." if there are more."""
    return ", ".join([*names[:_MAX_NAMES], *(["..."] if len(names) > _MAX_NAMES else [])])


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def spaced(count: int, at_most: int) -> list[int]:
    """Returns at most ``at_most`` evenly spaced indices below ``count``."""
    chosen = min(count, at_most)
    return [index * count // chosen for index in range(chosen)]


def _hash_of_head(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(_HASHED_BYTES)).hexdigest()[:16]


def _probe(images: ImageDataset, index: int) -> tuple[str | None, int | None]:
    """Loads an image twice and returns its content and label; None for what is random or cannot be read."""
    (content, label), again = _load(images, index), _load(images, index)
    return content if content == again[0] else None, label if label == again[1] else None


def _load(images: ImageDataset, index: int) -> tuple[str | None, int | None]:
    try:
        with seeded(seed_for(0, index)):
            image, label = images[index]
    except DDFError:
        return None, None
    thumbnail = image.resize(_THUMBNAIL_SIZE, PIL.Image.Resampling.BOX).tobytes().hex()
    return f"{image.width}x{image.height}:{thumbnail}", None if label == NO_LABEL else label


def _is_same_image(old: str, new: str) -> bool:
    """Whether two contents are equal, up to the differences between versions of a decoder."""
    if old == new:
        return True
    (old_size, _, old_pixels), (new_size, _, new_pixels) = old.partition(":"), new.partition(":")
    if not old_pixels or old_size != new_size:
        return False
    pairs = zip(bytes.fromhex(old_pixels), bytes.fromhex(new_pixels), strict=True)
    return all(abs(before - after) <= _TOLERANCE for before, after in pairs)
