"""DDFUp2d, upsampling with decoupled dynamic filters (the authors' DDFUpPack), and a 1x1 convolution before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.layers.base import (
    ConvAttributes,
    MixingConv,
    Size,
    add_bias,
    batched,
    check_filter_options,
    check_padding_mode,
    one_size,
    statically_true,
    zero_bias,
)
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch
from ddf_convert.layers.ddf import operator_can_normalize
from ddf_convert.layers.fused_branches import (
    fusable_spatial_branches,
    fused_channel_filters,
    fused_spatial_filters,
    normalize_spatial_filters,
)
from ddf_convert.ops import ddf


class DDFUp2d(ConvAttributes):
    """Upsamples by an integer factor: every pixel of the output has its own K x K filter over the input.

    Each pixel of the input becomes a cell of s x s pixels, and each of s*s branches predicts the filters for one place
    in the cells. Channels are not mixed.

    Args:
        in_channels: C, of the input and of the output.
        scale_factor: s, 2 or more. For large factors stack several layers: 16x is four layers of 2x.
        kernel_size: K, odd and at least 3, or (K, K).
        guide_channels: C of the guide, a feature of the input's height and width from which the spatial filters are
            predicted (joint upsampling); None predicts them from the input, through a depthwise K x K convolution.
        dilation: Distance between taps, in pixels of the input; one number, or two equal ones.
        heads: G; the channels of a head share a spatial filter.
        se_ratio: Width of the channel branches' squeeze, as a fraction of C (sigma in the paper); at least min(4, C).
        combine: "mul" or "add": how the two filters are combined.
        nonlinearity: What follows the layer, a name that ``torch.nn.init.calculate_gain`` knows; sets the filters'
            scale.
        affine: Both FilterNorms learn a scale and a shift for each tap, so that :meth:`fix` can take over an
            interpolation, or a transposed convolution.
        bias: Add a learned constant to each channel.
        padding_mode: What taps outside the input read: "zeros" (the authors'), "replicate" (as interpolation does),
            "reflect" or "circular".
        squeeze_channels: Width of the squeeze in channels, instead of ``se_ratio``.

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
        check_filter_options("DDFUp2d", in_channels, heads, se_ratio, combine)
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

        def spatial_branch() -> nn.Module:
            if guide_channels is not None:
                return SpatialBranch(guide_channels, kernel_size, heads, 1, nonlinearity, affine, **where)
            branch = SpatialBranch(in_channels, kernel_size, heads, 1, nonlinearity, affine, **where)
            depthwise = nn.Conv2d(
                in_channels, in_channels, kernel_size, padding=kernel_size // 2, groups=in_channels, **where
            )
            return nn.Sequential(depthwise, branch)

        branches = range(self.scale_factor**2)
        self.spatial_branch = nn.ModuleList(spatial_branch() for _ in branches)
        self.channel_branch = nn.ModuleList(
            ChannelBranch(in_channels, kernel_size, se_ratio, nonlinearity, affine, squeeze_channels, **where)
            for _ in branches
        )
        self.bias = zero_bias(in_channels, bias, device, dtype)

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
        if guide is not None and input.dim() == 3:
            guide = guide.unsqueeze(0)
        return batched(self, lambda images: self._forward(images, guide, output_size), input)

    def _forward(self, input: Tensor, guide: Tensor | None, output_size: Sequence[int] | None) -> Tensor:
        self._check_guide(input, guide)
        source = input if guide is None else guide
        channel_filter = fused_channel_filters(list(self.channel_branch), input)
        padding = self.dilation[0] * (self.kernel_size[0] - 1) // 2
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, (padding,) * 4, mode=self.padding_mode), 0
        norm_scale = None
        branches = fusable_spatial_branches(self.spatial_branch, self.guide_channels is not None)
        if not branches:
            spatial_filter = torch.cat([branch(source) for branch in self.spatial_branch], 1)
        else:
            spatial_filter = fused_spatial_filters(branches, source)
            if operator_can_normalize(branches[0][1], source):
                norm_scale = branches[0][1].norm.scale
            else:
                spatial_filter = normalize_spatial_filters(branches, spatial_filter)
        output = ddf(
            input,
            channel_filter,
            spatial_filter,
            padding=padding,
            dilation=self.dilation[0],
            combine=self.combine,
            upscale_factor=self.scale_factor,
            norm_scale=norm_scale,
        )
        output = add_bias(output, self.bias)
        if output_size is None:
            return output
        if all(statically_true(wanted == size) for wanted, size in zip(output_size, output.shape[-2:], strict=True)):
            return output
        return F.interpolate(output, size=tuple(output_size), mode="nearest")

    def fix(self, filters: Tensor) -> None:
        """Makes the layer a fixed linear one, whose filters no longer depend on the input.

        The dynamic parts stay and can learn: FilterNorm's scales, which are 0, have gradients from the first step,
        and the layers before them once the scales have moved.

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
        """Returns the arguments, as ``print`` shows them."""
        return (
            f"{self.in_channels}, scale_factor={self.scale_factor}, kernel_size={self.kernel_size[0]},"
            f" guide_channels={self.guide_channels}, dilation={self.dilation[0]}, heads={self.heads},"
            f" se_ratio={self.se_ratio}, combine={self.combine!r}, affine={self.affine},"
            f" bias={self.bias is not None}, padding_mode={self.padding_mode!r}"
        )


class DDFUpConv2d(MixingConv):
    """A 1x1 convolution that mixes channels at the input's size, then DDF-Up.

    It replaces a transposed convolution, or a convolution and the pixel shuffle behind it. The 1x1 convolution comes
    first, where it has s*s times fewer pixels to work on, and DDF-Up fewer channels.

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        scale_factor: s of the DDF-Up layer.
        kernel_size: K of the DDF-Up layer.
        groups: Groups of the 1x1 convolution.
        bias: Whether the DDF-Up layer has a bias.
        **up_options: Any other argument of :class:`DDFUp2d`.

    Attributes:
        mix: The 1x1 ``Conv2d``.
        up: The :class:`DDFUp2d`.

    Raises:
        ValueError: An argument does not fit.
    """

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
    def _filter_layer(self) -> DDFUp2d:
        return self.up

    @property
    def bias(self) -> nn.Parameter | None:
        """The DDF-Up layer's bias, (C_out,), or None."""
        return self.up.bias

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, s*H, s*W); or both without B.

        Args:
            input: (B, C_in, H, W).
            output_size: (height, width) of the output, or (B, C_out, height, width), as transposed convolutions take
                it; where it is not s*H and s*W the map is resized to it, to the nearest pixel.
        """
        size = None if output_size is None else tuple(output_size)[-2:]
        return cast(Tensor, self.up(self.mix(input), output_size=size))
