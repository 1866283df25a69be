"""Recipes: how to convert a model, what its new layers start from, and how it is brought back."""

from ddf_convert.recipes.files import load, names, parse, source
from ddf_convert.recipes.initialise import Initialised
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.recipes.schema import Stage

__all__ = ["Initialised", "Recipe", "Stage", "load", "names", "parse", "source"]
