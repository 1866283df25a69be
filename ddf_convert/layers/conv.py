"""DDFConv2d: a DDF layer and the 1x1 convolution that mixes its channels, in the place of a convolution."""

from __future__ import annotations

from typing import Any

from torch import nn

from ddf_convert.layers.ddf import DDF2d
from ddf_convert.layers.mixed import SeparableConv
from ddf_convert.layers.window import Size


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
