"""A small scene with depth, and networks small enough to train in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from ddf_convert.depth import pfm
from ddf_convert.errors import UsageError

ARGUMENTS = {"width": 4, "guide_width": 4, "head_width": 4, "blocks": 0}
_RANDOM = np.random.default_rng(0)


def scene(height: int = 32, width: int = 40, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """A square in front of a wall: photo (H, W, 3), and depth (H, W) in millimetres with a hole."""
    random = np.random.default_rng(seed)
    depth = np.full((height, width), 3000, np.uint16)
    top, left = random.integers(4, height // 2), random.integers(4, width // 2)
    depth[top : top + 14, left : left + 14] = 1000
    photo = (np.stack([depth / 20] * 3, -1) + random.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8)
    depth[:2, :2] = 0
    return photo, depth


def make_pairs(folder: Path) -> Path:
    """Three pairs as files, of which the last one is for validation."""
    for part in ("rgb", "depth"):
        (folder / part).mkdir(parents=True)
    for number in range(3):
        photo, depth = scene(seed=number)
        Image.fromarray(photo).save(folder / "rgb" / f"{number}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{number}.png")
    return folder


def photo(height: int = 8, width: int = 12) -> NDArray[np.uint8]:
    """Random pixels."""
    return _RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_map(file: Path, values: NDArray[Any]) -> Path:
    """Writes a photo or a depth map, as the suffix and the dtype say."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, values)
    elif file.suffix == ".pfm":
        file.write_bytes(pfm.encode(values.astype(np.float32)))
    else:
        Image.fromarray(values).save(file)
    return file


def pair(folder: Path, name: str, suffix: str = ".png", size: tuple[int, int] = (8, 12)) -> Path:
    """Writes a random photo and depth map of one name; returns the depth map's file."""
    write_map(folder / "rgb" / f"{name}.png", photo(*size))
    depth = _RANDOM.integers(500, 5000, size, dtype=np.uint16)
    return write_map(folder / "depth" / f"{name}{suffix}", depth if suffix == ".png" else depth / 1000)


def with_orientation(file: Path, values: NDArray[np.uint8], orientation: int) -> None:
    """Writes a photo as a camera stores it: its pixels as they lie on the sensor, and how it was held."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(values).save(file, exif=exif)


def error_of(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    """The UsageError of a call, which is one line."""
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
