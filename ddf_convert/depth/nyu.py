"""Reads NYU Depth V2's published file, ``nyu_depth_v2_labeled.mat``: 1449 photos with depth maps, in metres.

MATLAB 7.3 keeps them as HDF5, axes reversed: ``images`` (1449, 3, 640, 480) uint8 and ``depths`` (1449, 640, 480)
float32. h5py reads them, one pair at a time; it is an extra.

Source: Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012. The division into the
first 1000 to train and the last 449 to test is that of Li et al., "Deep Joint Image Filtering", ECCV 2016, and of what
came after.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddf_convert.depth.maps import MOST_PIXELS, Unit
from ddf_convert.errors import UsageError

_TRAINING = 1000
_PUBLISHED = 1449
_MAX_COMPRESSION = 1100  # of deflate


class NYU:
    """The pairs of the file, which stays open."""

    def __init__(self, file: Any, unit: Unit) -> None:
        self._file = file  # datasets close with it
        self._photos, self._depths = file["images"], file["depths"]
        self.unit = unit

    @property
    def names(self) -> Sequence[str]:
        """The numbers of the pairs, from 1 as in MATLAB."""
        return [f"{number:04}" for number in range(1, len(self) + 1)]

    def __len__(self) -> int:
        return len(self._depths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a photo (3, H, W) uint8 and its depth map (1, H, W) float32, whose holes are 0."""
        try:
            photo, depth = np.asarray(self._photos[index]), np.asarray(self._depths[index], np.float32)
        except (OSError, RuntimeError) as error:
            raise UsageError(f"{self._file.filename}: pair {index + 1} cannot be read: {error}") from error
        values = torch.from_numpy(np.ascontiguousarray(depth.T))[None]
        values = torch.where(torch.isfinite(values) & (values > 0), values, 0.0)
        return torch.from_numpy(np.ascontiguousarray(photo.transpose(0, 2, 1))), values


def open_file(path: Path, unit: str | None = None) -> NYU:
    """Opens the file."""
    try:
        import h5py
    except ImportError as error:
        raise UsageError(f"{path}: reading .mat files needs h5py: pip install 'ddf-convert[depth]'") from error
    try:
        file = h5py.File(path, "r")
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such file") from None
    except OSError:
        raise UsageError(
            f"{path}: cannot be read as HDF5: is it nyu_depth_v2_labeled.mat (MATLAB 7.3), and whole?"
        ) from None
    fault = _describe_fault(file)
    if fault is not None:
        file.close()
        raise UsageError(f"{path}: {fault}")
    return NYU(file, Unit(unit or "m"))


def _describe_fault(file: Any) -> str | None:
    """Returns what is wrong with the contents of the file, or None."""
    import h5py

    missing = [name for name in ("images", "depths") if name not in file]
    if missing:
        return f"has no {' and no '.join(missing)}: it is not nyu_depth_v2_labeled.mat"
    if not all(isinstance(file.get(name), h5py.Dataset) for name in ("images", "depths")):
        return "images and depths are not both arrays"
    photos, depths = file["images"].shape, file["depths"].shape
    if len(photos) != 4 or len(depths) != 3 or photos != (depths[0], 3, *depths[1:]):
        return f"images {photos} and depths {depths} do not belong together"
    if file["images"].dtype != np.uint8:
        return f"images are {file['images'].dtype}, and should be uint8"
    if file["depths"].dtype.kind not in "uif":
        return f"depths are {file['depths'].dtype}, and should be numbers"
    if photos[2] * photos[3] > MOST_PIXELS:
        return f"images have {photos[2]} x {photos[3]} pixels, and up to {MOST_PIXELS:,} are read"
    for name in ("images", "depths"):  # data never written take no room, whatever their size
        if file[name].nbytes > _MAX_COMPRESSION * file[name].id.get_storage_size():
            return f"{name} should be {file[name].nbytes:,} bytes, which are not there: it is incomplete"
    return None


def split(count: int) -> tuple[range, range]:
    """Returns the pairs to train with and to test with: 1000 and 449, or the same share of a file of another length."""
    if count < 2:
        raise UsageError(f"{count} pairs are too few to train with some and to test with others")
    training = _TRAINING if count == _PUBLISHED else max(1, count * _TRAINING // _PUBLISHED)
    return range(training), range(training, count)
