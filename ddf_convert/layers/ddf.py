"""DDF2d: the layer of the paper (the authors' DDFPack)."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddf_convert.layers.base import ConvAttributes, Size, SlidingWindow2d, add_bias, batched
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch, has_default_forward
from ddf_convert.layers.filter_norm import ChannelFilterNorm, SpatialFilterNorm
from ddf_convert.ops import COMBINATIONS, ddf


def normalizes_inside(branch: nn.Sequential, input: Tensor) -> bool:
    """Whether the operator may do the FilterNorm of a spatial branch: where that changes its speed and nothing else."""
    return (
        input.is_cuda
        and has_default_forward(branch, SpatialBranch)
        and len(branch) == 2
        and has_default_forward(branch[1], SpatialFilterNorm)
        and cast(SpatialFilterNorm, branch[1]).std is None
    )


def check_options(
    layer: str, in_channels: int, heads: int = 1, se_ratio: float = 1.0, combine: str = COMBINATIONS[0]
) -> None:
    """Raises a ValueError, in the name of a layer, unless what its filters are made by fits."""
    if in_channels < 1 or heads < 1 or in_channels % heads:
        raise ValueError(f"{layer}: heads must divide in_channels, got {heads} heads and {in_channels} channels")
    if combine not in COMBINATIONS:
        raise ValueError(f"{layer}: combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    if not 0 < se_ratio < math.inf:
        raise ValueError(f"{layer}: se_ratio must be above 0 and finite, got {se_ratio}")


class DDF2d(SlidingWindow2d):
    """Filters every pixel of every channel with a K x K filter predicted from the input; channels are not mixed.

    Args:
        in_channels: C, of the input and of the output.
        kernel_size: K, odd and at least 3; or (K, K), as Conv2d has it, which goes for the next three too.
        stride: Step between output pixels, in input pixels.
        padding: Pixels on every side; None keeps the size (at stride 1); "same" is TensorFlow's SAME, which pads so
            that the output has ceil(H / stride) rows, one more pixel below than above where they cannot be equal.
        dilation: Distance between taps, in pixels.
        heads: G; the channels of a head share a spatial filter.
        se_ratio: Width of the channel branch's squeeze, as a fraction of C (sigma in the paper); at least min(4, C).
        combine: "mul" or "add": how the two filters make one.
        nonlinearity: What follows the layer, by the names of ``torch.nn.init.calculate_gain``; sets the filters' scale.
        affine: Both FilterNorms learn a scale and a shift for each tap (the paper's: the channel branch's scale alone).
            A layer with scales of 0 is a fixed depthwise convolution, its filter the channel branch's shift: that is
            how a convolution's weights are taken over.
        bias: Add a learned constant to each channel, as a convolution can.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as for Conv2d.
        squeeze_channels: Width of the squeeze in channels, instead of ``se_ratio``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        spatial_branch: Predicts the spatial filters, (B, G*K*K, Ho, Wo).
        channel_branch: Predicts the channel filters, (B, C, K, K).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 3.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        heads: int = 1,
        se_ratio: float = 0.2,
        combine: str = "mul",
        nonlinearity: str = "relu",
        affine: bool = False,
        bias: bool = False,
        padding_mode: str = "zeros",
        squeeze_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        check_options("DDF2d", in_channels, heads, se_ratio, combine)
        self.heads = heads
        self.se_ratio = se_ratio
        self.combine = combine
        self.affine = affine
        self.spatial_branch = SpatialBranch(
            in_channels, self.kernel_size[0], heads, self.stride[0], nonlinearity, affine, device=device, dtype=dtype
        )
        self.channel_branch = ChannelBranch(
            in_channels, self.kernel_size[0], se_ratio, nonlinearity, affine, squeeze_channels, device, dtype
        )
        self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, Ho, Wo), Ho and Wo as for a convolution with the same arguments; or both without B."""
        return batched("DDF2d", self._forward, input)

    def _forward(self, input: Tensor) -> Tensor:
        channel_filter = self.channel_branch(input)
        centers = self.centers(input)
        input, padding = self.padded(input)
        options: dict[str, Any] = {
            "stride": self.stride[0],
            "padding": padding,
            "dilation": self.dilation[0],
            "combine": self.combine,
        }
        if normalizes_inside(self.spatial_branch, input):
            conv, norm = self.spatial_branch[0], cast(SpatialFilterNorm, self.spatial_branch[1])
            output = ddf(input, channel_filter, conv(centers), norm_scale=norm.scale, **options)
        else:
            output = ddf(input, channel_filter, self.spatial_branch(centers), **options)
        return add_bias(output, self.bias)

    def fix(self, filter: Tensor) -> None:
        """Makes the layer a depthwise convolution, whose filter no longer depends on the input.

        The dynamic parts are there and learn: the scales of FilterNorm, which are 0, have gradients from the first
        step; what stands before them, once they have moved.

        Args:
            filter: (C, K, K), any dtype.

        Raises:
            ValueError: The layer is not affine.
        """
        cast(ChannelFilterNorm, self.channel_branch[4]).fix(filter)
        cast(SpatialFilterNorm, self.spatial_branch[1]).fix(1.0 if self.combine == "mul" else 0.0)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return (
            f"{self.window_repr()}, heads={self.heads}, se_ratio={self.se_ratio}, combine={self.combine!r},"
            f" affine={self.affine}, bias={self.bias is not None}"
        )


class SeparableConv(ConvAttributes, nn.Sequential):
    """A layer with windows, then a 1x1 convolution called ``mix``; answers for both what a ``Conv2d`` would."""

    mix: nn.Conv2d

    @property
    def in_channels(self) -> int:
        """C of the input."""
        return self.mix.in_channels

    @property
    def out_channels(self) -> int:
        """C of the output."""
        return self.mix.out_channels

    @property
    def bias(self) -> nn.Parameter | None:
        """Of the 1x1 convolution, (C_out,), or None."""
        return cast("nn.Parameter | None", self.mix.bias)

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(K, K) of the first layer, as also the sizes below."""
        return cast("tuple[int, int]", self[0].kernel_size)

    @property
    def stride(self) -> tuple[int, int]:
        """(rows, columns)."""
        return cast("tuple[int, int]", self[0].stride)

    @property
    def padding(self) -> tuple[int, int] | str:
        """(rows, columns), or "same"."""
        return cast("tuple[int, int] | str", self[0].padding)

    @property
    def dilation(self) -> tuple[int, int]:
        """(rows, columns)."""
        return cast("tuple[int, int]", self[0].dilation)

    @property
    def padding_mode(self) -> str:
        """As of Conv2d."""
        return cast(str, self[0].padding_mode)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, Ho, Wo), as a convolution with the same arguments; or both without B."""
        return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]


class SeparableFilter2d(SeparableConv):
    """A filter that works on every channel by itself, then a 1x1 convolution, in the place of a convolution.

    It is for other filters what :class:`DDFConv2d` is for DDF.

    Args:
        filter: The first layer, which keeps the channels.
        in_channels: C of the input.
        out_channels: C of the output.
        groups: Of the 1x1 convolution.
        bias: Of the 1x1 convolution.
        device: Of the 1x1 convolution's parameters.
        dtype: Of the 1x1 convolution's parameters.

    Attributes:
        filter: The first layer.
        mix: The 1x1 ``Conv2d``.
    """

    filter: nn.Module

    def __init__(
        self,
        filter: nn.Module,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.filter = filter
        self.mix = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype)


class DDFConv2d(SeparableConv):
    """DDF, then a 1x1 convolution that mixes channels and sets the output width.

    It is what the paper puts in the place of the 3x3 convolutions of a basic block (DDF-ResNet-18).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: K of the DDF layer.
        groups: Of the 1x1 convolution.
        bias: Of the 1x1 convolution.
        device: Of the parameters.
        dtype: Of the parameters.
        **ddf_options: Any other argument of :class:`DDF2d`.

    Attributes:
        ddf: The :class:`DDF2d`.
        mix: The 1x1 ``Conv2d``.

    Raises:
        ValueError: An argument does not fit.
    """

    ddf: DDF2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        groups: int = 1,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        **ddf_options: Any,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.ddf = DDF2d(in_channels, kernel_size, device=device, dtype=dtype, **ddf_options)
        self.mix = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype)
