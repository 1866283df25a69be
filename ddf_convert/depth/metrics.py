"""How far a depth map is from the truth, where there is one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddf_convert.models.depth_holes import is_valid, moments


@dataclass(frozen=True)
class Errors:
    """Of one depth map, in the unit of its numbers, over the pixels where the truth is known.

    Attributes:
        rmse: Root of the mean squared error.
        mae: Mean absolute error.
        pixels: That count.
    """

    rmse: float
    mae: float
    pixels: int


def errors(found: Tensor, truth: Tensor) -> Errors:
    """The errors of a depth map.

    Args:
        found: (..., H, W).
        truth: The same shape; holes are 0, negative, NaN or infinite, and do not count.

    Raises:
        ValueError: The truth has nothing but holes, or the shapes differ.
    """
    if found.shape != truth.shape:
        raise ValueError(f"shapes {tuple(found.shape)} and {tuple(truth.shape)} differ")
    known = is_valid(truth)
    if not known.any():
        raise ValueError("the truth has nothing but holes")
    distance = (found[known].double() - truth[known].double()).abs()
    return Errors(distance.square().mean().sqrt().item(), distance.mean().item(), int(known.sum()))


def mean_rmse(each: list[Errors]) -> float:
    """The mean of the images' RMSE, which is how the benchmark on NYU Depth V2 is given (and not the RMSE of all pixels
    together).

    Source: Su et al., "Pixel-Adaptive Convolutional Neural Networks", CVPR 2019, in their code.
    """
    return sum(errors.rmse for errors in each) / len(each)


def deviations(depth: Tensor) -> Tensor:
    """The standard deviation of each map's measurements, (B, 1, 1, 1), which losses are divided by; above 0."""
    known = is_valid(depth)
    return moments(torch.where(known, depth, torch.zeros_like(depth)), known.to(depth.dtype))[1]
