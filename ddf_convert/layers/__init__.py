"""Layers: DDF and DDF-Up, their parts and ablations, and the baselines that the paper compares them with."""

from ddf_convert.layers.ablations import ChannelFilter2d, SpatialFilter2d
from ddf_convert.layers.base import SlidingWindow2d
from ddf_convert.layers.baselines import CondConv2d, DwCondConv2d, DwWeightNet2d
from ddf_convert.layers.branches import ChannelBranch, SpatialBranch
from ddf_convert.layers.ddf import DDF2d, DDFConv2d, SeparableFilter2d
from ddf_convert.layers.ddf_up import DDFUp2d, DDFUpConv2d
from ddf_convert.layers.filter_norm import ChannelFilterNorm, SpatialFilterNorm

MixedFilter2d, Windowed = SeparableFilter2d, SlidingWindow2d  # their names in earlier versions

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
    "SeparableFilter2d",
    "SlidingWindow2d",
    "SpatialBranch",
    "SpatialFilter2d",
    "SpatialFilterNorm",
]
