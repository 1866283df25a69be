"""Modules: DDF and its parts, what takes a convolution's or an upsampling's place, and DDF's rivals."""

from ddf_convert.layers.branches import ChannelBranch, SpatialBranch
from ddf_convert.layers.condconv import CondConv2d, DwCondConv2d
from ddf_convert.layers.conv import DDFConv2d
from ddf_convert.layers.ddf import DDF2d
from ddf_convert.layers.filter_norm import ChannelFilterNorm, SpatialFilterNorm
from ddf_convert.layers.mixed import MixedFilter2d
from ddf_convert.layers.single import ChannelFilter2d, SpatialFilter2d
from ddf_convert.layers.up import DDFUp2d
from ddf_convert.layers.upconv import DDFUpConv2d
from ddf_convert.layers.weightnet import DwWeightNet2d
from ddf_convert.layers.window import Windowed

__all__ = [
    "ChannelBranch",
    "ChannelFilter2d",
    "ChannelFilterNorm",
    "CondConv2d",
    "DDF2d",
    "DDFConv2d",
    "DDFUp2d",
    "DDFUpConv2d",
    "DwCondConv2d",
    "DwWeightNet2d",
    "MixedFilter2d",
    "SpatialBranch",
    "SpatialFilter2d",
    "SpatialFilterNorm",
    "Windowed",
]
