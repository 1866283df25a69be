"""DDFUp2d: upsampling with decoupled dynamic filters (the authors' DDFUpPack)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.layers.base import (
    ConvAttributes,
    Size,
    add_bias,
    batched,
    check_padding_mode,
    one_size,
    statically_true,
)
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch
from ddf_convert.layers.ddf import check_options, normalizes_inside
from ddf_convert.layers.fused_branches import alike_spatial_branches, channel_filters, normalized, raw_spatial_filters
from ddf_convert.ops import ddf


class DDFUp2d(ConvAttributes):
    """Upsamples by an integer factor: every pixel of the output has a K x K filter of its own over the input.

    There are s*s branches, each of which predicts the filters of the pixels at one place in the s x s cells that the
    input's pixels become. Channels are not mixed.

    Args:
        in_channels: C, of the input and of the output.
        scale_factor: s, 2 or more. For large factors stack several layers: 16x is four layers of 2x.
        kernel_size: K, odd and at least 3, or (K, K).
        guide_channels: C of the guide, a feature of the input's height and width that the spatial filters are predicted
            from (joint upsampling); None predicts them from the input, through a depthwise K x K convolution.
        dilation: Distance between taps, in pixels of the input; one number, or two equal ones.
        heads: G; the channels of a head share a spatial filter.
        se_ratio: Width of the channel branches' squeeze, as a fraction of C (sigma in the paper); at least min(4, C).
        combine: "mul" or "add": how the two filters make one.
        nonlinearity: What follows the layer, by the names of ``torch.nn.init.calculate_gain``; sets the filters' scale.
        affine: Both FilterNorms learn a scale and a shift for each tap, so that :meth:`fix` can take over an
            interpolation, or a transposed convolution.
        bias: Add a learned constant to each channel.
        padding_mode: What taps outside the input read: "zeros" (the authors'), "replicate" (as interpolation does),
            "reflect" or "circular".
        squeeze_channels: Width of the squeeze in channels, instead of ``se_ratio``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        spatial_branch: s*s modules that predict spatial filters, (B, G*K*K, H, W).
        channel_branch: s*s modules that predict channel filters, (B, C, K, K).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 3.4.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        scale_factor: int = 2,
        kernel_size: Size = 3,
        guide_channels: int | None = None,
        dilation: Size = 1,
        heads: int = 1,
        se_ratio: float = 0.2,
        combine: str = "mul",
        nonlinearity: str = "linear",
        affine: bool = False,
        bias: bool = False,
        padding_mode: str = "zeros",
        squeeze_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options("DDFUp2d", in_channels, heads, se_ratio, combine)
        check_padding_mode("DDFUp2d", padding_mode)
        kernel_size = one_size("DDFUp2d", "kernel_size", kernel_size)
        dilation = one_size("DDFUp2d", "dilation", dilation)
        if scale_factor != int(scale_factor) or scale_factor < 2:
            raise ValueError(f"DDFUp2d: scale_factor must be a whole number from 2 on, got {scale_factor}")
        if guide_channels is not None and guide_channels < 1:
            raise ValueError(f"DDFUp2d: guide_channels must be 1 or more, or None, got {guide_channels}")
        if dilation < 1:
            raise ValueError(f"DDFUp2d: dilation must be 1 or more, got {dilation}")
        self.in_channels = self.out_channels = in_channels
        self.scale_factor = int(scale_factor)
        self.kernel_size = (kernel_size, kernel_size)
        self.guide_channels = guide_channels
        self.dilation = (dilation, dilation)
        self.heads = heads
        self.se_ratio = se_ratio
        self.combine = combine
        self.affine = affine
        self.padding_mode = padding_mode
        where: dict[str, Any] = {"device": device, "dtype": dtype}

        def spatial() -> nn.Module:
            read = in_channels if guide_channels is None else guide_channels
            branch = SpatialBranch(read, kernel_size, heads, 1, nonlinearity, affine, **where)
            if guide_channels is not None:
                return branch
            depthwise = nn.Conv2d(
                in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels, **where
            )
            return nn.Sequential(depthwise, branch)

        branches = range(self.scale_factor**2)
        self.spatial_branch = nn.ModuleList(spatial() for _ in branches)
        self.channel_branch = nn.ModuleList(
            ChannelBranch(in_channels, kernel_size, se_ratio, nonlinearity, affine, squeeze_channels, **where)
            for _ in branches
        )
        self.bias = nn.Parameter(torch.zeros(in_channels, **where)) if bias else None

    def forward(self, input: Tensor, guide: Tensor | None = None, output_size: Sequence[int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, s*H, s*W); or all without B.

        Args:
            input: (B, C, H, W) or (C, H, W).
            guide: (B, guide_channels, H, W), without B if the input is, where the layer has a guide.
            output_size: (height, width) of the output, where it is not s*H and s*W: the map is then resized to it, to
                the nearest pixel.

        Raises:
            ValueError: The guide is missing, is not wanted, or has another size than the input.
        """
        one = None if guide is None else guide.unsqueeze(0) if input.dim() == 3 else guide
        return batched("DDFUp2d", lambda images: self._forward(images, one, output_size), input)

    def _forward(self, input: Tensor, guide: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        self._check_guide(input, guide)
        read = input if guide is None else guide
        channel_filter = channel_filters(list(self.channel_branch), input)
        padding = self.dilation[0] * (self.kernel_size[0] - 1) // 2
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, (padding,) * 4, mode=self.padding_mode), 0
        options: dict[str, Any] = {
            "padding": padding,
            "dilation": self.dilation[0],
            "combine": self.combine,
            "upscale_factor": self.scale_factor,
        }
        branches = alike_spatial_branches(self.spatial_branch, self.guide_channels is not None)
        if not branches:
            spatial_filter = torch.cat([branch(read) for branch in self.spatial_branch], 1)
            output = ddf(input, channel_filter, spatial_filter, **options)
        elif normalizes_inside(branches[0][1], read):
            spatial_filter = raw_spatial_filters(branches, read)
            scale = branches[0][1].norm.scale
            output = ddf(input, channel_filter, spatial_filter, norm_scale=scale, **options)
        else:
            spatial_filter = normalized(branches, raw_spatial_filters(branches, read))
            output = ddf(input, channel_filter, spatial_filter, **options)
        output = add_bias(output, self.bias)
        if output_size is None:
            return output
        if all(statically_true(wanted == made) for wanted, made in zip(output_size, output.shape[-2:], strict=True)):
            return output
        return F.interpolate(output, size=tuple(output_size), mode="nearest")

    def fix(self, filters: Tensor) -> None:
        """Makes the layer a fixed linear one, whose filters no longer depend on the input.

        The dynamic parts are there and learn: the scales of FilterNorm, which are 0, have gradients from the first
        step; what stands before them, once they have moved.

        Args:
            filters: (s*s, C, K, K), any dtype; filter ``dy * s + dx`` makes the pixels (s*y + dy, s*x + dx).

        Raises:
            ValueError: The layer is not affine.
        """
        neutral = 1.0 if self.combine == "mul" else 0.0
        for filter, spatial, channel in zip(filters, self.spatial_branch, self.channel_branch, strict=True):
            branch = spatial if isinstance(spatial, SpatialBranch) else cast(nn.Sequential, spatial)[1]
            cast(SpatialBranch, branch).norm.fix(neutral)
            cast(ChannelBranch, channel).norm.fix(filter)

    def _check_guide(self, input: Tensor, guide: Tensor | None) -> None:
        if self.guide_channels is None:
            if guide is not None:
                raise ValueError("DDFUp2d: this layer takes no guide: it was made without guide_channels")
            return
        if guide is None:
            raise ValueError(f"DDFUp2d: this layer needs a guide of {self.guide_channels} channels")
        expected = (input.shape[0], self.guide_channels, *input.shape[2:])
        if tuple(guide.shape) != expected:
            raise ValueError(
                f"DDFUp2d: the guide must be (B, guide_channels, H, W) = {expected}, the input's height and width, got"
                f" {tuple(guide.shape)}"
            )

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return (
            f"{self.in_channels}, scale_factor={self.scale_factor}, kernel_size={self.kernel_size[0]},"
            f" guide_channels={self.guide_channels}, dilation={self.dilation[0]}, heads={self.heads},"
            f" se_ratio={self.se_ratio}, combine={self.combine!r}, affine={self.affine},"
            f" bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class DDFUpConv2d(ConvAttributes):
    """A 1x1 convolution that mixes channels at the input's size, then DDF-Up.

    It takes the place of a transposed convolution, or of a convolution and the pixel shuffle behind it. The 1x1 comes
    first, since there it has s*s times fewer pixels to work on, and DDF-Up fewer channels.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        scale_factor: s of the DDF-Up layer.
        kernel_size: K of the DDF-Up layer.
        groups: Of the 1x1 convolution.
        bias: Of the DDF-Up layer.
        device: Of the parameters.
        dtype: Of the parameters.
        **up_options: Any other argument of :class:`DDFUp2d`.

    Attributes:
        mix: The 1x1 ``Conv2d``.
        up: The :class:`DDFUp2d`.

    Raises:
        ValueError: An argument does not fit.
    """

    mix: nn.Conv2d
    up: DDFUp2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale_factor: int = 2,
        kernel_size: Size = 3,
        groups: int = 1,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        **up_options: Any,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mix = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False, **where)
        self.up = DDFUp2d(out_channels, scale_factor, kernel_size, bias=bias, **where, **up_options)

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the DDF-Up layer, (C_out,), or None."""
        return self.up.bias

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(K, K) of the DDF-Up layer."""
        return self.up.kernel_size

    @property
    def dilation(self) -> tuple[int, int]:
        """(rows, columns) of the DDF-Up layer."""
        return self.up.dilation

    @property
    def in_channels(self) -> int:
        """C of the input."""
        return self.mix.in_channels

    @property
    def out_channels(self) -> int:
        """C of the output."""
        return self.mix.out_channels

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, s*H, s*W); or both without B.

        Args:
            input: (B, C_in, H, W).
            output_size: (height, width) of the output, or (B, C_out, height, width), as transposed convolutions take
                it; where it is not s*H and s*W the map is resized to it, to the nearest pixel.
        """
        size = None if output_size is None else tuple(output_size)[-2:]
        return cast(Tensor, self.up(self.mix(input), output_size=size))
