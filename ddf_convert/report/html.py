"""A comparison as one HTML page that needs nothing beside itself: no script, no font, no image from elsewhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

import timm
import torch

from ddf_convert.report import groups, units
from ddf_convert.report.chart import chart, is_long
from ddf_convert.report.measures import MEASURES, Measure
from ddf_convert.version import __version__

if TYPE_CHECKING:
    from ddf_convert.report.comparison import Comparison, Layer

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
_OPTION, _WHOLE = re.compile(r"--[\w-]+"), r'<span class="whole">\g<0></span>'  # not broken after its hyphens
_MANY = 40  # rows, that not everybody wants to scroll past
_KEY = (
    '<p class="soft key"><span><i class="before"></i>before</span><span><i class="after"></i>after</span>'
    '<span><i class="grown"></i>after, where it is greater</span></p>'
)


def page(comparison: Comparison) -> str:
    """The page: totals, charts, every replaced convolution before and after, every other one with the reason."""
    sections = (_head, _cards, _notes, _charts, _changed, _one_sided, _left_alone, _others)
    body = "\n".join(part for section in sections if (part := section(comparison)))
    style = resources.files("ddf_convert.report").joinpath("page.css").read_text(encoding="utf-8")
    title = f"{comparison.model}: decoupled dynamic filters"
    return _PAGE.format(title=escape(title), style=style, body=body, footer=_footer(comparison))


def _head(comparison: Comparison) -> str:
    replaced = groups.changed(comparison) and groups.verb(comparison) == "replaced"
    ddf = " with decoupled dynamic filters" if replaced else ""
    sizes = "&thinsp;&times;&thinsp;".join(map(str, comparison.input_size))
    return (
        f"<h1>{escape(comparison.model)}{ddf}</h1>\n"
        f'<p class="soft">{groups.headline(comparison)}.'
        f' All numbers are for one <span class="whole">{sizes}</span> input.</p>'
    )


def _cards(comparison: Comparison) -> str:
    cards = (_card(measure, measure.of(comparison.before), measure.of(comparison.after)) for measure in MEASURES)
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(measure: Measure, before: float | None, after: float | None) -> str:
    if before is None or after is None:
        value = '<div class="value soft">not measured</div>'
    elif before == after:
        value = f'<div class="value">{measure.total(after, 0)}</div><div class="soft">no change</div>'
    else:
        direction = "less" if after < before else "more"
        change = units.change(before, after).replace("-", "&minus;")
        value = (
            f'<div class="value"><span class="whole">{measure.total(after, before)}</span>'
            f' <span class="change whole {direction}">{change}</span></div>'
            f'<div class="soft">from {measure.total(before, 0)}</div>{_bars(before, after, max(before, after))}'
        )
    return f'<div class="card"><h3>{measure.heading}</h3>{value}</div>'


def _notes(comparison: Comparison) -> str:
    grown = groups.grown(comparison)
    machine = f" Latency is the median of one forward pass on {comparison.machine}." if comparison.machine else ""
    notes = "".join(f"<li>{_OPTION.sub(_WHOLE, escape(note))}</li>" for note in comparison.notes)
    parts = (
        f'<p class="more">{escape(grown)}</p>' if grown else "",
        f'<ul class="notes">{notes}</ul>' if notes else "",
        f'<p class="soft">{units.NOTE}{escape(machine)}</p>',
    )
    return "\n".join(part for part in parts if part)


def _charts(comparison: Comparison) -> str:
    if not comparison.layers:
        return ""
    charts = "\n".join(_chart(measure, comparison.layers) for measure in MEASURES)
    what = groups.noun(comparison.layers)
    long = " long" if is_long(comparison.layers) else ""
    return (
        f'<h2>Along the depth</h2>\n<p class="soft">Every {what}, in the order of the forward pass.</p>{_KEY}\n'
        f'<div class="charts{long}">\n{charts}\n</div>'
    )


def _chart(measure: Measure, layers: Sequence[Layer]) -> str:
    drawn = '<p class="soft">not measured: fewer MACs are not by themselves faster</p>'
    if _known(measure, layers):
        drawn = chart(layers, measure)
    return f'<figure class="chart"><figcaption>{measure.heading}</figcaption>\n{drawn}</figure>'


def _changed(comparison: Comparison) -> str:
    layers = groups.changed(comparison)
    if not layers:
        return f"<h2>No {groups.noun(comparison.layers)} is replaced</h2>"
    shown = [measure for measure in MEASURES if _known(measure, layers)]
    # One scale for each column, so that the bars can be compared down the page.
    widest = {
        measure: max(measure.of(cost) or 0 for layer in layers for cost in (layer.before, layer.after))
        for measure in shown
    }
    shared = set.intersection(*(set(_words(layer)) for layer in layers))
    above = "".join(f'<p class="soft">{escape(text)}</p>' for text in _words(layers[0]) if text in shared)
    rows = "\n".join(
        f"<tr><td>{_named(layer)}</td>"
        f"<td><strong>{escape(groups.becomes(layer))}</strong>{_why(layer, shared)}</td>"
        f"{''.join(_cost(layer, measure, widest[measure]) for measure in shown)}</tr>"
        for layer in layers
    )
    heads = (groups.noun(layers).capitalize(), "Becomes", *(measure.heading for measure in shown))
    return f"<h2>{groups.verb(comparison).capitalize()}: {len(layers)}</h2>{above}{_KEY}\n{_table(heads, rows)}"


def _words(layer: Layer) -> dict[str, str]:
    """The reason without what stands above it already, and what is to be kept in mind; each with its style."""
    reason = layer.reason.removeprefix(f"{groups.becomes(layer)}: ").removeprefix(f"{groups.becomes(layer)} alone: ")
    words = {reason: "soft", layer.caution: "more"}
    return {text: style for text, style in words.items() if text}


def _why(layer: Layer, shared: set[str]) -> str:
    """What is to be said of this layer and not of all."""
    words = _words(layer).items()
    return "".join(f'<br><span class="{style}">{escape(text)}</span>' for text, style in words if text not in shared)


def _one_sided(comparison: Comparison) -> str:
    sides = (("before", groups.only_before(comparison)), ("after", groups.only_after(comparison)))
    return "\n".join(f"<h2>Only {where}: {len(layers)}</h2>\n{_plain(layers)}" for where, layers in sides if layers)


def _left_alone(comparison: Comparison) -> str:
    layers = groups.left_alone(comparison)
    if not layers:
        return ""
    table = _plain(layers)
    if len(layers) > _MANY:
        reasons = Counter(f"{layer.kind}: {layer.reason}" for layer in layers).most_common()
        items = "".join(f"<li>{number} {escape(reason)}</li>" for reason, number in reasons)
        table = f'<ul class="notes">{items}</ul>\n<details><summary>One by one</summary>\n{table}</details>'
    return f"<h2>Left alone: {len(layers)}</h2>\n{table}"


def _others(comparison: Comparison) -> str:
    layers = groups.others(comparison)
    if not layers:
        return ""
    words = f"Other {groups.noun(layers)}s left alone: {len(layers)} ({escape(groups.counted(layers))})"
    return f"<details><summary>{words}</summary>\n{_plain(layers)}</details>"


def _plain(layers: list[Layer]) -> str:
    """Layers that cost the same before and after, or that only one of the models has."""
    shown = [measure for measure in MEASURES if _known(measure, layers)]
    why = any(layer.reason for layer in layers)
    rows = "\n".join(
        f'<tr><td>{_named(layer)}</td><td class="kind">{escape(layer.kind)}</td>'
        f"{f'<td>{escape(layer.reason)}</td>' if why else ''}"
        f"{''.join(_number(layer, measure) for measure in shown)}</tr>"
        for layer in layers
    )
    heads = (groups.noun(layers).capitalize(), "Kind", *(["Why"] if why else []))
    return _table((*heads, *(measure.heading for measure in shown)), rows)


def _known(measure: Measure, layers: Sequence[Layer]) -> bool:
    return any(measure.of(cost) is not None for layer in layers for cost in (layer.before, layer.after))


def _table(heads: Iterable[str], rows: str) -> str:
    cells = "".join(f"<th>{head}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _named(layer: Layer) -> str:
    calls = f' <span class="soft">called {layer.calls} times</span>' if layer.calls > 1 else ""
    # A path may be broken after a dot or an underscore, and nowhere else.
    name = escape(layer.name).replace(".", ".<wbr>").replace("_", "_<wbr>")
    return f"<code>{name}</code>{calls}"


def _cost(layer: Layer, measure: Measure, widest: float) -> str:
    before, after = measure.of(layer.before), measure.of(layer.after)
    if before is None or after is None:
        return f'<td class="cost soft" data-head="{measure.heading}">not measured</td>'
    new = measure.short(after)
    shown = f'<span class="more">{new}</span>' if groups.grew(layer, measure) else new
    return (
        f'<td class="cost" data-head="{measure.heading}"><span>{measure.short(before)} &rarr;</span>'
        f" <span>{shown}</span>{_bars(before, after, widest)}</td>"
    )


def _number(layer: Layer, measure: Measure) -> str:
    number = measure.of(layer.before or layer.after)
    return f'<td class="number" data-head="{measure.heading}">{"" if number is None else measure.short(number)}</td>'


def _bars(before: float, after: float, widest: float) -> str:
    return "".join(
        f'<div class="bar {name}" style="width:{100 * value / (widest or 1):.1f}%"></div>'
        for name, value in (("before", before), ("grown" if after > before else "after", after))
    )


def _footer(comparison: Comparison) -> str:
    made_by = f"ddf_convert {__version__}, torch {escape(torch.__version__)}, timm {escape(timm.__version__)}."
    options = (
        ", ".join(f"{name} {value}" for name, value in config.model_dump(mode="json").items())
        for config in comparison.configs
    )
    return made_by + "".join(f" Options: {escape(words)}." for words in options)
