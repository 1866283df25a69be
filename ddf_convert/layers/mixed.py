"""A layer that keeps channels apart, and the 1x1 convolution that mixes them."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ddf_convert.layers.window import ConvAttributes


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


class MixedFilter2d(SeparableConv):
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
