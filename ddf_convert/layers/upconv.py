"""DDFUpConv2d: a 1x1 convolution and a DDF-Up layer, in the place of a convolution that upsamples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from ddf_convert.layers.up import DDFUp2d
from ddf_convert.layers.window import ConvAttributes, Size


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
