"""A plan as one HTML page that needs nothing beside itself: no script, no font, no image from elsewhere."""

from __future__ import annotations

from html import escape
from importlib import resources

import timm
import torch

from ddf_convert.accounting import Cost
from ddf_convert.graph.plan import Plan, Site
from ddf_convert.report import units
from ddf_convert.report.groups import becomes, counted, left_alone, others
from ddf_convert.version import __version__

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def page(plan: Plan, model: str | None = None) -> str:
    """The page: totals, every replaced convolution before and after, every other one with the reason.

    Args:
        plan: The plan.
        model: What to call the model; the plan's own words if None.
    """
    name = model or plan.model
    body = "\n".join((_head(plan, name), _cards(plan), _replaced(plan), _left_alone(plan), _others(plan)))
    style = resources.files("ddf_convert.report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{name}: decoupled dynamic filters"
    return _PAGE.format(title=escape(title), style=style, body=body, footer=_footer(plan))


def _head(plan: Plan, name: str) -> str:
    sizes = "&thinsp;&times;&thinsp;".join(map(str, plan.input_size))
    return (
        f"<h1>{escape(name)} with decoupled dynamic filters</h1>\n"
        f'<p class="soft">{len(plan.replaced)} of {len(plan.sites)} convolutions replaced.'
        f' All numbers are for one <span class="size">{sizes}</span> input.</p>'
    )


def _cards(plan: Plan) -> str:
    before, after = plan.before, plan.after
    cards = (
        _card(
            "Parameters",
            before.params,
            after.params,
            units.count(before.params),
            units.count(after.params, before.params),
        ),
        _card("MACs", before.macs, after.macs, units.count(before.macs), units.count(after.macs, before.macs)),
        _card(
            "Activations",
            before.activation_bytes,
            after.activation_bytes,
            units.size(before.activation_bytes),
            units.size(after.activation_bytes),
        ),
    )
    return f'<div class="cards">{"".join(cards)}</div>\n<p class="soft">{units.NOTE}</p>'


def _card(heading: str, before: int, after: int, old: str, new: str) -> str:
    direction = "less" if after < before else "more" if after > before else "soft"
    return (
        f'<div class="card"><h3>{heading}</h3>'
        f'<div class="value"><span class="old">{old} &rarr;</span> {new}</div>'
        f'<div class="{direction}">{_change(before, after)}</div>{_bars(before, after, max(before, after))}</div>'
    )


def _replaced(plan: Plan) -> str:
    sites = plan.replaced
    if not sites:
        return "<h2>No convolution is replaced</h2>"
    # One scale for each column, so that the bars can be compared down the page.
    widest = Cost(
        params=max(max(site.before.params, site.after.params) for site in sites),
        macs=max(max(site.before.macs, site.after.macs) for site in sites),
    )
    rows = "\n".join(
        f"<tr><td>{_named(site)}</td>"
        f'<td><strong>{becomes(site)}</strong><br><span class="soft">{escape(_why(site))}</span></td>'
        f"{_cost('Parameters', site.before.params, site.after.params, widest.params)}"
        f"{_cost('MACs', site.before.macs, site.after.macs, widest.macs)}</tr>"
        for site in sites
    )
    key = (
        '<p class="soft key"><span style="background:var(--before)"></span>before'
        '<span class="second" style="background:var(--after)"></span>after</p>'
    )
    return f"<h2>Replaced: {len(sites)}</h2>{key}\n" + _table(("Convolution", "Becomes", "Parameters", "MACs"), rows)


def _why(site: Site) -> str:
    """The reason without what stands above it already."""
    return site.reason.removeprefix(f"{becomes(site)}: ").removeprefix("DDF alone: ")


def _left_alone(plan: Plan) -> str:
    sites = left_alone(plan)
    return f"<h2>Left alone: {len(sites)}</h2>\n{_reasons(sites)}" if sites else ""


def _others(plan: Plan) -> str:
    sites = others(plan)
    if not sites:
        return ""
    return (
        f"<details><summary>Other convolutions left alone: {len(sites)} ({escape(counted(sites))})</summary>\n"
        f"{_reasons(sites)}</details>"
    )


def _reasons(sites: list[Site]) -> str:
    rows = "\n".join(
        f'<tr><td>{_named(site)}</td><td class="kind">{escape(site.kind)}</td><td>{escape(site.reason)}</td>'
        f'<td class="number" data-head="Parameters">{units.short(site.before.params)}</td>'
        f'<td class="number" data-head="MACs">{units.short(site.before.macs)}</td></tr>'
        for site in sites
    )
    return _table(("Convolution", "Kind", "Why", "Parameters", "MACs"), rows)


def _table(heads: tuple[str, ...], rows: str) -> str:
    cells = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _named(site: Site) -> str:
    calls = f' <span class="soft">called {site.calls} times</span>' if site.calls > 1 else ""
    # A path may be broken after a dot or an underscore, and nowhere else.
    name = escape(site.name).replace(".", ".<wbr>").replace("_", "_<wbr>")
    return f"<code>{name}</code>{calls}"


def _cost(head: str, before: int, after: int, widest: int) -> str:
    numbers = f"{units.short(before)} &rarr; {units.short(after)}"
    return f'<td class="cost" data-head="{head}">{numbers}{_bars(before, after, widest)}</td>'


def _bars(before: int, after: int, widest: int) -> str:
    return "".join(
        f'<div class="bar {name}" style="width:{100 * value / max(widest, 1):.1f}%"></div>'
        for name, value in (("before", before), ("after", after))
    )


def _change(before: int, after: int) -> str:
    return "no change" if before == after else units.change(before, after).replace("-", "&minus;")


def _footer(plan: Plan) -> str:
    options = ", ".join(f"{name} {value}" for name, value in plan.config.model_dump(mode="json").items())
    return (
        f"ddf_convert {__version__}, torch {escape(torch.__version__)}, timm {escape(timm.__version__)}."
        f" Options: {escape(options)}."
    )
