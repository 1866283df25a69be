"""What a report shows: measures, layers before and after, and which layers are listed or only counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ddf_convert.conversion import ConvertConfig
from ddf_convert.conversion.plan import FoundBy, Operation
from ddf_convert.cost.count import Cost
from ddf_convert.report import units


@dataclass(frozen=True)
class Measure:
    """One field of a :class:`Cost`: its name for readers, and how its numbers are written.

    Attributes:
        total: Formats the number of a whole model beside another one, whose unit it may take.
        short: Formats the number of one layer.
        axis: Returns the ticks of a chart.
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
        """Returns the number; None where there is no layer or nothing was measured."""
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


@dataclass(frozen=True)
class Layer:
    """One convolution or upsampling, and the layer of that name in the other model.

    Attributes:
        name: Path of the module.
        kind_before: "dense 3x3", "DDF", ...; None where the model before has no such layer.
        kind_after: The kind in the model after; None where it has no such layer.
        reason: Why it is replaced or left alone; empty where nothing was decided.
        calls: Number of calls in one forward pass.
        input_shape: (B, C, H, W) at its first call, in the model before if it has the layer.
        output_shape: (B, C, H, W) of its output.
        before: Cost of all its calls; None where the model before has no such layer.
        after: Cost in the model after; None where it has no such layer.
        found_by: How it was found.
        caution: What is less certain for it; empty where nothing is.
        operation: What it computes, in the model before if it has the layer.
        conv_size: Kernel of the convolution; None for a functional call and for any other operation.
        override: The option that would replace it; empty if there is none.
        replaced: Whether the kind after alone says what happened: a layer that replaces convolutions.
    """

    name: str
    kind_before: str | None
    kind_after: str | None
    reason: str
    calls: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    before: Cost | None
    after: Cost | None
    found_by: FoundBy = FoundBy.FX
    caution: str = ""
    operation: Operation = Operation.CONV
    conv_size: tuple[int, int] | None = None
    override: str = ""
    replaced: bool = False

    @property
    def kind(self) -> str:
        """The kind before, or after where there was none."""
        return self.kind_before or self.kind_after or ""

    @property
    def changed(self) -> bool:
        """Whether its kind or its size differs between the models; a time alone is no change."""
        return self.kind_before != self.kind_after or _without_latency(self.before) != _without_latency(self.after)

    @property
    def becomes(self) -> str:
        """What a changed layer has become, in a word or two."""
        return (self.kind_after or "") if self.replaced else f"{self.kind_before} -> {self.kind_after}"

    def grew(self, measure: Measure) -> bool:
        """Returns whether the change increased a measure."""
        before, after = measure.of(self.before), measure.of(self.after)
        return self.changed and before is not None and after is not None and after > before


@dataclass(frozen=True)
class ComparisonData:
    """The fields of a :class:`~ddf_convert.report.Comparison`, and its layers in groups."""

    model: str
    input_size: tuple[int, ...]
    machine: str | None
    before: Cost
    after: Cost
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    configs: tuple[ConvertConfig, ...] = ()

    @property
    def changed(self) -> list[Layer]:
        """Layers that both models have, in different forms."""
        return [layer for layer in self.layers if layer.before and layer.after and layer.changed]

    @property
    def only_before(self) -> list[Layer]:
        """Layers that only the model before has."""
        return [layer for layer in self.layers if layer.after is None]

    @property
    def only_after(self) -> list[Layer]:
        """Layers that only the model after has."""
        return [layer for layer in self.layers if layer.before is None]

    @property
    def left_alone(self) -> list[Layer]:
        """Unchanged layers that DDF could be expected to replace: of its kernel sizes, functional ones, upsampling."""
        return [layer for layer in self.layers if not layer.changed and not self._stays_as_expected(layer)]

    @property
    def others(self) -> list[Layer]:
        """The other unchanged layers: of other kernel sizes, or converted before."""
        return [layer for layer in self.layers if not layer.changed and self._stays_as_expected(layer)]

    @property
    def verb(self) -> str:
        """What happened to the changed layers."""
        return "replaced" if all(layer.replaced for layer in self.changed) else "changed"

    @property
    def headline(self) -> str:
        """How many layers changed: ``"16 of 53 convolutions replaced"``."""
        if not self.layers:
            return "no convolutions"
        words = f"{len(self.changed)} of {count_layers(self.layers)} {self.verb}"
        sides = (("only before", self.only_before), ("only after", self.only_after))
        return ", ".join([words, *(f"{len(layers)} {where}" for where, layers in sides if layers)])

    @property
    def growth(self) -> str:
        """Which measures grew in how many layers, which gains elsewhere must not hide; empty where none grew."""
        counts = ((measure.name, sum(layer.grew(measure) for layer in self.layers)) for measure in MEASURES)
        words = [f"{name} of {count}" for name, count in counts if count]
        if not words:
            return ""
        return f"More than before: {', '.join(words)}, out of {count_layers(self.changed)} {self.verb}"

    def _stays_as_expected(self, layer: Layer) -> bool:
        sizes = {(size, size) for config in self.configs for size in config.kernel_size} or {(3, 3)}
        if layer.operation is Operation.CONV_TRANSPOSE and any(config.upsample for config in self.configs):
            return False
        converted = layer.operation in (Operation.DDF_UP, Operation.CONVERTED)
        return converted or (layer.conv_size is not None and layer.conv_size not in sizes)


def count_layers(layers: Sequence[Layer], other: bool = False) -> str:
    """Returns ``"1 convolution"`` or ``"2 other convolutions"``; with upsampling among them, ``"3 layers"``."""
    word = noun(layers)
    return f"{len(layers)} {'other ' if other else ''}{word if len(layers) == 1 else f'{word}s'}"


def count_kinds(layers: Sequence[Layer]) -> str:
    """Returns ``"36 of 1x1, 1 of 7x7"``, the most frequent first."""
    kinds = Counter(f"of {'x'.join(map(str, layer.conv_size))}" if layer.conv_size else layer.kind for layer in layers)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())


def noun(layers: Sequence[Layer]) -> str:
    """Returns the word for one of these layers: "convolution", or "layer" if upsampling is among them."""
    upsampling = (layer.operation.upsamples or layer.operation is Operation.DDF_UP for layer in layers)
    return "layer" if any(upsampling) else "convolution"


def measured(layers: Sequence[Layer]) -> list[Measure]:
    """Returns the measures that are known of at least one layer."""
    costs = [cost for layer in layers for cost in (layer.before, layer.after)]
    return [measure for measure in MEASURES if any(measure.of(cost) is not None for cost in costs)]


def _without_latency(cost: Cost | None) -> Cost | None:
    return cost and cost.model_copy(update={"latency_ms": None})
