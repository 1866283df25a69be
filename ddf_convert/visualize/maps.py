"""One number for every pixel of a layer: how strong its filter is, and how far it is from the mean filter.

Both look at the filters that are applied, ``spatial * channel`` or ``spatial + channel``, over all channels of a head.
(The norm of the spatial filter alone would say nothing: FilterNorm makes it the same for every pixel, but where it
learns a shift.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddf_convert.visualize.capture import LayerFilters


def strength(layer: LayerFilters, image: int = 0, head: int = 0) -> Tensor:
    """(Ho, Wo): norm of a pixel's filter, in root mean square over the channels of the head; 1 is its mean.

    Args:
        layer: From :func:`~ddf_convert.visualize.filters`.
        image: Which of the batch.
        head: Which of the layer's.
    """
    found = _squares(layer, image, head, centered=False).sqrt()
    return _as_map(layer, found / found.mean().clamp(min=1e-30))


def change(layer: LayerFilters, image: int = 0, head: int = 0) -> Tensor:
    """(Ho, Wo): norm of the difference between a pixel's filter and the image's mean filter, over that of a filter.

    Both norms are root mean squares: over the channels of the head, the second one over the pixels too. The root mean
    square of the map itself is, for a layer of one head and one image, ``dynamics.pixels``.

    Args:
        layer: From :func:`~ddf_convert.visualize.filters`.
        image: Which of the batch.
        head: Which of the layer's.
    """
    whole = _squares(layer, image, head, centered=False).mean()
    return _as_map(layer, (_squares(layer, image, head, centered=True) / whole.clamp(min=1e-30)).sqrt())


def _squares(layer: LayerFilters, image: int, head: int, centered: bool) -> Tensor:
    """(N, P): squared norms of the filters of a head, or of their differences from the mean over pixels."""
    spatial = layer.by_branch()[image, :, head].double()  # (N, T, P)
    channel = layer.channel[image].double().flatten(2).unflatten(1, (layer.heads, -1))[:, head]  # (N, C / G, T)
    square, mean = channel.square().mean(1)[..., None], channel.mean(1)[..., None]
    if centered:
        spatial = spatial - spatial.mean(-1, keepdim=True)
    squares: Tensor = spatial.square()
    if layer.combine == "mul":
        squares = squares * square
    elif not centered:  # of a difference the channel filter is no part
        squares = squares + 2 * spatial * mean + square
    return squares.sum(1).clamp(min=0)


def _as_map(layer: LayerFilters, values: Tensor) -> Tensor:
    step = layer.scale_factor
    height, width = (length // step for length in layer.size)
    return torch.pixel_shuffle(values.unflatten(-1, (height, width)), step)[0]
