"""Whatever an image comes as, as a PIL image of mode RGB."""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

_TO_BYTE = 257  # 65535 / 255


def as_rgb(image: Any) -> Image.Image:
    """Decodes an image and brings it to 8 bits and three colours.

    Greys become equal colours, 16 bits are scaled to 8, what is transparent is laid over white.

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
    image.load()  # decodes; here, so that its errors are those of the file
    picture: Image.Image = _from_deep(image) if image.mode == "F" or image.mode.startswith("I") else image
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A photo as people see it: turned as its EXIF orientation says. EXIF that cannot be read turns nothing.

    Images to train with are not turned, for timm does not turn them either.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageOps.exif_transpose(image)
    except Exception:  # whatever stands in a damaged block of EXIF
        return image


def sideways(file: str | os.PathLike[str]) -> str:
    """What errors about the size of a photo add if :func:`upright` swaps its width and height; else nothing."""
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # as above
        return ""
    return "; the photo is turned as its EXIF orientation says, which swaps width and height" if turned else ""


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


def _from_deep(image: Image.Image) -> Image.Image:
    """Greys of 16 bits, whose convert() would cut off what is above 255; floats, from 0 to 1 or to 255."""
    values = np.asarray(image).astype(np.float64)
    scale = 1 / _TO_BYTE if image.mode != "F" else 255 if values.max() <= 1 else 1
    return Image.fromarray(np.round(np.nan_to_num(values * scale).clip(0, 255)).astype(np.uint8))
