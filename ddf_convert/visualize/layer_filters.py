"""The filters of one layer, and what is computed from them: how dynamic they are, their components, maps of change.

The applied filter of pixel p and channel c is ``F = spatial[p] * channel[c]``, or their sum.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property

import torch
from torch import Tensor

_ROUNDING = 1e-6  # relative; numbers below it are rounding
_TINY = 1e-30  # against division by zero


@dataclass(frozen=True)
class Dynamics:
    """How dynamic the filters of a layer are on some images; each number goes from 0 to 1.

    A number is the relative norm that all applied filters F lose if something in them is replaced by its mean:
    ``sqrt(sum of (F - F with the mean)^2 / sum of F^2)``, summed over images, pixels, channels and taps.

    Attributes:
        total: Loss with the best fixed depthwise convolution for these images; 0 is a fixed depthwise convolution.
        pixels: Loss if each image has the mean of its spatial filters everywhere.
        images: Loss if all images have the mean of their channel filters; None for one image.
        channels: Loss if the channels of a head share the mean of their channel filters. Fixed filters differ from
            channel to channel too, so it is no part of the total.
    """

    total: float
    pixels: float
    images: float | None
    channels: float

    def to_dict(self) -> dict[str, float | None]:
        """Returns the numbers by name."""
        return asdict(self)


def measure_dynamics(spatial: Tensor, channel: Tensor, combine: str) -> Dynamics:
    """Measures the filters of one layer, exactly, from the moments of both: no tensor is pixels x channels large.

    Args:
        spatial: (B, N, G, T, P), the filters of P pixels; N branches (1, or s*s of DDF-Up), G heads, T taps.
        channel: (B, N, C, T); channels of a head stand together.
        combine: "mul" or "add".
    """
    spatial = spatial.double()
    channel = channel.double().unflatten(2, (spatial.shape[2], -1)).transpose(3, 4)  # (B, N, G, T, C / G)
    mean_s, mean_c = spatial.mean(-1), channel.mean(-1)  # (B, N, G, T)
    var_s = (spatial - mean_s[..., None]).square().mean(-1)
    var_c = (channel - mean_c[..., None]).square().mean(-1)
    square_s, square_c = var_s + mean_s.square(), var_c + mean_c.square()
    var_images = (channel - channel.mean(0)).square().mean(-1)
    if combine == "mul":
        square, mean = square_s * square_c, mean_s[..., None] * channel
        pixels, channels, images = var_s * square_c, square_s * var_c, square_s * var_images
    else:
        square, mean = square_s + square_c + 2 * mean_s * mean_c, mean_s[..., None] + channel
        pixels, channels, images = var_s, var_c, var_images
    # The best fixed filter of a channel is its mean over pixels and images. It is off by the variance over pixels, and
    # for each image by the distance of the mean over its pixels from the mean of all.
    total = pixels + (mean - mean.mean(0)).square().mean(-1)
    mean_square = float(square.mean())
    if mean_square <= 0:
        return Dynamics(0.0, 0.0, 0.0 if len(spatial) > 1 else None, 0.0)

    def relative_norm(squares: Tensor) -> float:
        norm = (max(0.0, float(squares.mean())) / mean_square) ** 0.5
        return 0.0 if norm < _ROUNDING else min(1.0, norm)

    return Dynamics(
        relative_norm(total),
        relative_norm(pixels),
        relative_norm(images) if len(spatial) > 1 else None,
        relative_norm(channels),
    )


@dataclass(frozen=True)
class LayerFilters:
    """The filters of one layer as the operator gets them, after FilterNorm; on the CPU, float32 (or float64).

    Attributes:
        name: Path of the layer in the model, as in a plan; for a DDF layer with a 1x1 convolution, the path of both.
        kind: "DDF2d", "DDFConv2d", "DDFUp2d" or "DDFUpConv2d".
        spatial: (B, G, K, K, Ho, Wo), one filter for every pixel of the layer's output and every head. The branches
            of a DDF-Up layer are interleaved.
        channel: (B, N, C, K, K), one filter for every channel, in each of N branches: 1, or s*s of a DDF-Up layer.
        combine: "mul" or "add": how the two become the filter that is applied.
        scale_factor: s of a DDF-Up layer, else 1.
        untouched: The layer is still a fixed filter, as :meth:`~ddf_convert.layers.DDF2d.fix` made it.
        call: Number of the call, from 1, for a layer that is called several times in a forward pass.
    """

    name: str
    kind: str
    spatial: Tensor = field(repr=False)
    channel: Tensor = field(repr=False)
    combine: str
    scale_factor: int = 1
    untouched: bool = False
    call: int = 1

    @property
    def title(self) -> str:
        """Its name, with the number of the call if that is not the first."""
        return self.name if self.call == 1 else f"{self.name} (call {self.call})"

    @property
    def kernel_size(self) -> int:
        """K."""
        return self.spatial.shape[2]

    @property
    def heads(self) -> int:
        """G."""
        return self.spatial.shape[1]

    @property
    def channels(self) -> int:
        """C."""
        return self.channel.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """(Ho, Wo) of the layer's output."""
        return self.spatial.shape[4], self.spatial.shape[5]

    def by_branch(self) -> Tensor:
        """Returns the spatial filters branch by branch, (B, N, G, K*K, P), for P pixels of the input."""
        step = self.scale_factor
        cells: Tensor = (
            self.spatial.flatten(2, 3).unflatten(-1, (-1, step)).unflatten(-3, (-1, step))
        )  # (..., H, s, W, s)
        return cells.movedim((4, 6), (1, 2)).flatten(1, 2).flatten(-2)

    @cached_property
    def dynamics(self) -> Dynamics:
        """How dynamic the filters are, on these images."""
        return measure_dynamics(self.by_branch(), self.channel.flatten(3), self.combine)


@dataclass(frozen=True)
class Components:
    """Principal components of the spatial filters of one head, over the pixels of one image.

    Attributes:
        scores: (3, Ho, Wo), the amount of each component in the filter of each pixel.
        filters: (3, K, K), the components, each of norm 1 with its greatest tap positive.
        shares: Of the variance over pixels, in descending order; they add up to 1 at most.
    """

    scores: Tensor
    filters: Tensor
    shares: tuple[float, ...]

    @property
    def changes(self) -> bool:
        """Whether the filters differ at all."""
        return sum(self.shares) > 0

    def colors(self) -> Tensor:
        """Returns the components as red, green and blue, (Ho, Wo, 3), from 0 to 1; gray is the mean filter.

        Each color is as strong as the fourth root of its component's share of the variance: weak components can be
        seen, and still look weak.
        """
        deviation = self.scores.flatten(1).std(1, correction=0).clamp(min=_TINY).view(-1, 1, 1)
        weight = (torch.tensor(self.shares, dtype=self.scores.dtype) / max(self.shares[0], _TINY)) ** 0.25
        return (0.5 + 0.22 * weight.view(-1, 1, 1) * self.scores / deviation).clamp(0, 1).movedim(0, -1)


def components(layer: LayerFilters, image: int = 0, head: int = 0) -> Components:
    """Returns the three principal components of a layer's spatial filters over the pixels of an image.

    The mean of each branch of a DDF-Up layer is subtracted, so that constant differences between branches show no
    checkerboard.

    Args:
        layer: From :func:`~ddf_convert.visualize.filters`.
        image: Index in the batch.
        head: Index of the head.
    """
    taps = layer.by_branch()[image, :, head].double()  # (N, T, P)
    centered = taps - taps.mean(-1, keepdim=True)
    scale = float(taps.square().mean()) ** 0.5
    if float(centered.square().mean()) ** 0.5 <= _ROUNDING * scale:
        centered = torch.zeros_like(centered)
    samples = centered.transpose(1, 2).flatten(0, 1)  # (N * P, T)
    values, vectors = torch.linalg.eigh(samples.T @ samples)
    values, vectors = values.flip(0).clamp(min=0)[:3], vectors.flip(1)[:, :3]
    greatest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * greatest.sign()  # the sign of an eigenvector is arbitrary
    total = float(samples.square().sum())
    scores = torch.einsum("ntp,tc->ncp", centered, vectors).transpose(0, 1).flatten(0, 1)
    return Components(
        scores=_interleave_branches(layer, scores),
        filters=vectors.T.unflatten(1, (layer.kernel_size, layer.kernel_size)),
        shares=tuple(float(value) / total if total else 0.0 for value in values),
    )


def strength(layer: LayerFilters, image: int = 0, head: int = 0) -> Tensor:
    """Returns the norm of each pixel's applied filter over the mean norm, (Ho, Wo).

    The norm is the root mean square over the channels of the head. The norm of the spatial filter alone would say
    nothing: FilterNorm makes it the same for every pixel, unless it learns a shift.

    Args:
        layer: From :func:`~ddf_convert.visualize.filters`.
        image: Index in the batch.
        head: Index of the head.
    """
    norms = _squared_norms(layer, image, head, centered=False).sqrt()
    return _interleave_branches(layer, norms / norms.mean().clamp(min=_TINY))[0]


def change(layer: LayerFilters, image: int = 0, head: int = 0) -> Tensor:
    """Returns how far each pixel's applied filter is from the image's mean filter, over the norm of a filter, (Ho, Wo).

    Both norms are root mean squares: over the channels of the head, the second one over the pixels too. For a layer of
    one head and one image, the root mean square of the map is ``dynamics.pixels``.

    Args:
        layer: From :func:`~ddf_convert.visualize.filters`.
        image: Index in the batch.
        head: Index of the head.
    """
    mean_square = _squared_norms(layer, image, head, centered=False).mean()
    differences = _squared_norms(layer, image, head, centered=True)
    return _interleave_branches(layer, (differences / mean_square.clamp(min=_TINY)).sqrt())[0]


def _squared_norms(layer: LayerFilters, image: int, head: int, centered: bool) -> Tensor:
    """Returns squared norms of a head's applied filters, or of their differences from the mean over pixels: (N, P)."""
    spatial = layer.by_branch()[image, :, head].double()  # (N, T, P)
    channel = layer.channel[image].double().flatten(2).unflatten(1, (layer.heads, -1))[:, head]  # (N, C / G, T)
    square, mean = channel.square().mean(1)[..., None], channel.mean(1)[..., None]
    if centered:
        spatial = spatial - spatial.mean(-1, keepdim=True)
    squares: Tensor = spatial.square()
    if layer.combine == "mul":
        squares = squares * square
    elif not centered:  # in a difference of sums the channel filter cancels
        squares = squares + 2 * spatial * mean + square
    return squares.sum(1).clamp(min=0)


def _interleave_branches(layer: LayerFilters, values: Tensor) -> Tensor:
    """(M * N, P), values of N branches -> (M, Ho, Wo), maps of the layer's output."""
    step = layer.scale_factor
    height, width = (length // step for length in layer.size)
    return torch.pixel_shuffle(values.unflatten(-1, (height, width)), step)
