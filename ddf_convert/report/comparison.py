"""Two models side by side, in all and layer by layer: what tables, JSON and the page show, of a plan too."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_file
from ddf_convert.conversion import Action, ConvertConfig, Plan, Site, recorded
from ddf_convert.conversion.eligibility import in_words
from ddf_convert.conversion.plan import FoundBy
from ddf_convert.conversion.planner import as_it_stands
from ddf_convert.cost.count import Cost
from ddf_convert.cost.timing import device_of
from ddf_convert.errors import UsageError
from ddf_convert.report.model import versions
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.modules import bare

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT_VERSION = 1
_UNMEASURED = "Latency was not measured, and fewer MACs are not by themselves faster:"
_ESTIMATED = (
    "The latency after is an estimate: the model's, less its replaced convolutions and plus what replaces them,"
    " each timed alone"
)


@dataclass(frozen=True)
class Layer:
    """One convolution or upsampling, or what stands in its place, in both models.

    Attributes:
        name: Path of the module.
        kind_before: "dense 3x3", "DDF", ...; None where the model before has no such layer.
        kind_after: The same for the model after.
        reason: Why it is replaced or left alone, in words; empty where nobody decided about it.
        calls: How often one forward pass calls it.
        input_shape: (B, C, H, W) at its first call, before where it is in both.
        output_shape: The same for its output.
        before: Its cost, over all its calls; None where there is no such layer.
        after: The same for the model after.
        found_by: How it was found.
        caution: What is less certain for it, in words; empty where nothing is.
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

    @property
    def kind(self) -> str:
        """The kind before, or after where there was none."""
        return self.kind_before or self.kind_after or ""

    @property
    def changed(self) -> bool:
        """Whether it is something else after, or of another size; a time alone is no change."""
        return self.kind_before != self.kind_after or _timeless(self.before) != _timeless(self.after)


@dataclass(frozen=True)
class Comparison:
    """A model before and after.

    It prints as a table: ``print`` writes it plainly, rich's ``print`` in color.

    Attributes:
        model: What the models are called.
        input_size: (C, H, W) of the example input.
        machine: What the times were measured on; None where nothing was timed.
        before: Cost of the whole model before.
        after: Cost of the whole model after.
        layers: Every convolution of either, in the order of the forward pass; upsampling too, if it was planned.
        notes: What there is to say of it as a whole.
        configs: The options of the conversions in between, as far as they are known.
    """

    model: str
    input_size: tuple[int, ...]
    machine: str | None
    before: Cost
    after: Cost
    layers: tuple[Layer, ...]
    notes: tuple[str, ...] = ()
    configs: tuple[ConvertConfig, ...] = ()

    @classmethod
    def of(cls, plan: Plan, model: str | None = None) -> Comparison:
        """What a plan would make of its model.

        Args:
            plan: The plan.
            model: What to call the model; the plan's own words if None.
        """
        if plan.before.latency_ms is None:
            notes = [f"{_UNMEASURED} --measure (in Python, measure=True) measures it"]
        else:
            estimated = plan.replaced and plan.after.latency_ms is not None and not plan.timed_whole
            notes = [_ESTIMATED] if estimated else []
        return cls(
            model=model or plan.model,
            input_size=plan.input_size,
            machine=plan.machine,
            before=plan.before,
            after=plan.after,
            layers=tuple(_planned(site) for site in plan.sites),
            notes=(*plan.notes, *notes),
            configs=(plan.config,),
        )

    def to_json(self) -> str:
        """The comparison as JSON text: its fields, costs as in ``report.json``, and the versions that made it."""
        head = {"format": "ddf_convert comparison", "format_version": FORMAT_VERSION, "versions": versions()}
        return json.dumps({**head, **asdict(self)}, indent=2, default=lambda model: model.model_dump(mode="json"))

    def to_html(self, path: str | Path) -> None:
        """Writes the comparison as one HTML page, which needs nothing beside itself, whole or not at all.

        Raises:
            UsageError: It cannot be written.
        """
        from ddf_convert.report.html import page

        check_file("to_html:", Path(path))
        write_file(Path(path), page(self))

    def __str__(self) -> str:
        from ddf_convert.report.tables import as_text

        return as_text(self)

    def __rich__(self) -> RenderableType:
        from ddf_convert.report.tables import tables

        return tables(self)


def compare(before: nn.Module, after: nn.Module, example_input: ExampleInput, *, latency: bool = True) -> Comparison:
    """Holds two models against each other; neither changes.

    Args:
        before: A model, on any device (the meta device too, where nothing can be timed).
        after: Another, such as its conversion: layers are matched by their names.
        example_input: What both take, as for ``plan``; costs are for the batch as given.
        latency: Time both models and their layers, where they are. It takes a fraction of a second for each layer.

    Returns:
        Parameters, MACs, activations and latency of both, in all and of every convolution.

    Raises:
        UsageError: One of them is no module, cannot be looked at, or does not accept the input.
        DDFError: One of them is to be timed and does not run.
    """
    with _blaming("before"):
        before = bare(before)
    with _blaming("after"):
        after = bare(after)
    obstacle = _obstacle_to_timing(before, after) if latency else "latency=True measures it"
    record = recorded(after)
    upsample = any(config.upsample for made in (record, recorded(before)) if made for config in made.configs)
    with _blaming("before"):
        first = as_it_stands(before, example_input, obstacle is None, upsample)
    with _blaming("after"):
        second = as_it_stands(after, example_input, obstacle is None, upsample)
    notes = [*first.notes, *second.notes, *([f"{_UNMEASURED} {obstacle}"] if obstacle else [])]
    return Comparison(
        model=" and ".join(dict.fromkeys((first.model, record.source if record else second.model))),
        input_size=first.input_size,
        machine=first.machine,
        before=first.before,
        after=second.before,
        layers=tuple(_joined(_sites(first, before), _sites(second, after))),
        notes=tuple(dict.fromkeys(notes)),
        configs=record.configs if record else (),
    )


@contextmanager
def _blaming(when: str) -> Iterator[None]:
    """Errors say which of the models is meant."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{when}: {error}") from error


def _obstacle_to_timing(before: nn.Module, after: nn.Module) -> str | None:
    """Why the two cannot be timed beside each other, if so."""
    devices = [device_of(model) for model in (before, after)]
    if "meta" in (device.type for device in devices):
        return "on the meta device there is nothing to run"
    return None if devices[0] == devices[1] else f"one model is on {devices[0]}, the other on {devices[1]}"


# --- layers -----------------------------------------------------------------------------------------------------------


def _planned(site: Site) -> Layer:
    kind = in_words(site.replacement) if site.action is Action.REPLACE and site.replacement else site.kind
    return _layer(site, site.kind, kind, site.reason, site.before, site.after)


def _sites(plan: Plan, model: nn.Module) -> dict[str, Site]:
    """Every convolution by its name.

    What took the place of an interpolation that was called as a function has the name of that call.
    """
    record = recorded(model)
    calls = {step.places[0]: step.names[0] for step in (record.replaced if record else ()) if step.intercepted}
    return {calls.get(site.name, site.name): site for site in plan}


def _joined(first: dict[str, Site], second: dict[str, Site]) -> Iterator[Layer]:
    """The layers of both, in the order of the first; what only the second has follows what it follows there."""
    names = list(first)
    place = 0
    for name in second:
        if name in first:
            place = names.index(name) + 1
        else:
            names.insert(place, name)
            place += 1
    for name in names:
        old, new = first.get(name), second.get(name)
        shown = old or new
        assert shown is not None
        old_kind, new_kind = (site.kind if site else None for site in (old, new))
        before, after = (site.before if site else None for site in (old, new))
        reason = shown.reason if old_kind == new_kind and shown.action is Action.SKIP else ""
        yield _layer(shown, old_kind, new_kind, reason, before, after)


def _layer(site: Site, old: str | None, new: str | None, reason: str, before: Cost | None, after: Cost | None) -> Layer:
    return Layer(
        name=site.name,
        kind_before=old,
        kind_after=new,
        reason=reason,
        calls=site.calls,
        input_shape=site.input_shape,
        output_shape=site.output_shape,
        before=before,
        after=after,
        found_by=site.found_by,
        caution=site.caution,
    )


def _timeless(cost: Cost | None) -> Cost | None:
    return cost and cost.model_copy(update={"latency_ms": None})
