"""The two branches that predict the filters (paper, figure 2; the authors' state-dict names)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.layers.direct import is_plain
from ddf_convert.layers.filter_norm import ChannelFilterNorm, SpatialFilterNorm


class SpatialBranch(nn.Sequential):
    """A 1x1 conv and FilterNorm: one K x K filter per head and pixel.

    Args:
        in_channels: C of the feature that it reads.
        kernel_size: K.
        heads: G.
        stride: Of the 1x1 conv, in pixels.
        nonlinearity: Sets the base scale of the filters.
        affine: Whether FilterNorm learns its scale and a shift.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        heads: int = 1,
        stride: int = 1,
        nonlinearity: str = "relu",
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Conv2d(in_channels, heads * kernel_size**2, 1, stride=stride, device=device, dtype=dtype),
            SpatialFilterNorm(kernel_size, nonlinearity, heads, affine, device=device, dtype=dtype),
        )

    @property
    def conv(self) -> nn.Conv2d:
        """The 1x1 conv."""
        return cast(nn.Conv2d, self[0])

    @property
    def norm(self) -> SpatialFilterNorm:
        """FilterNorm."""
        return cast(SpatialFilterNorm, self[1])

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G*K*K, ceil(H / stride), ceil(W / stride))."""
        return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]


class ChannelBranch(nn.Sequential):
    """Global pooling, squeeze, ReLU, expand and FilterNorm: one K x K filter per image and channel.

    Args:
        channels: C.
        kernel_size: K.
        se_ratio: Width of the squeeze as a fraction of C (sigma in the paper); the squeeze is at least 1 wide.
        nonlinearity: Sets the base scale of the filters.
        affine: Whether FilterNorm learns a shift besides its scale.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        squeezed = max(1, int(channels * se_ratio))
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1, device=device, dtype=dtype),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels * kernel_size**2, 1, device=device, dtype=dtype),
            ChannelFilterNorm(channels, kernel_size, nonlinearity, affine, device=device, dtype=dtype),
        )

    @property
    def squeeze(self) -> nn.Conv2d:
        """The 1x1 conv to fewer channels."""
        return cast(nn.Conv2d, self[1])

    @property
    def expand(self) -> nn.Conv2d:
        """The 1x1 conv to all taps of all channels."""
        return cast(nn.Conv2d, self[3])

    @property
    def norm(self) -> ChannelFilterNorm:
        """FilterNorm."""
        return cast(ChannelFilterNorm, self[4])

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, K, K)."""
        if not self.is_as_built():
            return cast(Tensor, super().forward(input))  # type: ignore[no-untyped-call]
        squeeze, expand = self.squeeze, self.expand
        # On maps of one pixel a 1x1 convolution is a matrix product, and as one it takes fewer steps to start.
        pooled = input.mean((-2, -1))
        squeezed = F.relu(F.linear(pooled, squeeze.weight.flatten(1), squeeze.bias), inplace=True)
        return cast(Tensor, self.norm(F.linear(squeezed, expand.weight.flatten(1), expand.bias)))

    def is_as_built(self) -> bool:
        """Whether the children are those of the constructor, and nothing watches them."""
        kinds = (nn.AdaptiveAvgPool2d, nn.Conv2d, nn.ReLU, nn.Conv2d, ChannelFilterNorm)
        if len(self) != len(kinds) or not all(map(is_plain, self, kinds)):
            return False
        pool, convolutions = cast(nn.AdaptiveAvgPool2d, self[0]), (self.squeeze, self.expand)
        return pool.output_size == 1 and all(
            convolution.kernel_size == (1, 1) and convolution.padding == (0, 0) and convolution.groups == 1
            for convolution in convolutions
        )
