"""Reads and writes photos (PNG, JPEG) and depth maps (16-bit PNG, NPY, PFM).

Numbers are used as they are in the file; the unit only decides how they are shown and written.
"""

from __future__ import annotations

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddf_convert.depth import pfm
from ddf_convert.errors import UsageError
from ddf_convert.utils.images import open_image

PHOTOS = (".png", ".jpg", ".jpeg")
DEPTHS = (".png", ".npy", ".pfm")
# Centimetres per unit; other units, such as the pixels of a disparity, are shown as they are.
CENTIMETRES = {"mm": 0.1, "cm": 1.0, "m": 100.0}
_DEFAULT_UNITS = {".png": "mm"}  # by suffix
_MOST = 65535
MOST_PIXELS = 2**27  # of an image; PIL warns from two thirds of it on
_LARGEST_NUMBER = 16  # bytes of one, and room for a header
# What is only decoded: of the formats that PIL knows one is a program, which it has Ghostscript run.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "TIFF", "GIF")


@dataclass(frozen=True)
class Unit:
    """The unit of a depth map's numbers."""

    name: str

    @property
    def shown(self) -> str:
        """The unit that errors are shown in: centimetres for lengths."""
        return "cm" if self.name in CENTIMETRES else self.name

    def show(self, value: float) -> float:
        """Converts a number to the unit that errors are shown in."""
        return value * CENTIMETRES.get(self.name, 1.0)


def unit_of(file: Path, name: str | None) -> Unit:
    """Returns the unit of a depth map: the user's, else millimetres for PNG and metres for other files."""
    return Unit(name or _DEFAULT_UNITS.get(file.suffix.lower(), "m"))


def read_photo(file: Path) -> Tensor:
    """Reads a photo as (3, H, W) uint8, turned as its EXIF orientation says.

    Gray photos get three equal channels; transparency is left out.
    """
    image = open_image(file, "photo", _FORMATS, MOST_PIXELS, exif_orientation=True)
    pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_depth(file: Path, allow_8bit: bool = False) -> Tensor:
    """Reads a depth map as (1, H, W) float32; holes (0, negative, NaN or infinite) become 0."""
    kind = file.suffix.lower()
    if kind == ".png":
        values = _read_png(file, allow_8bit)
    elif kind in (".npy", ".pfm"):
        values = _read_numbers(file)
    else:
        raise UsageError(f"{file}: depth is read from {', '.join(DEPTHS)}")
    depth = torch.from_numpy(values.astype(np.float32))[None]
    depth = torch.where(torch.isfinite(depth) & (depth > 0), depth, 0.0)
    if not depth.any():
        raise UsageError(f"{file}: every pixel is a hole (0, negative, NaN or infinite): there is nothing to upsample")
    return depth


def encode_depth(depth: Tensor, file: Path, unit: Unit, whole: bool) -> tuple[bytes, Unit]:
    """Encodes a depth map as the content of a file; PNG holds whole numbers, so metres become millimetres there.

    Args:
        depth: (1, H, W).
        file: Its suffix gives the format.
        unit: Unit of the numbers.
        whole: Whether the input had whole numbers, so that the output may be rounded to them.

    Returns:
        The content, and its unit.
    """
    values = depth[0].double().cpu().numpy()
    kind = file.suffix.lower()
    if kind == ".pfm":
        return pfm.encode(values.astype(np.float32)), unit
    if kind == ".npy":
        content = io.BytesIO()
        np.save(content, values.astype(np.float32), allow_pickle=False)
        return content.getvalue(), unit
    if kind != ".png":
        raise UsageError(f"{file}: depth is written as {', '.join(DEPTHS)}")
    if unit.name in ("m", "cm"):
        values, unit = values * (10 * CENTIMETRES[unit.name]), Unit("mm")
    elif not whole:
        raise UsageError(f"{file}: PNG holds whole numbers, and the input's are not; give {file.stem}.npy or .pfm")
    if values.max() > _MOST:
        raise UsageError(
            f"{file}: PNG holds numbers up to {_MOST}, and the depth reaches {values.max():.6g} {unit.name};"
            f" give {file.stem}.npy or .pfm"
        )
    image = Image.fromarray(np.clip(np.rint(values), 0, _MOST).astype(np.uint16))
    written = io.BytesIO()
    image.save(written, format="PNG")
    return written.getvalue(), unit


def _read_png(file: Path, allow_8bit: bool) -> NDArray[np.generic]:
    image = open_image(file, "depth map", _FORMATS, MOST_PIXELS)
    if image.mode in ("I;16", "I;16B", "I"):
        return np.array(image.convert("I") if image.mode == "I;16B" else image)
    if image.mode not in ("1", "L", "P"):
        raise UsageError(f"{file}: is a picture in color ({image.mode}); a depth map has one channel of 16 bits")
    if not allow_8bit or image.mode != "L":
        raise UsageError(
            f"{file}: has 8 bits, which hold 256 depths: save the depth with 16 bits, or as .npy or .pfm;"
            " --allow-8bit takes it as it is"
        )
    return np.array(image)


def _read_numbers(file: Path) -> NDArray[np.generic]:
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > MOST_PIXELS * _LARGEST_NUMBER:
                raise ValueError(f"it has {size:,} bytes, and a depth map has up to {MOST_PIXELS:,} pixels")
            if file.suffix.lower() == ".pfm":
                return pfm.decode(opened.read())
            values = _read_npy(opened, size)
    except OSError as error:
        raise UsageError(f"{file}: cannot be read: {error.strerror}") from error
    except Exception as error:  # a header is Python's text, and may hold whatever can be written so
        raise UsageError(f"{file}: cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values.squeeze(0 if values.shape[0] == 1 else -1)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "uif":
        raise UsageError(
            f"{file}: holds {values.dtype} of shape {values.shape}; a depth map is numbers of shape (H, W)"
        )
    return values


def _read_npy(opened: IO[bytes], size: int) -> NDArray[np.generic]:
    """Reads the array of an NPY file, after checking that the file holds as many numbers as its header claims."""
    version = np.lib.format.read_magic(opened)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:  # later ones are for names of fields
        raise ValueError(f"version {'.'.join(map(str, version))} of the format is not for plain numbers")
    shape, _, dtype = header(opened)
    claimed, there = math.prod(shape) * dtype.itemsize, size - opened.tell()
    if not 0 <= claimed <= there:
        raise ValueError(f"it should hold {dtype} of shape {shape}, and there are {there:,} bytes: it is incomplete")
    opened.seek(0)
    values: NDArray[np.generic] = np.lib.format.read_array(opened, allow_pickle=False)
    return values
