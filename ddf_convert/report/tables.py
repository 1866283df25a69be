"""A plan as tables for a terminal of 80 columns or more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ddf_convert.accounting import Cost
from ddf_convert.doctor import Check, State
from ddf_convert.graph.plan import Plan, Site
from ddf_convert.report import units
from ddf_convert.report.groups import becomes, counted, left_alone, others

# How the planner ends a reason that one option overrules, in the words of the Python interface.
_HINT = re.compile(r" \((\w+)=True replaces it\)$")


def plan_tables(plan: Plan, model: str | None = None, everything: bool = False) -> RenderableType:
    """The whole plan: totals, the convolutions replaced, those left alone with the reason, and the rest counted.

    Args:
        plan: The plan.
        model: What to call the model; the plan's own words if None.
        everything: List the rest one by one too.
    """
    parts: list[RenderableType] = [summary(plan, model), Text(f"\n{units.NOTE}", style="dim")]
    replaced, skipped, rest = plan.replaced, left_alone(plan), others(plan)
    if replaced:
        parts += [_heading(replaced, "replaced"), _replaced(replaced), *_reasons(replaced)]
    if skipped:
        parts += [_heading(skipped, "left alone"), _left_alone(skipped), *_flags(skipped)]
    if rest:
        heading = _heading(rest, "left alone", other=bool(replaced or skipped))
        parts += (
            [heading, _left_alone(rest)] if everything else [heading.append(f": {counted(rest)}", style="not bold")]
        )
    return Group(*parts)


def summary(plan: Plan, model: str | None = None) -> RenderableType:
    """Parameters, MACs and activations of the whole model, before and after."""
    sizes = "x".join(map(str, plan.input_size))
    done = f"{len(plan.replaced)} of {_number(plan.sites)} replaced" if plan.sites else "no convolutions"
    heading = Text.assemble((model or plan.model, "bold"), f", one {sizes} input: {done}")
    return Group(heading, Text(), totals(plan.before, plan.after))


def totals(before: Cost, after: Cost) -> Table:
    """Two costs and the change between them."""
    table = _table(Column("", no_wrap=True), *(_right(name) for name in ("before", "after", "change")))

    def row(name: str, old: int, new: int, old_text: str, new_text: str) -> None:
        style = "green" if new < old else "yellow" if new > old else ""
        table.add_row(name, old_text, new_text, Text(units.change(old, new), style=style))

    for name, old, new in (("parameters", before.params, after.params), ("MACs", before.macs, after.macs)):
        row(name, old, new, units.count(old), units.count(new, old))
    old, new = before.activation_bytes, after.activation_bytes
    row("activations", old, new, units.size(old), units.size(new))
    return table


def _replaced(sites: list[Site]) -> Table:
    table = _table(
        Column("name", overflow="fold", style="bold"),
        Column("becomes"),
        _right("parameters"),
        _right("MACs"),
    )
    for site in sites:
        old, new = site.before, site.after
        table.add_row(
            _called(site),
            becomes(site),
            f"{units.short(old.params)} -> {units.short(new.params)}",
            f"{units.short(old.macs)} -> {units.short(new.macs)}",
        )
    return table


def _reasons(sites: list[Site]) -> Iterable[Text]:
    """Each reason once: most replaced convolutions have the same."""
    for reason, number in Counter(site.reason for site in sites).most_common():
        yield Text(f"{reason} ({number})", style="dim")


def _left_alone(sites: list[Site]) -> Table:
    table = _table(Column("name", overflow="fold", style="bold", max_width=32), Column("kind"), Column("reason"))
    for site in sites:
        table.add_row(_called(site), site.kind, Text(_HINT.sub("", site.reason)))
    return table


def _flags(sites: list[Site]) -> Iterable[Text]:
    """The options that would replace some of the convolutions, each once, as the command line spells them."""
    hints = Counter(found[1] for site in sites if (found := _HINT.search(site.reason)))
    if hints:
        flags = ", ".join(f"--{option.replace('_', '-')} ({number})" for option, number in hints.most_common())
        yield Text(f"To replace these too: {flags}", style="dim")


def _called(site: Site) -> Text:
    return Text(site.name if site.calls < 2 else f"{site.name} (called {site.calls} times)")


def _heading(sites: list[Site], what: str, other: bool = False) -> Text:
    return Text(f"\n{_number(sites, other)} {what}", style="bold")


def _number(sites: list[Site], other: bool = False) -> str:
    noun = "convolution" if len(sites) == 1 else "convolutions"
    return f"{len(sites)} {'other ' if other else ''}{noun}"


def _right(name: str) -> Column:
    return Column(name, justify="right", no_wrap=True)


def _table(*columns: Column) -> Table:
    return Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False, header_style="dim")


def checks_table(checks: Iterable[Check]) -> Table:
    """What the doctor found."""
    table = _table(Column("", no_wrap=True), Column("", style="bold", no_wrap=True), Column("", overflow="fold"))
    table.show_header = False
    signs = {State.OK: ("ok", "green"), State.NOTE: ("note", "yellow"), State.PROBLEM: ("PROBLEM", "bold red")}
    for check in checks:
        table.add_row(Text(*signs[check.state]), check.name, Text(check.detail))
    return table
