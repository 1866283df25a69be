"""Recipes: how to convert a model, what its new layers start from, and how it is fine-tuned."""

from ddf_convert.recipes.files import load, names, parse, source
from ddf_convert.recipes.initialize import Initialized
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.recipes.schema import Stage

Initialised = Initialized  # the name in earlier versions

__all__ = ["Initialized", "Recipe", "Stage", "load", "names", "parse", "source"]
