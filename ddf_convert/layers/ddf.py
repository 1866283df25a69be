"""DDF2d, the layer of the paper (the authors' DDFPack), and layers that add a 1x1 convolution behind it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ddf_convert.layers.base import DynamicFilter2d, MixingConv, Size, check_filter_options, zero_bias
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch, has_default_forward
from ddf_convert.layers.filter_norm import SpatialFilterNorm


class DDF2d(DynamicFilter2d):
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
        combine: "mul" or "add": how the two filters are combined.
        nonlinearity: What follows the layer, a name that ``torch.nn.init.calculate_gain`` knows; sets the filters'
            scale.
        affine: Both FilterNorms learn a scale and a shift for each tap (the paper's: the channel branch's scale only).
            A layer with scales of 0 is a fixed depthwise convolution, its filter the channel branch's shift: this is
            how a convolution's weights are taken over.
        bias: Add a learned constant to each channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as for Conv2d.
        squeeze_channels: Width of the squeeze in channels, instead of ``se_ratio``.

    Attributes:
        spatial_branch: Predicts the spatial filters, (B, G*K*K, Ho, Wo).
        channel_branch: Predicts the channel filters, (B, C, K, K).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 3.
    """

    _repr_attributes: ClassVar[tuple[str, ...]] = ("heads", "se_ratio", "combine", "affine")

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
        check_filter_options("DDF2d", in_channels, heads, se_ratio, combine)
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        self.heads = heads
        self.se_ratio = se_ratio
        self.combine = combine
        self.affine = affine
        self.spatial_branch = SpatialBranch(
            in_channels, self.kernel_size[0], heads, self.stride[0], nonlinearity, affine, device, dtype
        )
        self.channel_branch = ChannelBranch(
            in_channels, self.kernel_size[0], se_ratio, nonlinearity, affine, squeeze_channels, device, dtype
        )
        self.bias = zero_bias(in_channels, bias, device, dtype)

    def _forward(self, input: Tensor) -> Tensor:
        channel_filter = self.channel_branch(input)
        centers = self.centers(input)
        norm_scale = None
        if operator_can_normalize(self.spatial_branch, input):
            spatial_filter, norm_scale = self.spatial_branch.conv(centers), self.spatial_branch.norm.scale
        else:
            spatial_filter = self.spatial_branch(centers)
        return self._apply_filters(input, channel_filter, spatial_filter, self.combine, norm_scale)

    def fix(self, filter: Tensor) -> None:
        """Makes the layer a depthwise convolution, whose filter no longer depends on the input.

        The dynamic parts stay and can learn: FilterNorm's scales, which are 0, have gradients from the first step,
        and the layers before them once the scales have moved.

        Args:
            filter: (C, K, K), any dtype.

        Raises:
            ValueError: The layer is not affine.
        """
        self.channel_branch.norm.fix(filter)
        self.spatial_branch.norm.fix(1.0 if self.combine == "mul" else 0.0)


def operator_can_normalize(branch: nn.Sequential, input: Tensor) -> bool:
    """Whether the operator may do the FilterNorm of a spatial branch, which is faster on CUDA and changes no result."""
    return (
        input.is_cuda
        and has_default_forward(branch, SpatialBranch)
        and len(branch) == 2
        and has_default_forward(branch[1], SpatialFilterNorm)
        and cast(SpatialFilterNorm, branch[1]).std is None
    )


class SeparableConv(MixingConv, nn.Sequential):
    """Base of a layer that keeps the channels apart, named ``name`` in the state dict, then a 1x1 convolution."""

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        in_channels: int,
        out_channels: int,
        groups: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        mix = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=bias, device=device, dtype=dtype)
        super().__init__(OrderedDict({name: layer, "mix": mix}))
        self.groups = groups

    @property
    def _filter_layer(self) -> Any:
        return self[0]

    @property
    def bias(self) -> nn.Parameter | None:
        """The 1x1 convolution's bias, (C_out,), or None."""
        return cast("nn.Parameter | None", self.mix.bias)

    @property
    def stride(self) -> tuple[int, int]:
        """(rows, columns)."""
        return cast("tuple[int, int]", self[0].stride)

    @property
    def padding(self) -> tuple[int, int] | str:
        """(rows, columns), or "same"."""
        return cast("tuple[int, int] | str", self[0].padding)

    @property
    def padding_mode(self) -> str:
        """As for Conv2d."""
        return cast(str, self[0].padding_mode)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, Ho, Wo), as a convolution with the same arguments; or both without B."""
        return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]


class SeparableFilter2d(SeparableConv):
    """Any filter that keeps the channels apart, then a 1x1 convolution, instead of a convolution.

    It is for other filters what :class:`DDFConv2d` is for DDF.

    Args:
        filter: The first layer, which keeps the channels.
        in_channels: C of the input.
        out_channels: C of the output.
        groups: Groups of the 1x1 convolution.
        bias: Whether the 1x1 convolution has a bias.

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
        super().__init__("filter", filter, in_channels, out_channels, groups, bias, device, dtype)


class DDFConv2d(SeparableConv):
    """DDF, then a 1x1 convolution that mixes channels and sets the output width.

    The paper replaces the 3x3 convolutions of a basic block by it (DDF-ResNet-18).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel_size: K of the DDF layer.
        groups: Groups of the 1x1 convolution.
        bias: Whether the 1x1 convolution has a bias.
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
        layer = DDF2d(in_channels, kernel_size, device=device, dtype=dtype, **ddf_options)
        super().__init__("ddf", layer, in_channels, out_channels, groups, bias, device, dtype)
