"""What is shown of a cost: four measures, each with its words and its way of writing numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddf_convert.cost.count import Cost
from ddf_convert.report import units


@dataclass(frozen=True)
class Measure:
    """One of the fields of a cost.

    Attributes:
        name: What readers know it as.
        field: Its field.
        total: Writes the number of a whole model beside another, whose unit it may take.
        short: Writes the number of one layer among many.
        axis: The ticks of a chart.
    """

    name: str
    field: str
    total: Callable[[Any, Any], str]
    short: Callable[[Any], str]
    axis: Callable[[float], list[tuple[float, str]]]

    @property
    def heading(self) -> str:
        """The name at the start of a line."""
        return self.name[0].upper() + self.name[1:]

    def of(self, cost: Cost | None) -> float | None:
        """The number; None where nothing has been measured, or there is nothing."""
        number: float | None = None if cost is None else getattr(cost, self.field)
        return number


PARAMETERS = Measure("parameters", "params", units.count, units.short, units.count_axis)
MACS = Measure("MACs", "macs", units.count, units.short, units.count_axis)
ACTIVATIONS = Measure(
    "activations", "activation_bytes", lambda number, beside: units.size(number), units.size, units.size_axis
)
LATENCY = Measure(
    "latency",
    "latency_ms",
    lambda number, beside: units.milliseconds(number),
    units.milliseconds,
    units.milliseconds_axis,
)
MEASURES = (PARAMETERS, MACS, ACTIVATIONS, LATENCY)
