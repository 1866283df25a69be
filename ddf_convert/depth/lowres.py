"""Makes small depth maps of large ones, and pads sizes that a factor does not divide."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.errors import UsageError
from ddf_convert.models.depth_holes import fill_holes, is_valid

Downsampling = Literal["nearest", "bicubic", "mean"]
DOWNSAMPLINGS: tuple[Downsampling, ...] = get_args(Downsampling)


def downsample(depth: Tensor, factor: int, how: Downsampling = "nearest") -> Tensor:
    """Makes the small depth map that will be upsampled.

    "nearest" takes the pixel in row and column ``(factor - 1) // 2`` of each cell of ``factor`` x ``factor``, as in the
    code of Su et al., "Pixel-Adaptive Convolutional Neural Networks", CVPR 2019 (mode "center"), whose protocol on NYU
    Depth V2 the DDF paper compares by. "bicubic" is antialiased, as later papers do it; holes are filled for it first,
    and a pixel is a hole where its cell holds no measurement. "mean" is the mean of a cell's measurements.

    Args:
        depth: (B, 1, H, W); holes are 0, negative, NaN or infinite. H and W are multiples of the factor.
        factor: s.
        how: The method.

    Returns:
        (B, 1, H/s, W/s); holes are 0.
    """
    known = is_valid(depth)
    values = torch.where(known, depth, torch.zeros_like(depth))
    if how == "nearest":
        center = (factor - 1) // 2
        return values[..., center::factor, center::factor].contiguous()
    shares = F.avg_pool2d(known.to(depth.dtype), factor)
    if how == "mean":
        return F.avg_pool2d(values, factor) / torch.where(shares > 0, shares, torch.ones_like(shares))
    filled, _ = fill_holes(values)
    size = [length // factor for length in depth.shape[-2:]]
    small = F.interpolate(filled, size=size, mode="bicubic", antialias=True)
    lowest = torch.finfo(depth.dtype).eps * filled.amax((-2, -1), keepdim=True)  # bicubic can fall below 0
    return torch.where(shares > 0, torch.maximum(small, lowest), torch.zeros_like(small))


def cut_to_factor(image: Tensor, factor: int) -> Tensor:
    """Crops rows and columns that are no whole cell: (..., H, W) -> (..., s*(H//s), s*(W//s))."""
    height, width = (length // factor * factor for length in image.shape[-2:])
    return image[..., :height, :width]


def fit(photo: Tensor, depth: Tensor, factor: int) -> tuple[Tensor, Tensor, str | None]:
    """Pads a photo and a small depth map so that the one is ``factor`` times as large as the other.

    The photo gets its last row and column again, the depth map holes; both at the bottom and the right. Also returns a
    note on the padding, or None.

    Args:
        photo: (3, H, W).
        depth: (1, h, w), where h and w are H and W divided by the factor, rounded up or down.
        factor: s.
    """
    full, small = photo.shape[-2:], depth.shape[-2:]
    wanted = [-(-length // factor) for length in full]
    if any(not (length // factor <= have <= want) for length, have, want in zip(full, small, wanted, strict=True)):
        expected = f"{_size(wanted)} (width x height)"
        guess = _factor(full, small)
        hint = f"; its size is that of a factor of {guess}" if guess else "; photo and depth must show the same view"
        raise UsageError(
            f"a depth map of {_size(small)} does not fit a photo of {_size(full)}: at a factor of {factor} it would be"
            f" {expected}{hint}"
        )
    padded = [want * factor - length for want, length in zip(wanted, full, strict=True)]
    holes = [want - have for want, have in zip(wanted, small, strict=True)]
    if not any(padded) and not any(holes):
        return photo, depth, None
    photo = F.pad(photo[None].float(), (0, padded[1], 0, padded[0]), mode="replicate")[0].to(photo.dtype)
    depth = F.pad(depth, (0, holes[1], 0, holes[0]))
    words = f"{factor} does not divide {_size(full)}: padded at the right and the bottom, and cut off again"
    return photo, depth, words


def _factor(full: torch.Size, small: torch.Size) -> int | None:
    """Returns the factor between two sizes, if there is one."""
    factors = {round(length / have) for length, have in zip(full, small, strict=True)}
    factor = factors.pop()
    matches = not factors and factor > 1
    matches = matches and all(-(-length // factor) == have for length, have in zip(full, small, strict=True))
    return factor if matches else None


def _size(shape: torch.Size | list[int]) -> str:
    return f"{shape[1]}x{shape[0]}"
