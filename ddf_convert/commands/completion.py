"""What the shell completes. Nothing heavy is imported: the user waits for the answer with a finger on the tab key."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\s+def (\w+)", re.MULTILINE)

# What is registered once torch is imported; tests compare both with the registries.
FILTERS = ("ddf", "spatial", "channel", "depthwise", "condconv", "dw-condconv", "dw-weightnet")
DDF_RESNETS = tuple(f"ddf_{combine}_resnet{depth}" for combine in ("add", "mul") for depth in (18, 50, 101, 152))


def timm_names(incomplete: str) -> list[str]:
    """The model names that begin so, read from timm's source: importing timm takes seconds. DDF-ResNets are among them.

    Folders are left to the shell.
    """
    package = importlib.util.find_spec("timm")
    folders = package.submodule_search_locations if package else None
    files = (file for folder in folders or () for file in Path(folder, "models").glob("*.py"))
    names = [name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))]
    return sorted(name for name in (*names, *DDF_RESNETS) if name.startswith(incomplete))


def recipe_names(incomplete: str) -> list[str]:
    """The built-in recipes whose names begin so."""
    files = Path(__file__).parents[1].joinpath("recipes", "builtin").glob("*.yaml")
    return sorted(file.stem for file in files if file.stem.startswith(incomplete))


def filter_names(incomplete: str) -> list[str]:
    """The built-in filters whose names begin so."""
    return [name for name in FILTERS if name.startswith(incomplete)]
