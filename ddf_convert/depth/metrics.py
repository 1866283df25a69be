"""Errors of depth maps, over the pixels where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddf_convert.models.depth_holes import is_valid, moments


@dataclass(frozen=True)
class Errors:
    """The errors of one depth map, in the unit of its numbers.

    Attributes:
        rmse: Root mean squared error.
        mae: Mean absolute error.
        pixels: Number of pixels where the truth is known.
    """

    rmse: float
    mae: float
    pixels: int


def errors(found: Tensor, truth: Tensor) -> Errors:
    """Measures the errors of a depth map.

    Args:
        found: (..., H, W).
        truth: The same shape; holes are 0, negative, NaN or infinite, and do not count.
    """
    if found.shape != truth.shape:
        raise ValueError(f"shapes {tuple(found.shape)} and {tuple(truth.shape)} differ")
    known = is_valid(truth)
    if not known.any():
        raise ValueError("the truth has nothing but holes")
    distance = (found[known].double() - truth[known].double()).abs()
    return Errors(distance.square().mean().sqrt().item(), distance.mean().item(), int(known.sum()))


def mean_rmse(each: list[Errors]) -> float:
    """Returns the mean of the images' RMSE, as the benchmark on NYU Depth V2 does, and not the RMSE of all pixels.

    Source: Su et al., "Pixel-Adaptive Convolutional Neural Networks", CVPR 2019, in their code.
    """
    return sum(errors.rmse for errors in each) / len(each)


def deviations(depth: Tensor) -> Tensor:
    """Returns the standard deviation of each map's measurements, (B, 1, 1, 1) and above 0: losses are divided by it."""
    known = is_valid(depth)
    return moments(torch.where(known, depth, torch.zeros_like(depth)), known.to(depth.dtype))[1]
