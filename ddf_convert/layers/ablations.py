"""The two halves of DDF, each alone: a filter for every pixel, or one for every channel of every image."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ddf_convert.layers.base import DynamicFilter2d, Size, check_filter_options, zero_bias
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch


class SpatialFilter2d(DynamicFilter2d):
    """Filters every pixel with a K x K filter predicted there, the same for all channels of a head.

    It is DDF with a channel filter of ones, the row "spatial" of the paper's table 3; CARAFE and involution filter so.
    The arguments mean what they mean in :class:`DDF2d`.

    Args:
        affine: FilterNorm learns a scale and a shift for each tap.

    Attributes:
        spatial_branch: Predicts the filters, (B, G*K*K, Ho, Wo).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., CVPR 2021, table 3.
    """

    _repr_attributes: ClassVar[tuple[str, ...]] = ("heads", "affine")

    def __init__(
        self,
        in_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        heads: int = 1,
        nonlinearity: str = "relu",
        affine: bool = False,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_filter_options("SpatialFilter2d", in_channels, heads)
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        self.heads = heads
        self.affine = affine
        self.spatial_branch = SpatialBranch(
            in_channels, self.kernel_size[0], heads, self.stride[0], nonlinearity, affine, device, dtype
        )
        self.bias = zero_bias(in_channels, bias, device, dtype)

    def _forward(self, input: Tensor) -> Tensor:
        return self._apply_filters(input, spatial_filter=self.spatial_branch(self.centers(input)))


class ChannelFilter2d(DynamicFilter2d):
    """Filters every channel of every image with a K x K filter predicted for it, the same for all pixels.

    It is DDF with a spatial filter of ones, the row "channel" of the paper's table 3; WeightNet filters so. The
    arguments mean what they mean in :class:`DDF2d`.

    Args:
        affine: FilterNorm learns a shift too.

    Attributes:
        channel_branch: Predicts the filters, (B, C, K, K).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., CVPR 2021, table 3.
    """

    _repr_attributes: ClassVar[tuple[str, ...]] = ("se_ratio", "affine")

    def __init__(
        self,
        in_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        affine: bool = False,
        bias: bool = False,
        padding_mode: str = "zeros",
        squeeze_channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_filter_options("ChannelFilter2d", in_channels, se_ratio=se_ratio)
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        self.se_ratio = se_ratio
        self.affine = affine
        self.channel_branch = ChannelBranch(
            in_channels, self.kernel_size[0], se_ratio, nonlinearity, affine, squeeze_channels, device, dtype
        )
        self.bias = zero_bias(in_channels, bias, device, dtype)

    def _forward(self, input: Tensor) -> Tensor:
        return self._apply_filters(input, self.channel_branch(input))
