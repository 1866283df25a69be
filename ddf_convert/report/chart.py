"""Charts of a network along its depth, as inline SVG: a bar for each layer, before and after.

The drawing is stretched to whatever width there is, on a phone or on paper. Text is not part of it but stands around
it as HTML, so that it keeps its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from ddf_convert.report.groups import grew, number
from ddf_convert.report.measures import Measure

if TYPE_CHECKING:
    from ddf_convert.report.comparison import Layer

_HEIGHT = 100
_HEADROOM = 1.04
_WIDTHS, _LONG_WIDTHS = (0.9, 0.6), (1, 1)  # of the bars before and after; narrower ones fade where there are many
_FEWEST_PLACES = 8  # so that the bars of a small network are no walls
_DEEPEST = 4  # names of modules that make up the name of a stage
_LONG = 100  # layers: from here on a chart takes the whole width of the page
# Widths in pixels: of a letter, and of the least that a chart gets on a phone, beside another, and alone.
_LETTER, _PHONE, _HALF, _WHOLE = 6.8, 270, 420, 850


def is_long(layers: Sequence[Layer]) -> bool:
    """Whether the chart of so many layers wants the whole width."""
    return len(layers) > _LONG


def chart(layers: Sequence[Layer], measure: Measure) -> str:
    """One measure of every layer, in their order."""
    pairs = [(measure.of(layer.before), measure.of(layer.after)) for layer in layers]
    greatest = max((value for pair in pairs for value in pair if value is not None), default=0)
    long = is_long(layers)
    places = max(len(layers), _FEWEST_PLACES)
    scale = _HEIGHT / (greatest * _HEADROOM) if greatest else 0
    ticks = measure.axis(greatest)
    stages = _readable_stages([layer.name for layer in layers], _PHONE / places, (_WHOLE if long else _HALF) / places)
    lines = [f"M0 {_HEIGHT - scale * value:.2f}H{places}" for value, _ in ticks]
    lines += [f"M{stage.start} 0V{_HEIGHT}" for stage in stages if stage.start]
    widths = _LONG_WIDTHS if long else _WIDTHS
    bars = "\n".join(_bars(place, layer, measure, scale, widths) for place, layer in enumerate(layers))
    what = f"{measure.heading} of each of {number(layers)}, before and after"
    return (
        f'<div class="plot"><div class="ticks">{"".join(_tick(scale * value, text) for value, text in ticks)}</div>\n'
        f'<svg viewBox="0 0 {places} {_HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{what}">'
        f'<path class="grid" d="{"".join(lines)}"/>\n{bars}</svg>\n'
        f'<div class="stages">{"".join(_named(stage, places) for stage in stages)}</div></div>'
    )


class _Stage(NamedTuple):
    """Layers that follow each other in one part of the network."""

    name: str
    start: int
    stop: int

    def fits(self, room: float) -> bool:
        """Whether its name can stand under its layers, each of which has so many pixels."""
        return (self.stop - self.start) * room >= _LETTER * (len(self.name) + 1)


def _readable_stages(names: Sequence[str], least: float, room: float) -> list[_Stage]:
    """The stages whose names can be read, as deep in the tree of modules as leaves most of them.

    Args:
        names: Of the layers.
        least: Pixels for each layer on a phone.
        room: Pixels for each layer on a screen.
    """

    def readable(stages: list[_Stage]) -> tuple[int, int]:
        return sum(stage.fits(least) for stage in stages), sum(stage.fits(room) for stage in stages)

    best = max((_stages(names, depth) for depth in range(1, _DEEPEST + 1)), key=readable)
    return [stage for stage in best if stage.fits(room)]


def _stages(names: Sequence[str], depth: int) -> list[_Stage]:
    """The parts of the network at one depth of its tree of modules."""
    stages, start = [], 0
    for part, run in groupby(".".join(name.split(".")[:depth]) for name in names):
        stop = start + len(list(run))
        stages.append(_Stage(part, start, stop))
        start = stop
    return _without_common_part(stages)


def _without_common_part(stages: list[_Stage]) -> list[_Stage]:
    """What all the names begin with says nothing."""
    paths = [stage.name.split(".") for stage in stages]
    common = 0
    while len(stages) > 1 and all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    return [stage._replace(name=".".join(path[common:])) for stage, path in zip(stages, paths, strict=True)]


def _bars(place: int, layer: Layer, measure: Measure, scale: float, widths: tuple[float, float]) -> str:
    """The smaller stands in front of the greater, so that what is saved or added shows."""
    before, after = measure.of(layer.before), measure.of(layer.after)
    numbers = [measure.short(value) for value in (before, after) if value is not None]
    words = f"{layer.name}: {' → '.join(numbers)}"
    more = grew(layer, measure)
    pair = [("before", before or 0, widths[0]), ("grown" if more else "after", after or 0, widths[1])]
    bars = (
        f'<rect class="{name}" x="{place + (1 - width) / 2:.2f}" y="{_HEIGHT - scale * value:.2f}"'
        f' width="{width}" height="{scale * value:.2f}"/>'
        for name, value, width in (reversed(pair) if more else pair)
        if value
    )
    return f"<g><title>{escape(words)}</title>{''.join(bars)}</g>"


def _tick(height: float, text: str) -> str:
    return f'<span style="bottom:{height:.2f}%">{text}</span>'


def _named(stage: _Stage, places: int) -> str:
    style = "" if stage.fits(_PHONE / places) else ' class="wide"'
    return f'<span{style} style="left:{100 * stage.start / places:.2f}%">{escape(stage.name)}</span>'
