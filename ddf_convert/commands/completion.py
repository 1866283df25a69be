"""What the shell completes. Nothing heavy is imported: the user waits for the answer with a finger on the tab key."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\s+def (\w+)", re.MULTILINE)
_QUOTED = re.compile(r'"([\w-]+)"')

# timm's registry has them once torch is imported; a test compares the two.
DDF_RESNETS = tuple(f"ddf_{combine}_resnet{depth}" for combine in ("add", "mul") for depth in (18, 50, 101, 152))


def timm_names(incomplete: str) -> list[str]:
    """Returns the model names with a prefix, DDF-ResNets among them; read from timm's source, which imports in seconds.

    Folders are left to the shell.
    """
    package = importlib.util.find_spec("timm")
    folders = package.submodule_search_locations if package else None
    files = (file for folder in folders or () for file in Path(folder, "models").glob("*.py"))
    names = [name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8"))]
    return sorted(name for name in (*names, *DDF_RESNETS) if name.startswith(incomplete))


def recipe_names(incomplete: str) -> list[str]:
    """Returns the built-in recipes with a prefix."""
    files = Path(__file__).parents[1].joinpath("recipes", "builtin").glob("*.yaml")
    return sorted(file.stem for file in files if file.stem.startswith(incomplete))


def filter_names(incomplete: str) -> list[str]:
    """Returns the built-in filters with a prefix: those that the description of ``ConvertConfig.filter`` quotes."""
    from ddf_convert.conversion.config import ConvertConfig

    names = _QUOTED.findall(ConvertConfig.model_fields["filter"].description or "")
    return [name for name in names if name.startswith(incomplete)]
