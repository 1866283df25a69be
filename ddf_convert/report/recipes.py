"""Recipes, and what they started new layers from, as tables."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from rich.console import Group, RenderableType
from rich.table import Column
from rich.text import Text

from ddf_convert.recipes import Initialized, Recipe
from ddf_convert.report.tables import as_heading, new_table, right

_SHOWN = 20  # layers; the rest with --all


def initialized_table(done: Initialized, everything: bool = False) -> RenderableType:
    """What each new layer kept of its convolution.

    Args:
        done: What was done.
        everything: List every layer, however many there are.
    """
    if not done.layers:
        return Text("\nNew layers start random, as in the paper", style="bold")
    columns = [Column("name", overflow="fold", style="bold"), Column("kind"), right("weights")]
    fitted = done.method == "calibrate"
    columns += [right("outputs"), right("fitted")] if fitted else []
    shown = new_table(*columns)
    layers = done.layers if everything else done.layers[:_SHOWN]
    for layer in layers:
        errors = (layer.weight_error, layer.output_error, layer.fitted_error)[: 3 if fitted else 1]
        shown.add_row(layer.name, layer.kind, *map(_percent, errors))
    what = "Relative error: of the old weights"
    if fitted:
        what += f"; of the old outputs on {done.images} images, before the fit and after"
    parts: list[RenderableType] = [as_heading(f"{len(done.layers)} layers start from the old weights"), shown]
    if len(layers) < len(done.layers):
        parts.append(Text(f"... and {len(done.layers) - len(layers)} more (--all)", style="dim"))
    last = [
        error for layer in done.layers if (error := layer.fitted_error if fitted else layer.weight_error) is not None
    ]
    parts.append(Text(f"{what}. Median {_percent(median(last))}, largest {_percent(max(last))}.", style="dim"))
    return Group(*parts)


def recipes_table(recipes: Iterable[Recipe]) -> RenderableType:
    """Names, what they do, what they need."""
    shown = new_table(
        Column("recipe", style="bold", no_wrap=True), Column("starts from"), Column("trains"), Column("what for")
    )
    for recipe in recipes:
        lengths = [f"{s.epochs} epochs" if s.epochs else f"{s.steps} steps" for s in recipe.stages]
        labels = "" if not recipe.stages else ", labels" if recipe.needs_labels else ", no labels"
        trains = " + ".join(lengths) + labels if lengths else "-"
        shown.add_row(recipe.name, recipe.initialize_with.method, trains, recipe.description)
    return Group(shown, Text("`ddf-convert recipes show NAME` prints one, to copy and to change", style="dim"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"
