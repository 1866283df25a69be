"""Conversion of models: record a run, trace it, find the candidates, plan, rewrite."""

from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.conversion.convert import convert
from ddf_convert.conversion.plan import Action, FoundBy, Operation, Plan, Replacement, Site
from ddf_convert.conversion.planner import plan
from ddf_convert.conversion.record import AppliedReplacement, Conversion, recorded
from ddf_convert.conversion.registry import LayerType, list_filters, register_filter

__all__ = [
    "Action",
    "AppliedReplacement",
    "Conversion",
    "ConvertConfig",
    "FoundBy",
    "LayerType",
    "Operation",
    "Plan",
    "Replacement",
    "Site",
    "convert",
    "list_filters",
    "plan",
    "recorded",
    "register_filter",
]
