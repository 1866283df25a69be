"""The operators in plain PyTorch: their specification, and the fallback on any device."""

from ddf_convert.reference.checks import Geometry
from ddf_convert.reference.operators import (
    EPSILON,
    LEAST_SQUARE,
    backward,
    filter_norm,
    filter_norm_backward,
    filter_norm_second_backward,
    forward,
    shuffle,
    unshuffle,
)

__all__ = [
    "EPSILON",
    "LEAST_SQUARE",
    "Geometry",
    "backward",
    "filter_norm",
    "filter_norm_backward",
    "filter_norm_second_backward",
    "forward",
    "shuffle",
    "unshuffle",
]
