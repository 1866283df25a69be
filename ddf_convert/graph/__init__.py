"""From a model to its converted self: trace it, find the convolutions, plan, rewrite."""

from ddf_convert.graph.plan import Action, ConvertConfig, Plan, Replacement, Site
from ddf_convert.graph.planner import plan
from ddf_convert.graph.rewrite import Conversion, Replaced, convert, recorded

__all__ = [
    "Action",
    "Conversion",
    "ConvertConfig",
    "Plan",
    "Replaced",
    "Replacement",
    "Site",
    "convert",
    "plan",
    "recorded",
]
