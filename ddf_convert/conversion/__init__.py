"""Conversion of models: record a run, trace it, find the candidates, plan, rewrite."""

import os

from ddf_convert.conversion.config import ConvertConfig

# The shell's completion (for which typer sets this variable) needs the options alone, and cannot wait for torch.
if "_DDF_CONVERT_COMPLETE" not in os.environ:
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
