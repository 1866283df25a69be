"""Replaces 3x3 convolutions of PyTorch vision models with Decoupled Dynamic Filters (Zhou et al., CVPR 2021)."""

import os

from ddf_convert.errors import ArtifactError, DDFError, UsageError
from ddf_convert.version import __version__

# The shell's completion (for which typer sets this variable) needs the command line alone, and cannot wait for torch.
if "_DDF_CONVERT_COMPLETE" not in os.environ:
    from ddf_convert import models, recipes
    from ddf_convert.artifacts.artifact import load, restore, save
    from ddf_convert.conversion import (
        Action,
        Conversion,
        ConvertConfig,
        FoundBy,
        Plan,
        Replacement,
        Site,
        convert,
        list_filters,
        plan,
        register_filter,
    )
    from ddf_convert.conversion import (
        LayerType as Filter,
    )
    from ddf_convert.cost.count import Cost, count_parameters, measure
    from ddf_convert.report import Comparison, compare

__all__ = [
    "Action",
    "ArtifactError",
    "Comparison",
    "Conversion",
    "ConvertConfig",
    "Cost",
    "DDFError",
    "Filter",
    "FoundBy",
    "Plan",
    "Replacement",
    "Site",
    "UsageError",
    "__version__",
    "compare",
    "convert",
    "count_parameters",
    "layers",
    "list_filters",
    "load",
    "measure",
    "models",
    "ops",
    "plan",
    "recipes",
    "register_filter",
    "restore",
    "save",
]
