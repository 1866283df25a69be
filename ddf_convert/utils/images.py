"""Image files, arrays and tensors as PIL images."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ddf_convert.errors import UsageError, first_line

_16_TO_8_BITS = 1 / 257  # 255 / 65535


def open_image(
    file: Path,
    what: str = "photo",
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    exif_orientation: bool = False,
) -> Image.Image:
    """Decodes an image file.

    Args:
        file: The file.
        what: The image's name in errors.
        formats: PIL's names of the formats to accept; None accepts all.
        max_pixels: The largest image to decode.
        exif_orientation: Whether to turn the image as its EXIF orientation says.

    Raises:
        UsageError: It is missing, damaged or no image.
    """
    if file.is_dir():
        raise UsageError(f"{file}: is a folder; give an image")
    try:
        return decode(file, formats, max_pixels, exif_orientation)
    except UnidentifiedImageError:
        raise UsageError(f"{file}: is not an image") from None
    except Exception as error:  # a damaged file can fail anywhere in PIL
        reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
        raise UsageError(f"{file}: the {what} cannot be read: {reason}") from error


def decode(
    file: str | os.PathLike[str] | IO[bytes],
    formats: tuple[str, ...] | None = None,
    max_pixels: int | None = None,
    exif_orientation: bool = False,
) -> Image.Image:
    """Decodes an image like :func:`open_image`, and raises what PIL raises for files that are no images."""
    with Image.open(file, formats=formats) as image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width} x {image.height} pixels, and up to {max_pixels:,} are read")
        image.load()
        return _with_exif_orientation(image) if exif_orientation else image


def _with_exif_orientation(image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageOps.exif_transpose(image)
    except Exception:  # a damaged block of EXIF
        return image


def exif_orientation_note(file: str | os.PathLike[str]) -> str:
    """What an error about the size of a photo appends if its EXIF orientation swaps width and height; else nothing."""
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            swapped = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # a damaged block of EXIF
        return ""
    return "; the photo is turned as its EXIF orientation says, which swaps width and height" if swapped else ""


def to_rgb(image: Any) -> Image.Image:
    """Converts an image to RGB with 8 bits.

    Gray becomes three equal channels, 16 bits are scaled to 8, and transparent pixels are blended over white.

    Args:
        image: A PIL image of any mode; an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor of
            shape (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are of dtype uint8, or of a floating
            dtype with values from 0 to 1.

    Raises:
        ValueError: It is none of these.
        OSError: Its file is damaged.
    """
    if isinstance(image, torch.Tensor):
        if image.dim() not in (2, 3):
            raise ValueError(f"a tensor of shape {tuple(image.shape)}, not (C, H, W)")
        image = (image if image.dim() == 2 else image.movedim(0, -1)).detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is not an image: a PIL image, an array or a tensor is")
    image.load()
    picture: Image.Image = _to_8_bits(image) if image.mode == "F" or image.mode.startswith("I") else image
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise ValueError(f"an array of shape {array.shape}, not (H, W), (H, W, 3) or (H, W, 4)")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # so that NaN is refused too
            raise ValueError(f"values from {low:.3g} to {high:.3g}; floating-point images go from 0 to 1")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"dtype {array.dtype}, not uint8 or floating")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Grays of 16 or 32 bits, whose convert() would cut off values above 255, or floats, up to 1 or to 255."""
    values = np.asarray(image).astype(np.float64)
    scale = _16_TO_8_BITS if image.mode != "F" else 255 if values.max() <= 1 else 1
    return Image.fromarray(np.round(np.nan_to_num(values * scale).clip(0, 255)).astype(np.uint8))
