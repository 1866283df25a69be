"""The two halves of DDF, each by itself: a filter for every pixel, or one for every channel of every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddf_convert.layers.base import Size, SlidingWindow2d, add_bias, batched
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch
from ddf_convert.layers.ddf import check_options
from ddf_convert.ops import ddf


class SpatialFilter2d(SlidingWindow2d):
    """Filters every pixel with a K x K filter predicted there, the same for all channels of a head.

    DDF whose channel filter is all ones: the row "spatial" of the paper's table 3; CARAFE and involution filter so.

    Args:
        in_channels: C, of the input and of the output.
        kernel_size: K, odd and at least 3.
        stride: As of :class:`DDF2d`, like all that follow.
        padding: As of :class:`DDF2d`.
        dilation: As of :class:`DDF2d`.
        heads: G.
        nonlinearity: Sets the filters' scale.
        affine: FilterNorm learns a scale and a shift for each tap.
        bias: Add a learned constant to each channel.
        padding_mode: As of :class:`DDF2d`.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        spatial_branch: Predicts the filters, (B, G*K*K, Ho, Wo).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., CVPR 2021, table 3.
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
        nonlinearity: str = "relu",
        affine: bool = False,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        check_options("SpatialFilter2d", in_channels, heads)
        self.heads = heads
        self.affine = affine
        self.spatial_branch = SpatialBranch(
            in_channels, self.kernel_size[0], heads, self.stride[0], nonlinearity, affine, device=device, dtype=dtype
        )
        self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, Ho, Wo), Ho and Wo as for a convolution with the same arguments; or both without B."""
        return batched("SpatialFilter2d", self._forward, input)

    def _forward(self, input: Tensor) -> Tensor:
        spatial_filter = self.spatial_branch(self.centers(input))
        input, padding = self.padded(input)
        ones = spatial_filter.new_ones(*input.shape[:2], *self.kernel_size)
        output = ddf(input, ones, spatial_filter, stride=self.stride[0], padding=padding, dilation=self.dilation[0])
        return add_bias(output, self.bias)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return f"{self.window_repr()}, heads={self.heads}, affine={self.affine}, bias={self.bias is not None}"


class ChannelFilter2d(SlidingWindow2d):
    """Filters every channel of every image with a K x K filter predicted for it, the same for all pixels.

    DDF whose spatial filter is all ones: the row "channel" of the paper's table 3; WeightNet filters so.

    Args:
        in_channels: C, of the input and of the output.
        kernel_size: K, odd and at least 3.
        stride: As of :class:`DDF2d`, like all that follow.
        padding: As of :class:`DDF2d`.
        dilation: As of :class:`DDF2d`.
        se_ratio: Width of the branch's squeeze, as a fraction of C (sigma in the paper); at least min(4, C).
        nonlinearity: Sets the filters' scale.
        affine: FilterNorm learns a shift too.
        bias: Add a learned constant to each channel.
        padding_mode: As of :class:`DDF2d`.
        squeeze_channels: Width of the squeeze in channels, instead of ``se_ratio``.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        channel_branch: Predicts the filters, (B, C, K, K).
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Zhou et al., CVPR 2021, table 3.
    """

    bias: nn.Parameter | None

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
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        check_options("ChannelFilter2d", in_channels, se_ratio=se_ratio)
        self.se_ratio = se_ratio
        self.affine = affine
        self.channel_branch = ChannelBranch(
            in_channels, self.kernel_size[0], se_ratio, nonlinearity, affine, squeeze_channels, device, dtype
        )
        self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype)) if bias else None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, Ho, Wo), Ho and Wo as for a convolution with the same arguments; or both without B."""
        return batched("ChannelFilter2d", self._forward, input)

    def _forward(self, input: Tensor) -> Tensor:
        return add_bias(filtered_by_channel(self, input, self.channel_branch(input)), self.bias)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return f"{self.window_repr()}, se_ratio={self.se_ratio}, affine={self.affine}, bias={self.bias is not None}"


def filtered_by_channel(layer: SlidingWindow2d, input: Tensor, channel_filter: Tensor) -> Tensor:
    """What a layer makes of its input with a filter for every channel of every image: a dynamic depthwise convolution.

    Args:
        layer: Whose windows it reads.
        input: (B, C, H, W).
        channel_filter: (B, C, K, K).
    """
    ones = channel_filter.new_ones(input.shape[0], layer.kernel_size[0] ** 2, *layer.output_shape(input))
    input, padding = layer.padded(input)
    return ddf(input, channel_filter, ones, stride=layer.stride[0], padding=padding, dilation=layer.dilation[0])
