"""Holes of depth maps: where they are, how they are filled, and the moments of the measurements around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# As a fraction of the mean depth. With less, noise on a flat wall would be amplified, and so would an edge that the
# small map has missed.
_LEAST_DEVIATION = 0.01


def is_valid(depth: Tensor) -> Tensor:
    """Returns where a depth map has a measurement, finite and above 0: boolean, of the same shape."""
    return torch.isfinite(depth) & (depth > 0)


def fill_holes(depth: Tensor) -> tuple[Tensor, Tensor]:
    """Fills each hole of depth maps with the mean of the smallest surroundings that have a measurement.

    Args:
        depth: (B, 1, h, w), float32 or float64; holes are 0, negative, NaN or infinite.

    Returns:
        The filled map, and 1 where there was a measurement, else 0; both of the input's shape and dtype. A map that
        is all holes becomes 0.
    """
    valid = is_valid(depth)
    known = valid.to(depth.dtype)
    values = torch.where(valid, depth, torch.zeros_like(depth))
    # Sums over cells of 2 x 2, 4 x 4 and so on up to the whole map; then back, each hole from the cell around it.
    sums, weights = [values], [known]
    while max(sums[-1].shape[-2:]) > 1:
        sums.append(F.avg_pool2d(sums[-1], 2, ceil_mode=True))
        weights.append(F.avg_pool2d(weights[-1], 2, ceil_mode=True))
    filled = _safe_divide(sums[-1], weights[-1])
    for total, weight in zip(sums[-2::-1], weights[-2::-1], strict=True):
        around = F.interpolate(filled, size=[2 * size for size in filled.shape[-2:]], mode="bilinear")
        around = around[..., : total.shape[-2], : total.shape[-1]]
        filled = torch.where(weight > 0, _safe_divide(total, weight), around)
    return filled, known


def moments(filled: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of each map's measurements, both (B, 1, 1, 1).

    Args:
        filled: (B, 1, h, w).
        valid: (B, 1, h, w), 1 where there is a measurement, else 0.

    Returns:
        The mean, and the deviation, which is at least a hundredth of the mean, and above 0.
    """
    count = valid.sum((-2, -1), keepdim=True).clamp_min(1)
    mean = (filled * valid).sum((-2, -1), keepdim=True) / count
    variance = ((filled - mean).square() * valid).sum((-2, -1), keepdim=True) / count
    least = (_LEAST_DEVIATION * mean.abs()).clamp_min(torch.finfo(filled.dtype).tiny ** 0.5)
    return mean, torch.maximum(variance.sqrt(), least)


def _safe_divide(sums: Tensor, weights: Tensor) -> Tensor:
    return sums / torch.where(weights > 0, weights, torch.ones_like(weights))
