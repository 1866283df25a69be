"""DDF-Up layers beside the upsampling of the original whose places they took, and the filters that it was.

What upsamples by s makes an s x s cell of the output from the K x K pixels around each pixel of the input: that takes
s*s filters, which are called phases here. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.conversion.eligibility import effective_weight
from ddf_convert.conversion.plan import Interpolation
from ddf_convert.layers import DDFUp2d, DDFUpConv2d
from ddf_convert.recipes.factors import best_for_outputs

_CUBIC = -0.75  # torch's parameter of the bicubic kernel
_EXAMPLE = 16  # rows and columns of the map that the error of align_corners is calculated for


@dataclass(frozen=True)
class UpPair:
    """A new layer and the upsampling whose place it took.

    Attributes:
        name: Path of the convolution or interpolation in the original; for one that is called as a function, its name
            in the plan.
        place: Path of the new layer in the converted model.
        kind: Of what it replaced: "bilinear 2x", "transposed 4x4", "pixel shuffle 2x", ...
        layer: The new layer.
        interpolation: What it replaced, if that is an interpolation.
        conv: The convolution that it replaced, otherwise: transposed, or with a pixel shuffle behind it.
    """

    name: str
    place: str
    kind: str
    layer: DDFUp2d | DDFUpConv2d
    interpolation: Interpolation | None = None
    conv: nn.Conv2d | nn.ConvTranspose2d | None = None

    @property
    def up(self) -> DDFUp2d:
        """The DDF-Up layer."""
        return self.layer if isinstance(self.layer, DDFUp2d) else self.layer.up

    @torch.no_grad()
    def preserve(self) -> float:
        """Makes the layer what it replaced, as nearly as a fixed one can be.

        Returns:
            Norm of the difference between the old and the new linear map, over that of the old one; the bias is not
            looked at. It is 0 for interpolations but those with ``align_corners=True``, and for depthwise transposed
            convolutions.
        """
        up = self.up
        factor, size, channels = up.scale_factor, up.kernel_size[0], up.in_channels
        if self.interpolation is not None:
            filters = interpolation_filters(self.interpolation.mode, factor, size)
            up.fix(filters[:, None].expand(-1, channels, -1, -1))
            return alignment_error(self.interpolation.mode, factor) if self.interpolation.align_corners else 0.0
        assert self.conv is not None
        weight = (
            transposed_phases(self.conv, size)
            if isinstance(self.conv, nn.ConvTranspose2d)
            else shuffled_phases(self.conv, factor)
        )
        error = 0.0
        filters = weight[:, :, 0]  # of a depthwise one
        if isinstance(self.layer, DDFUpConv2d):
            mix, filters = best_for_outputs(weight)
            self.layer.mix.weight.copy_(mix.reshape(self.layer.mix.weight.shape))
            product = mix[..., None] * filters[:, :, None]
            error = ((product - weight).norm() / weight.norm().clamp_min(1e-30)).item()
        up.fix(filters.reshape(channels, factor**2, size, size).transpose(0, 1))
        if self.conv.bias is not None and up.bias is not None:
            # A pixel shuffle has a constant for each place in a cell; what they differ by cannot be kept.
            up.bias.copy_(self.conv.bias.view(channels, -1).mean(1))
        return error


def interpolation_filters(mode: str, factor: int, kernel_size: int) -> Tensor:
    """The phases of an interpolation without ``align_corners``: (s*s, K, K), over a map whose borders are replicated.

    Args:
        mode: Of ``F.interpolate``.
        factor: s.
        kernel_size: K; 3 is enough, for "bicubic" 5.
    """
    offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2  # of the taps, from the pixel
    centers = (torch.arange(factor, dtype=torch.float64) + 0.5) / factor - 0.5  # of the cell's pixels, from the pixel's
    distances = (centers[:, None] - offsets).abs()
    if mode == "bilinear":
        rows = (1 - distances).clamp_min(0)
    elif mode == "bicubic":
        near = ((_CUBIC + 2) * distances - (_CUBIC + 3)) * distances**2 + 1
        far = ((distances - 5) * distances + 8) * distances * _CUBIC - 4 * _CUBIC
        rows = torch.where(distances <= 1, near, torch.where(distances < 2, far, 0.0))
    else:  # the pixel itself; "area" is the mean over what an output's pixel covers, which lies within it
        rows = (offsets == 0).double().expand(factor, -1)
    return torch.einsum("dt,eu->detu", rows, rows).reshape(factor**2, kernel_size, kernel_size)


def alignment_error(mode: str, factor: int) -> float:
    """How much an interpolation with ``align_corners=True`` differs from the one without: a relative norm.

    It is that of the linear maps (Frobenius), on a map of 16x16 pixels: what the outputs differ by if the input is
    noise. On smooth inputs they differ by less.
    """
    # Rows and columns are interpolated alike: the map for both is the Kronecker product of that for rows with itself.
    rows = torch.eye(_EXAMPLE, dtype=torch.float64).view(_EXAMPLE, 1, _EXAMPLE, 1)
    size = (_EXAMPLE * factor, 1)
    aligned, other = (F.interpolate(rows, size, mode=mode, align_corners=flag).flatten() for flag in (True, False))
    norm = aligned.dot(aligned) ** 2
    difference = norm - 2 * aligned.dot(other) ** 2 + other.dot(other) ** 2
    return float((difference / norm).sqrt())


def transposed_phases(conv: nn.ConvTranspose2d, kernel_size: int) -> Tensor:
    """The phases of a transposed convolution: (G, O, I, s*s*K*K), groups, outputs and inputs of a group.

    ``output[s*y + d]`` is the sum over j of ``input[y + j] * weight[d + padding - j*s]``.

    Args:
        conv: Square, not dilated; its output is s times its input.
        kernel_size: K, in which all taps lie.
    """
    groups, factor, size = conv.groups, conv.stride[0], conv.kernel_size[0]
    shifts = torch.arange(kernel_size) - kernel_size // 2
    taps = torch.arange(factor)[:, None] + int(conv.padding[0]) - shifts * factor  # (s, K)
    chosen = (taps[..., None] == torch.arange(size)).to(conv.weight.device, torch.float64)  # (s, K, k)
    weight = conv.weight.detach().double().view(groups, conv.in_channels // groups, -1, size, size)
    phases = torch.einsum("giokl,dtk,eul->goidetu", weight, chosen, chosen)
    return phases.flatten(3)


def shuffled_phases(conv: nn.Conv2d, factor: int) -> Tensor:
    """The phases of a convolution with a pixel shuffle behind it, likewise; K is the convolution's.

    Args:
        conv: The convolution.
        factor: s.
    """
    groups, inputs = conv.groups, conv.in_channels // conv.groups
    weight = effective_weight(conv).double().reshape(groups, -1, factor**2, inputs, conv.kernel_size[0] ** 2)
    return weight.transpose(2, 3).flatten(3)


def fits(pair: UpPair, place: nn.Module | None, shuffle: nn.Module | None) -> bool:
    """Whether the original has, in the place of a new layer, what that was made for.

    Args:
        pair: The layer.
        place: What the original has there; None for an interpolation that is called as a function.
        shuffle: Of a pixel shuffle, what the original has in its place.
    """
    up = pair.up
    if pair.interpolation is not None:
        return place is None or (isinstance(place, nn.Upsample) and place.mode == pair.interpolation.mode)
    if isinstance(place, nn.ConvTranspose2d):
        found = (place.in_channels, place.out_channels, place.stride[0])
    elif isinstance(place, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle):
        factor = shuffle.upscale_factor
        found = (place.in_channels, place.out_channels // factor**2, factor)
    else:
        return False
    return found == (pair.layer.in_channels, up.out_channels, up.scale_factor)
