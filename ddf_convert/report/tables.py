"""Comparisons, recipes and what recipes started from, as tables for a terminal of 80 columns or more."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import median
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ddf_convert.conversion.plan import override_hint
from ddf_convert.report import units
from ddf_convert.report.data import (
    LATENCY,
    MACS,
    MEASURES,
    PARAMETERS,
    ComparisonData,
    Layer,
    Measure,
    count_kinds,
    count_layers,
    measured,
)

if TYPE_CHECKING:
    from ddf_convert.recipes import Initialized, Recipe

_COLUMNS = 80
_MAX_INITIALIZED = 20  # layers that are listed; the rest with --all


# --- comparisons ------------------------------------------------------------------------------------------------------


def tables(comparison: ComparisonData, everything: bool = False) -> RenderableType:
    """Returns totals, the replaced convolutions, those left alone with the reason, and the rest counted.

    Args:
        comparison: The comparison.
        everything: List the rest one by one too.
    """
    changed, left_alone, others = comparison.changed, comparison.left_alone, comparison.others
    parts: list[RenderableType] = [_headline(comparison), Text(), _totals(comparison), Text(), *_notes(comparison)]
    if changed:
        parts.append(_layers_heading(changed, comparison.verb))
        parts += [_cost_table(changed, "becomes", lambda layer: layer.becomes), *_reasons(changed)]
    for side, layers in (("before", comparison.only_before), ("after", comparison.only_after)):
        if layers:
            parts += [_layers_heading(layers, f"only {side}"), _cost_table(layers, "kind", lambda layer: layer.kind)]
    if left_alone:
        parts += [_layers_heading(left_alone, "left alone"), _reason_table(left_alone), *_overriding_flags(left_alone)]
    if others:
        heading = _layers_heading(others, "left alone", other=bool(changed or left_alone))
        if everything:
            parts += [heading, _reason_table(others)]
        else:
            parts.append(heading.append(f": {count_kinds(others)}", style="not bold"))
    return Group(*parts)


def as_text(comparison: ComparisonData) -> str:
    """Returns the tables as text without colors, 80 columns wide."""
    console = Console(file=io.StringIO(), width=_COLUMNS, color_system=None)
    with console.capture() as capture:
        console.print(tables(comparison))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _headline(comparison: ComparisonData) -> Text:
    sizes = "x".join(map(str, comparison.input_size))
    return Text.assemble((comparison.model, "bold"), f", one {sizes} input: {comparison.headline}")


def _totals(comparison: ComparisonData) -> Table:
    table = new_table(Column("", no_wrap=True), *(numeric_column(name) for name in ("before", "after", "change")))
    for measure in MEASURES:
        old, new = measure.of(comparison.before), measure.of(comparison.after)
        if old is None or new is None:
            table.add_row(measure.name, "-", "-", Text("not measured", style="dim"))
            continue
        change = Text(units.change(old, new), style="green" if new < old else "yellow" if new > old else "")
        table.add_row(measure.name, measure.total(old, 0), measure.total(new, old), change)
    return table


def _notes(comparison: ComparisonData) -> Iterable[Text]:
    yield Text(units.NOTE, style="dim")
    if comparison.machine:
        yield Text(f"Latency: median of one forward pass on {comparison.machine}.", style="dim")
    yield from (Text(note) for note in comparison.notes)
    if comparison.growth:
        yield Text(comparison.growth, style="yellow")


def _cost_table(layers: list[Layer], title: str, describe: Callable[[Layer], str]) -> Table:
    """The cost of each layer: before and after, or in the one model that has it."""
    measures = (PARAMETERS, MACS, LATENCY) if LATENCY in measured(layers) else (PARAMETERS, MACS)
    columns = ("ms" if measure is LATENCY else measure.name for measure in measures)
    table = new_table(Column("name", overflow="fold", style="bold"), Column(title), *map(numeric_column, columns))
    for layer in layers:
        table.add_row(_name(layer), describe(layer), *(_change(layer, measure) for measure in measures))
    return table


def _change(layer: Layer, measure: Measure) -> Text:
    write = units.figure if measure is LATENCY else measure.short
    values = (measure.of(cost) for cost in (layer.before, layer.after) if cost)
    numbers = ("-" if value is None else write(value) for value in values)
    return Text(" -> ".join(numbers), style="yellow" if layer.grew(measure) else "")


def _reasons(layers: list[Layer]) -> Iterable[Text]:
    """Each reason once: most replaced convolutions have the same."""
    for reason, number in Counter(layer.reason for layer in layers if layer.reason).most_common():
        yield Text(f"{reason} ({number})", style="dim")
    for caution, number in Counter(layer.caution for layer in layers if layer.caution).most_common():
        yield Text(f"{caution} ({number})", style="yellow")


def _reason_table(layers: list[Layer]) -> Table:
    table = new_table(Column("name", overflow="fold", style="bold", max_width=32), Column("kind"), Column("reason"))
    for layer in layers:
        table.add_row(_name(layer), layer.kind, Text(layer.reason.removesuffix(override_hint(layer.override))))
    return table


def _overriding_flags(layers: list[Layer]) -> Iterable[Text]:
    """The options that would replace some of the convolutions, as the command line spells them."""
    options = Counter(layer.override for layer in layers if layer.override)
    if options:
        flags = ", ".join(f"--{option.replace('_', '-')} ({number})" for option, number in options.most_common())
        yield Text(f"To replace these too: {flags}", style="dim")


def _name(layer: Layer) -> Text:
    return Text(layer.name if layer.calls < 2 else f"{layer.name} (called {layer.calls} times)")


def _layers_heading(layers: list[Layer], what: str, other: bool = False) -> Text:
    return table_heading(f"{count_layers(layers, other)} {what}")


# --- recipes ----------------------------------------------------------------------------------------------------------


def initialized_table(initialized: Initialized, everything: bool = False) -> RenderableType:
    """Returns a table of what each new layer kept of its convolution.

    Args:
        initialized: The result of a recipe's initialization.
        everything: List every layer, however many there are.
    """
    if not initialized.layers:
        return Text("\nNew layers start random, as in the paper", style="bold")
    fitted = initialized.method == "calibrate"
    columns = ["weights", "outputs", "fitted"] if fitted else ["weights"]
    table = new_table(Column("name", overflow="fold", style="bold"), Column("kind"), *map(numeric_column, columns))
    layers = initialized.layers if everything else initialized.layers[:_MAX_INITIALIZED]
    for layer in layers:
        errors = (layer.weight_error, layer.output_error, layer.fitted_error)[: len(columns)]
        table.add_row(layer.name, layer.kind, *map(_percent, errors))
    parts: list[RenderableType] = [
        table_heading(f"{len(initialized.layers)} layers start from the old weights"),
        table,
    ]
    if len(layers) < len(initialized.layers):
        parts.append(Text(f"... and {len(initialized.layers) - len(layers)} more (--all)", style="dim"))
    meaning = "Relative error: of the old weights"
    if fitted:
        meaning += f"; of the old outputs on {initialized.images} images, before the fit and after"
    last = [layer.fitted_error if fitted else layer.weight_error for layer in initialized.layers]
    known = [error for error in last if error is not None]
    summary = f"{meaning}. Median {_percent(median(known))}, largest {_percent(max(known))}."
    return Group(*parts, Text(summary, style="dim"))


def recipes_table(recipes: Iterable[Recipe]) -> RenderableType:
    """Returns a table of recipes: what each starts from, trains, and is for."""
    table = new_table(
        Column("recipe", style="bold", no_wrap=True), Column("starts from"), Column("trains"), Column("what for")
    )
    for recipe in recipes:
        lengths = [f"{s.epochs} epochs" if s.epochs else f"{s.steps} steps" for s in recipe.stages]
        labels = "" if not recipe.stages else ", labels" if recipe.needs_labels else ", no labels"
        trains = " + ".join(lengths) + labels if lengths else "-"
        table.add_row(recipe.name, recipe.initialize_with.method, trains, recipe.description)
    return Group(table, Text("`ddf-convert recipes show NAME` prints one, to copy and to change", style="dim"))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


# --- the style of all tables ------------------------------------------------------------------------------------------


def new_table(*columns: Column) -> Table:
    """Returns an empty table in the style of all tables."""
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="dim")


def numeric_column(name: str) -> Column:
    """Returns a column of numbers."""
    return Column(name, justify="right", no_wrap=True)


def table_heading(text: str) -> Text:
    """Returns the line above a table."""
    return Text(f"\n{text}", style="bold")
