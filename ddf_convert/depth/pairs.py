"""Photos with their depth maps: a folder of files, or NYU Depth V2 as it is published.

FOLDER/rgb/NAME.png (or .jpg, .jpeg) and FOLDER/depth/NAME.png (16 bits), NAME.npy or NAME.pfm are a pair, of one size.
A folder may be divided: FOLDER/train/rgb, FOLDER/train/depth, FOLDER/validation/rgb and so on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ddf_convert.depth import nyu
from ddf_convert.depth.maps import DEPTHS, PHOTOS, Unit, read_depth, read_photo, unit_of
from ddf_convert.errors import UsageError
from ddf_convert.training import fingerprint
from ddf_convert.training.fingerprint import Entry
from ddf_convert.utils.images import exif_orientation_note

_VALIDATION = ("validation", "val", "test")
_PROBED = 8
_EVERY = 10  # of an undivided folder's pairs one is for validation


class Pairs(Protocol):
    """Photos and depth maps of the same size."""

    @property
    def unit(self) -> Unit:
        """Unit of the depth maps' numbers."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the pairs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a photo (3, H, W) uint8 and its depth map (1, H, W) float32, whose holes are 0."""


@dataclass(frozen=True)
class FilePairs:
    """Pairs of files."""

    files: tuple[tuple[Path, Path], ...]
    unit: Unit
    allow_8bit: bool = False

    @property
    def names(self) -> list[str]:
        """The photos' names."""
        return [photo.name for photo, _ in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a photo (3, H, W) uint8 and its depth map (1, H, W) float32, whose holes are 0."""
        photo_file, depth_file = self.files[index]
        photo, depth = read_photo(photo_file), read_depth(depth_file, self.allow_8bit)
        if photo.shape[-2:] != depth.shape[-2:]:
            sizes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in (photo, depth)]
            raise UsageError(
                f"{photo_file} is {sizes[0]} and {depth_file} is {sizes[1]}: a pair to learn from shows the same view"
                f" at the same size; small depth maps are made in training{exif_orientation_note(photo_file)}"
            )
        return photo, depth


@dataclass(frozen=True)
class PairSubset:
    """Some of the pairs of a collection, by their indices."""

    pairs: Pairs
    indices: Sequence[int]

    @property
    def unit(self) -> Unit:
        """Unit of the depth maps' numbers."""
        return self.pairs.unit

    @property
    def names(self) -> list[str]:
        """Names of the pairs."""
        return [self.pairs.names[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a photo (3, H, W) uint8 and its depth map (1, H, W) float32, whose holes are 0."""
        return self.pairs[self.indices[index]]


def open_pairs(path: Path, unit: str | None = None, allow_8bit: bool = False) -> tuple[Pairs, Pairs | None]:
    """Opens pairs to train with and to validate with.

    Args:
        path: A folder, divided or not, or NYU Depth V2's file (``.mat``).
        unit: Unit of the depth maps' numbers; None is millimetres in PNG, metres in NPY, PFM and NYU's file.
        allow_8bit: Take depth maps in PNG of 8 bits.

    Returns:
        Both. Of NYU's file the first 1000 and the last 449; of a folder that is not divided, every tenth pair is for
        validation; None if it has a single pair.
    """
    if path.suffix.lower() == ".mat":
        pairs: Pairs = nyu.open_file(path, unit)
        training, test = nyu.split(len(pairs))
        return PairSubset(pairs, training), PairSubset(pairs, test)
    if not path.is_dir():
        raise UsageError(f"{path}: {'is no folder and no .mat file' if path.exists() else 'there is nothing there'}")
    if (path / "train").is_dir():
        held_out = next((path / name for name in _VALIDATION if (path / name).is_dir()), None)
        validation = None if held_out is None else folder(held_out, unit, allow_8bit)
        return folder(path / "train", unit, allow_8bit), validation
    pairs = folder(path, unit, allow_8bit)
    if len(pairs) == 1:
        return pairs, None
    every = min(_EVERY, len(pairs))
    held = range(every - 1, len(pairs), every)
    return PairSubset(pairs, [index for index in range(len(pairs)) if index not in held]), PairSubset(pairs, held)


def folder(path: Path, unit: str | None = None, allow_8bit: bool = False) -> FilePairs:
    """Opens the pairs of a folder with ``rgb`` and ``depth`` in it, matched by name."""
    photos, depths = (_by_name(path / part, suffixes) for part, suffixes in (("rgb", PHOTOS), ("depth", DEPTHS)))
    for have, lack, part in ((photos, depths, "depth"), (depths, photos, "rgb")):
        missing = sorted(have.keys() - lack.keys())
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise UsageError(f"{have[missing[0]]} has no partner in {path / part}{others}: pairs have the same name")
    files = tuple((photos[name], depths[name]) for name in sorted(photos))
    units = {unit_of(depth, unit).name: depth for _, depth in files}
    if len(units) > 1:
        first, second = sorted(units.items())[:2]
        raise UsageError(
            f"{first[1]} would be in {first[0]} and {second[1]} in {second[0]}: say with --unit what all of them are in"
        )
    return FilePairs(files, unit_of(files[0][1], unit), allow_8bit)


def entries(pairs: Pairs, part: str) -> list[Entry]:
    """Returns the fingerprint of pairs: of files their names, sizes and contents, else a few pairs named ``part``."""
    chosen = list(range(len(pairs)))
    while isinstance(pairs, PairSubset):
        chosen = [pairs.indices[index] for index in chosen]
        pairs = pairs.pairs
    if isinstance(pairs, FilePairs):
        files = [file for index in chosen for file in pairs.files[index]]
        return fingerprint.of_files(files, pairs.files[0][0].parent.parent)
    probed = [chosen[index] for index in fingerprint.spaced(len(chosen), _PROBED)]
    return [Entry(f"{part} pair {pairs.names[index]}", content=_hash(pairs[index])) for index in probed]


def _hash(pair: tuple[Tensor, Tensor]) -> str:
    found = hashlib.sha256()
    for image in pair:
        found.update(image.contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def each(pairs: Pairs) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, photo and depth map of all pairs."""
    for index, name in enumerate(pairs.names):
        yield name, *pairs[index]


def _by_name(path: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    if not path.is_dir():
        raise UsageError(f"{path} is missing: photos are in rgb/, depth maps of the same names in depth/")
    found: dict[str, Path] = {}
    for file in sorted(path.iterdir()):
        if file.suffix.lower() not in suffixes or file.name.startswith("."):
            continue
        if file.stem in found:
            raise UsageError(f"{file} and {found[file.stem].name} have the same name: which of the two is meant?")
        found[file.stem] = file
    if not found:
        raise UsageError(f"{path} has no files that end in {', '.join(suffixes)}")
    return found
