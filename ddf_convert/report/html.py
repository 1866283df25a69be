"""A comparison as one HTML page that needs no other file and no script: Jinja templates with inline SVG charts."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import timm
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ddf_convert.report import units
from ddf_convert.report.data import MEASURES, ComparisonData, Layer, Measure, count_kinds, count_layers, measured, noun
from ddf_convert.version import __version__

_MANY_ROWS = 40  # folded away behind a summary from here on
_OPTION = re.compile(r"--[\w-]+")

# Charts. The drawing stretches to the width of the screen or of the paper; the text around it is HTML and does not.
_HEIGHT = 100
_HEADROOM = 1.04
_WIDTHS, _LONG_WIDTHS = (0.9, 0.6), (1, 1)  # of the bars before and after; narrower ones fade where there are many
_MIN_PLACES = 8  # so that a small network's bars are not too wide
_MAX_DEPTH = 4  # names of modules that make up the name of a stage
_LONG = 100  # layers: from here on a chart takes the whole width of the page
# Widths in pixels: of a letter, and the smallest of a chart on a phone, of one beside another, and of one alone.
_LETTER, _PHONE, _HALF, _WHOLE = 6.8, 270, 420, 850


def page(comparison: ComparisonData) -> str:
    """Returns the page: totals, charts, every changed layer before and after, every other one with its reason."""
    changed, left_alone, layers = comparison.changed, comparison.left_alone, comparison.layers
    reasons = Counter(f"{layer.kind}: {layer.reason}" for layer in left_alone).most_common()
    known = measured(layers)
    return (
        _templates()
        .get_template("page.html.jinja")
        .render(
            comparison=comparison,
            all_measures=MEASURES,
            charts=[(measure.heading, _chart(layers, measure) if measure in known else None) for measure in MEASURES],
            long_charts=len(layers) > _LONG,
            changed=changed,
            left_alone=left_alone,
            others=comparison.others,
            shared_remarks=_shared_remarks(changed),
            # One scale for each column, so that bars can be compared down the page.
            widest={
                measure: max(measure.of(cost) or 0 for layer in changed for cost in (layer.before, layer.after))
                for measure in measured(changed)
            },
            frequent_reasons=reasons if len(left_alone) > _MANY_ROWS else None,
            made_by=f"ddf_convert {__version__}, torch {torch.__version__}, timm {timm.__version__}.",
        )
    )


def chart(layers: Sequence[Layer], measure: Measure) -> str:
    """Returns one measure of every layer as HTML with an inline SVG: for each layer a bar before and one after."""
    return _templates().get_template("chart.html.jinja").render(chart=_chart(layers, measure))


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("ddf_convert.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "unbroken_options": _unbroken_options}
    environment.globals |= {
        "change": lambda before, after: units.change(before, after).replace("-", "\N{MINUS SIGN}"),
        "count_kinds": count_kinds,
        "measured": measured,
        "noun": noun,
        "remarks": _remarks,
        "units_note": units.NOTE,
    }
    return environment


def _breakable(path: str) -> Markup:
    """Lets a module's path break after a dot or an underscore, and nowhere else."""
    return escape(path).replace(".", Markup(".<wbr>")).replace("_", Markup("_<wbr>"))


def _unbroken_options(text: str) -> Markup:
    """Keeps the command line's options from breaking after their hyphens."""
    return Markup(_OPTION.sub(r'<span class="whole">\g<0></span>', str(escape(text))))


def _remarks(layer: Layer) -> dict[str, str]:
    """The reason without the kind that stands above it, and the caution; each with its style."""
    reason = layer.reason.removeprefix(f"{layer.becomes}: ").removeprefix(f"{layer.becomes} alone: ")
    remarks = {reason: "soft", layer.caution: "more"}
    return {text: style for text, style in remarks.items() if text}


def _shared_remarks(layers: Sequence[Layer]) -> list[str]:
    """Remarks that hold for all layers: the page shows them once."""
    return [text for text in _remarks(layers[0]) if all(text in _remarks(layer) for layer in layers)] if layers else []


# --- charts -----------------------------------------------------------------------------------------------------------


class _Tick(NamedTuple):
    height: float
    text: str


class _Bar(NamedTuple):
    style: str
    x: float
    width: float
    height: float


class _LayerBars(NamedTuple):
    title: str
    bars: list[_Bar]


class _Stage(NamedTuple):
    """Consecutive layers in one part of the network."""

    name: str
    start: int
    stop: int
    fits_phone: bool = False

    def fits(self, layer_pixels: float) -> bool:
        """Whether its name fits under its layers."""
        return (self.stop - self.start) * layer_pixels >= _LETTER * (len(self.name) + 1)


class _Chart(NamedTuple):
    label: str
    places: int
    height: int
    ticks: list[_Tick]
    layers: list[_LayerBars]
    stages: list[_Stage]


def _chart(layers: Sequence[Layer], measure: Measure) -> _Chart:
    values = (measure.of(cost) for layer in layers for cost in (layer.before, layer.after))
    greatest = max((value for value in values if value is not None), default=0)
    scale = _HEIGHT / (greatest * _HEADROOM) if greatest else 0
    places = max(len(layers), _MIN_PLACES)
    long = len(layers) > _LONG
    widths = _LONG_WIDTHS if long else _WIDTHS
    return _Chart(
        label=f"{measure.heading} of each of {count_layers(layers)}, before and after",
        places=places,
        height=_HEIGHT,
        ticks=[_Tick(scale * value, text) for value, text in measure.axis(greatest)],
        layers=[_layer_bars(place, layer, measure, scale, widths) for place, layer in enumerate(layers)],
        stages=_readable_stages(
            [layer.name for layer in layers], _PHONE / places, (_WHOLE if long else _HALF) / places
        ),
    )


def _layer_bars(place: int, layer: Layer, measure: Measure, scale: float, widths: tuple[float, float]) -> _LayerBars:
    """The smaller bar stands in front of the greater one, so that the difference shows."""
    before, after = measure.of(layer.before), measure.of(layer.after)
    numbers = [measure.short(value) for value in (before, after) if value is not None]
    grew = layer.grew(measure)
    styled = [("before", before or 0, widths[0]), ("grown" if grew else "after", after or 0, widths[1])]
    bars = [
        _Bar(style, place + (1 - width) / 2, width, scale * value)
        for style, value, width in (reversed(styled) if grew else styled)
        if value
    ]
    return _LayerBars(f"{layer.name}: {' → '.join(numbers)}", bars)


def _readable_stages(names: Sequence[str], phone_pixels: float, screen_pixels: float) -> list[_Stage]:
    """The stages whose names can be read, at the depth of the module tree that leaves most of them.

    Args:
        names: Paths of the layers.
        phone_pixels: Width of one layer on a phone.
        screen_pixels: Width of one layer on a screen.
    """

    def readable(stages: list[_Stage]) -> tuple[int, int]:
        return sum(stage.fits(phone_pixels) for stage in stages), sum(stage.fits(screen_pixels) for stage in stages)

    best = max((_stages(names, depth) for depth in range(1, _MAX_DEPTH + 1)), key=readable)
    return [stage._replace(fits_phone=stage.fits(phone_pixels)) for stage in best if stage.fits(screen_pixels)]


def _stages(names: Sequence[str], depth: int) -> list[_Stage]:
    """The parts of the network at one depth of its module tree, without what all their names begin with."""
    stages, start = [], 0
    for part, run in groupby(tuple(name.split(".")[:depth]) for name in names):
        stop = start + len(list(run))
        stages.append((part, start, stop))
        start = stop
    parts = [part for part, _, _ in stages]
    common = 0
    while len(parts) > 1 and all(len(part) > common + 1 and part[common] == parts[0][common] for part in parts):
        common += 1
    return [_Stage(".".join(part[common:]), start, stop) for part, start, stop in stages]
