"""The shape of spatial filters in three numbers for every pixel: principal components, which colors can show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddf_convert.visualize.capture import LayerFilters

COUNT = 3


@dataclass(frozen=True)
class Components:
    """How the filters of one head of one image differ from their mean.

    Attributes:
        scores: (3, Ho, Wo): how much of each component is in the filter of each pixel.
        filters: (3, K, K): the components, each of norm 1, its greatest tap positive.
        shares: Of the variance over pixels, from the greatest on; they add up to 1 at most.
    """

    scores: Tensor
    filters: Tensor
    shares: tuple[float, ...]

    @property
    def changes(self) -> bool:
        """Whether there is any difference to show."""
        return sum(self.shares) > 0

    def colors(self) -> Tensor:
        """(Ho, Wo, 3), from 0 to 1: the components as red, green and blue.

        Gray is the mean filter. Each color is as strong as the fourth root of its component's share of the variance,
        so that weak components are seen and do not look strong.
        """
        deviation = self.scores.flatten(1).std(1, correction=0).clamp(min=1e-30).view(-1, 1, 1)
        weight = (torch.tensor(self.shares, dtype=self.scores.dtype) / max(self.shares[0], 1e-30)) ** 0.25
        return (0.5 + 0.22 * weight.view(-1, 1, 1) * self.scores / deviation).clamp(0, 1).movedim(0, -1)


def components(layer: LayerFilters, image: int = 0, head: int = 0) -> Components:
    """The principal components of a layer's spatial filters over the pixels of an image.

    Each branch of a DDF-Up layer has a mean of its own, which is taken away: what is the same in every cell shows no
    checkerboard.

    Args:
        layer: From :func:`~ddf_convert.visualize.filters`.
        image: Which of the batch.
        head: Which of the layer's.
    """
    size, step = layer.kernel_size, layer.scale_factor
    taps = layer.by_branch()[image, :, head].double()  # (N, T, P)
    centered = taps - taps.mean(-1, keepdim=True)
    scale = float(taps.square().mean()) ** 0.5
    if float(centered.square().mean()) ** 0.5 <= 1e-6 * scale:  # rounding
        centered = torch.zeros_like(centered)
    samples = centered.transpose(1, 2).flatten(0, 1)  # (N * P, T)
    values, vectors = torch.linalg.eigh(samples.T @ samples)
    values, vectors = values.flip(0).clamp(min=0)[:COUNT], vectors.flip(1)[:, :COUNT]
    greatest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * greatest.sign()  # which sign an eigenvector has is chance
    total = float(samples.square().sum())
    height, width = (length // step for length in layer.size)
    scores = torch.einsum("ntp,tc->ncp", centered, vectors).unflatten(-1, (height, width))
    return Components(
        scores=torch.pixel_shuffle(scores.transpose(0, 1).flatten(0, 1), step),
        filters=vectors.T.unflatten(1, (size, size)),
        shares=tuple(float(value) / total if total else 0.0 for value in values),
    )
