"""What tells the images of a run from others, so that it is resumed with those that it began with.

Of files these are names and sizes, and the beginning of the contents: of all files if there are up to 4,096, of as
many, evenly spaced, otherwise. Times of modification are no part of it: a copy of the files is as good. Of data sets
that have no files it is the labels, where they are listed, and a few images.
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
from ddf_convert.training.dataset import UNLABELLED, Images
from ddf_convert.training.sampler import seed_for, seeded

FILE = "data.jsonl.gz"  # in the folder of a run
_SAMPLED = 4096  # files
_HEAD = 2**16  # bytes of each
_PROBED = 16  # images of data sets without files
_NAMED = 3  # in a message
_THREADS, _PART = 16, 256  # file systems on a network answer many questions at a time
_THUMB = (4, 4)
_ROUNDING = 2  # levels of 256, by which decoders differ


class Entry(NamedTuple):
    """An image, or whatever is a part of the data.

    Attributes:
        name: The same wherever the data are.
        size: In bytes, if it is a file.
        content: Where it was looked at: hash of a file's beginning; of what is no file, size and thumbnail.
        label: If it does not follow from the name.
    """

    name: str
    size: int | None = None
    content: str | None = None
    label: int | None = None


def of_files(files: Sequence[str | Path], root: str | Path, labels: Sequence[int | None] | None = None) -> list[Entry]:
    """Entries of files.

    Args:
        files: Their paths.
        root: The folder that the data are in: names are relative to it.
        labels: One for each file, if they do not follow from the names.
    """
    sampled = set(spaced(len(files), _SAMPLED))

    def entry(index: int) -> Entry:
        path, label = files[index], None if labels is None else labels[index]
        name = Path(os.path.relpath(path, root)).as_posix()
        try:
            return Entry(name, os.stat(path).st_size, _head(path) if index in sampled else None, label)
        except OSError:  # whoever reads it will say so
            return Entry(name, label=label)

    def part(start: int) -> list[Entry]:
        return [entry(index) for index in range(start, min(start + _PART, len(files)))]

    with ThreadPoolExecutor(_THREADS) as pool:
        return [each for entries in pool.map(part, range(0, len(files), _PART)) for each in entries]


def of_images(images: Images, part: str) -> list[Entry]:
    """Entries of images: each that is a file or whose label is listed, a few of others.

    Args:
        images: The images.
        part: What they are called where they have no files.
    """
    listed = images.listed()
    if listed is not None and all(file is not None for file, _ in listed):
        files = [str(file) for file, _ in listed]
        root = images.root or os.path.commonpath([os.path.dirname(file) for file in files])
        return of_files(files, root, [label for _, label in listed])
    labels = {} if listed is None else {index: label for index, (_, label) in enumerate(listed)}
    probed = {index: _probe(images, index) for index in spaced(len(images), _PROBED)}
    return [
        Entry(f"{part} image {index}", None, *probed.get(index, (None, labels.get(index))))
        for index in sorted({*labels, *probed})
    ]


def digest(entries: Iterable[Entry]) -> str:
    """The hash of entries in their order, hexadecimal."""
    found = hashlib.sha256()
    for entry in entries:
        found.update(_line(entry))
    return found.hexdigest()


def pack(entries: Iterable[Entry]) -> bytes:
    """Entries as the contents of a file."""
    return gzip.compress(b"".join(map(_line, entries)), compresslevel=1, mtime=0)


def unpack(content: bytes) -> list[Entry]:
    """Entries from the contents of a file.

    Raises:
        ValueError: It holds none.
    """
    try:
        found = [Entry(*json.loads(line)) for line in gzip.decompress(content).splitlines()]
    except (OSError, EOFError, TypeError, zlib.error) as error:
        raise ValueError("not entries of data") from error
    if not found:
        raise ValueError("no entries of data")
    return found


def differences(before: Sequence[Entry], now: Sequence[Entry]) -> str:
    """What was added, removed and exchanged, in words: how many, and the first names. Empty if nothing was."""
    old, new = ({entry.name: entry for entry in entries} for entries in (before, now))
    both = [name for name in new if name in old]
    found = [
        ("added", [name for name in new if name not in old]),
        ("removed", [name for name in old if name not in new]),
        ("exchanged", [name for name in both if _exchanged(old[name], new[name])]),
        ("given another label", [name for name in both if _relabelled(old[name], new[name])]),
    ]
    words = "; ".join(f"{len(names):,} {what} ({first(names)})" for what, names in found if names)
    return words or ("they come in another order" if [*old] != [*new] else "")


def _exchanged(old: Entry, new: Entry) -> bool:
    known = old.content is not None and new.content is not None
    return old.size != new.size or (known and not _looks_like(str(old.content), str(new.content)))


def _relabelled(old: Entry, new: Entry) -> bool:
    return None not in (old.label, new.label) and old.label != new.label


def first(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join([*names[:_NAMED], *(["..."] if len(names) > _NAMED else [])])


def _line(entry: Entry) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def spaced(count: int, at_most: int) -> list[int]:
    """Evenly spaced indices."""
    chosen = min(count, at_most)
    return [index * count // chosen for index in range(chosen)]


def _head(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(_HEAD)).hexdigest()[:16]


def _probe(images: Images, index: int) -> tuple[str | None, int | None]:
    """Content and label of an image that is no file.

    None where a data set that draws at random does not give the same twice, or where there is nothing to be read.
    """
    (content, label), again = _loaded(images, index), _loaded(images, index)
    return content if content == again[0] else None, label if label == again[1] else None


def _loaded(images: Images, index: int) -> tuple[str | None, int | None]:
    try:
        with seeded(seed_for(0, index)):
            image, label = images[index]
    except DDFError:
        return None, None
    thumb = image.resize(_THUMB, PIL.Image.Resampling.BOX).tobytes().hex()
    return f"{image.width}x{image.height}:{thumb}", None if label == UNLABELLED else label


def _looks_like(one: str, other: str) -> bool:
    """Whether two contents are the same, but for what another version of a decoder changes in pixels."""
    if one == other:
        return True
    (size, _, thumb), (other_size, _, other_thumb) = one.partition(":"), other.partition(":")
    if not thumb or size != other_size:
        return False
    pairs = zip(bytes.fromhex(thumb), bytes.fromhex(other_thumb), strict=True)
    return all(abs(mine - theirs) <= _ROUNDING for mine, theirs in pairs)
