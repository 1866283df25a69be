"""From a model to its converted self: trace it, find the convolutions, plan, rewrite."""

from ddf_convert.conversion.convert import Conversion, convert, recorded
from ddf_convert.conversion.plan import Action, ConvertConfig, FoundBy, Plan, Replacement, Site
from ddf_convert.conversion.planner import plan
from ddf_convert.conversion.registry import Filter, list_filters, register_filter
from ddf_convert.conversion.rewriter import Replaced

__all__ = [
    "Action",
    "Conversion",
    "ConvertConfig",
    "Filter",
    "FoundBy",
    "Plan",
    "Replaced",
    "Replacement",
    "Site",
    "convert",
    "list_filters",
    "plan",
    "recorded",
    "register_filter",
]
