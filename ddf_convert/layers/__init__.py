"""Modules: FilterNorm, the two filter branches, DDF2d and DDFUp2d, and DDFConv2d that takes a convolution's place."""

from ddf_convert.layers.branches import ChannelBranch, SpatialBranch
from ddf_convert.layers.conv import DDFConv2d
from ddf_convert.layers.ddf import DDF2d
from ddf_convert.layers.filter_norm import ChannelFilterNorm, SpatialFilterNorm
from ddf_convert.layers.up import DDFUp2d
from ddf_convert.layers.upconv import DDFUpConv2d

__all__ = [
    "ChannelBranch",
    "ChannelFilterNorm",
    "DDF2d",
    "DDFConv2d",
    "DDFUp2d",
    "DDFUpConv2d",
    "SpatialBranch",
    "SpatialFilterNorm",
]
