"""A comparison as tables for a terminal of 80 columns or more."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ddf_convert.report import groups, units
from ddf_convert.report.measures import LATENCY, MACS, MEASURES, PARAMETERS, Measure

if TYPE_CHECKING:
    from ddf_convert.report.comparison import Comparison, Layer

_COLUMNS = 80
# How the planner ends a reason that one option overrules, in the words of the Python interface.
_HINT = re.compile(r" \((\w+)=True replaces it\)$")


def tables(comparison: Comparison, everything: bool = False) -> RenderableType:
    """Totals, the convolutions replaced, those left alone with the reason, and the rest counted.

    Args:
        comparison: What to show.
        everything: List the rest one by one too.
    """
    changed, skipped, rest = groups.changed(comparison), groups.left_alone(comparison), groups.others(comparison)
    parts: list[RenderableType] = [_head(comparison), Text(), _totals(comparison), Text(), *_notes(comparison)]
    if changed:
        parts += [_heading(changed, groups.verb(comparison)), _costs(changed, "becomes", groups.becomes)]
        parts += _reasons(changed)
    for where, layers in (("before", groups.only_before(comparison)), ("after", groups.only_after(comparison))):
        if layers:
            parts += [_heading(layers, f"only {where}"), _costs(layers, "kind", lambda layer: layer.kind)]
    if skipped:
        parts += [_heading(skipped, "left alone"), _left_alone(skipped), *_flags(skipped)]
    if rest:
        heading = _heading(rest, "left alone", other=bool(changed or skipped))
        parts += (
            [heading, _left_alone(rest)]
            if everything
            else [heading.append(f": {groups.counted(rest)}", style="not bold")]
        )
    return Group(*parts)


def as_text(comparison: Comparison) -> str:
    """The tables without colors."""
    console = Console(file=io.StringIO(), width=_COLUMNS, color_system=None)
    with console.capture() as capture:
        console.print(tables(comparison))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _head(comparison: Comparison) -> Text:
    sizes = "x".join(map(str, comparison.input_size))
    return Text.assemble((comparison.model, "bold"), f", one {sizes} input: {groups.headline(comparison)}")


def _totals(comparison: Comparison) -> Table:
    """The whole model, and the change."""
    table = new_table(Column("", no_wrap=True), *(right(name) for name in ("before", "after", "change")))
    for measure in MEASURES:
        old, new = measure.of(comparison.before), measure.of(comparison.after)
        if old is None or new is None:
            table.add_row(measure.name, "-", "-", Text("not measured", style="dim"))
            continue
        change = Text(units.change(old, new), style="green" if new < old else "yellow" if new > old else "")
        table.add_row(measure.name, measure.total(old, 0), measure.total(new, old), change)
    return table


def _notes(comparison: Comparison) -> Iterable[Text]:
    yield Text(units.NOTE, style="dim")
    if comparison.machine:
        yield Text(f"Latency: median of one forward pass on {comparison.machine}.", style="dim")
    yield from (Text(note) for note in comparison.notes)
    if grown := groups.grown(comparison):
        yield Text(grown, style="yellow")


def _costs(layers: list[Layer], title: str, words: Callable[[Layer], str]) -> Table:
    """What each is, and what it costs: before and after, where it is in both."""
    timed = any(LATENCY.of(cost) is not None for layer in layers for cost in (layer.before, layer.after))
    shown = (PARAMETERS, MACS, LATENCY) if timed else (PARAMETERS, MACS)
    columns = ("ms" if measure is LATENCY else measure.name for measure in shown)
    table = new_table(Column("name", overflow="fold", style="bold"), Column(title), *map(right, columns))
    for layer in layers:
        table.add_row(_called(layer), words(layer), *(_change(layer, measure) for measure in shown))
    return table


def _change(layer: Layer, measure: Measure) -> Text:
    written = units.figure if measure is LATENCY else measure.short
    costs = (measure.of(cost) for cost in (layer.before, layer.after) if cost)
    numbers = ("-" if cost is None else written(cost) for cost in costs)
    return Text(" -> ".join(numbers), style="yellow" if groups.grew(layer, measure) else "")


def _reasons(layers: list[Layer]) -> Iterable[Text]:
    """Each reason once: most replaced convolutions have the same."""
    for reason, number in Counter(layer.reason for layer in layers if layer.reason).most_common():
        yield Text(f"{reason} ({number})", style="dim")
    for caution, number in Counter(layer.caution for layer in layers if layer.caution).most_common():
        yield Text(f"{caution} ({number})", style="yellow")


def _left_alone(layers: list[Layer]) -> Table:
    table = new_table(Column("name", overflow="fold", style="bold", max_width=32), Column("kind"), Column("reason"))
    for layer in layers:
        table.add_row(_called(layer), layer.kind, Text(_HINT.sub("", layer.reason)))
    return table


def _flags(layers: list[Layer]) -> Iterable[Text]:
    """The options that would replace some of the convolutions, each once, as the command line spells them."""
    hints = Counter(found[1] for layer in layers if (found := _HINT.search(layer.reason)))
    if hints:
        flags = ", ".join(f"--{option.replace('_', '-')} ({number})" for option, number in hints.most_common())
        yield Text(f"To replace these too: {flags}", style="dim")


def _called(layer: Layer) -> Text:
    return Text(layer.name if layer.calls < 2 else f"{layer.name} (called {layer.calls} times)")


def _heading(layers: list[Layer], what: str, other: bool = False) -> Text:
    return as_heading(f"{groups.number(layers, other)} {what}")


def as_heading(words: str) -> Text:
    """What stands above a table."""
    return Text(f"\n{words}", style="bold")


def right(name: str) -> Column:
    """A column of numbers."""
    return Column(name, justify="right", no_wrap=True)


def new_table(*columns: Column) -> Table:
    """An empty table in the style of all."""
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="dim")
