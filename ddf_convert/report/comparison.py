"""A plan, or two models side by side, as data: for tables, for the HTML page and as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_file
from ddf_convert.conversion import Action, Plan, Site, recorded
from ddf_convert.conversion.eligibility import in_words
from ddf_convert.conversion.plan import Operation
from ddf_convert.conversion.planner import plan_without_replacing
from ddf_convert.cost.timing import device_of
from ddf_convert.errors import UsageError
from ddf_convert.report.data import ComparisonData, Layer
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.modules import bare
from ddf_convert.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType

REPORT_VERSION = COMPARISON_VERSION = 1
_NOT_REPORTED = {
    "replacement_cost",
    "operation",
    "kernel_size",
    "conv_size",
    "override",
    "replaced",
}  # of sites and layers
_UNMEASURED = "Latency was not measured, and fewer MACs are not by themselves faster:"
_ESTIMATED = (
    "The latency after is an estimate: the model's, less its replaced convolutions and plus what replaces them,"
    " each timed alone"
)


class Comparison(ComparisonData):
    """A model before and after.

    It prints as a table: ``print`` writes it plainly, rich's ``print`` in color.

    Attributes:
        model: Names of the models.
        input_size: (C, H, W) of the example input.
        machine: The machine that was timed; None where nothing was timed.
        before: Cost of the whole model before.
        after: Cost of the whole model after.
        layers: Every convolution of either, in the order of the forward pass; upsampling too, if it was planned.
        notes: Remarks about the comparison as a whole.
        configs: The options of the conversions between the models, where they are known.
    """

    @classmethod
    def of(cls, plan: Plan, model: str | None = None) -> Comparison:
        """Returns the comparison of a plan's model with what the plan makes of it.

        Args:
            plan: The plan.
            model: Name of the model; the plan's if None.
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
            layers=tuple(_planned_layer(site) for site in plan.sites),
            notes=(*plan.notes, *notes),
            configs=(plan.config,),
        )

    def to_json(self) -> str:
        """Returns the comparison as JSON: its fields, costs as in ``report.json``, and the versions that made it."""
        head = {"format": "ddf_convert comparison", "format_version": COMPARISON_VERSION, "versions": _versions()}
        fields = asdict(self)
        for layer in fields["layers"]:
            for name in _NOT_REPORTED & set(layer):
                del layer[name]
        return json.dumps({**head, **fields}, indent=2, default=lambda model: model.model_dump(mode="json"))

    def to_html(self, path: str | Path) -> None:
        """Writes the comparison as one HTML page that needs no other file, completely or not at all.

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


def report(plan: Plan, model: str | None = None) -> dict[str, Any]:
    """Returns a plan and its savings as plain data: what ``--json`` prints and ``report.json`` holds.

    Args:
        plan: The plan.
        model: Name of the model; the plan's if None.

    Returns:
        ``model``; ``input_size`` (C, H, W); ``before`` and ``after``, each with ``params``, ``macs``
        (multiply-accumulates of one forward pass of the example input), ``activation_bytes`` (kept for the backward
        pass) and ``latency_ms`` (None where it was not measured, else on ``machine``); ``sites``, every convolution
        with ``name``, ``kind``, ``action``, ``reason``, shapes, ``calls``, ``replacement``, ``before`` and ``after``;
        ``notes``; and the ``config`` and ``versions`` that led to it.
    """
    return {
        "format": "ddf_convert report",
        "format_version": REPORT_VERSION,
        "model": model or plan.model,
        "input_size": list(plan.input_size),
        "config": plan.config.model_dump(mode="json"),
        "versions": _versions(),
        "machine": plan.machine,
        "before": plan.before.model_dump(),
        "after": plan.after.model_dump(),
        "sites": [site.model_dump(mode="json", exclude=_NOT_REPORTED) for site in plan.sites],
        "notes": plan.notes,
    }


def compare(before: nn.Module, after: nn.Module, example_input: ExampleInput, *, latency: bool = True) -> Comparison:
    """Compares two models; neither changes.

    Args:
        before: A model on any device; on the meta device nothing is timed.
        after: Another model, such as its conversion; layers are matched by their names.
        example_input: The input of both, as for ``plan``; costs are for the batch as given.
        latency: Time both models and their layers, on their device. It takes a fraction of a second for each layer.

    Returns:
        Parameters, MACs, activations and latency of both models and of every convolution.

    Raises:
        UsageError: One of them is not a module, cannot be analyzed, or does not accept the input.
        DDFError: One of them is to be timed and does not run.
    """
    with _naming_the_model("before"):
        before = bare(before)
    with _naming_the_model("after"):
        after = bare(after)
    obstacle = _obstacle_to_timing(before, after) if latency else "latency=True measures it"
    record = recorded(after)
    upsample = any(config.upsample for made in (record, recorded(before)) if made for config in made.configs)
    with _naming_the_model("before"):
        first = plan_without_replacing(before, example_input, obstacle is None, upsample)
    with _naming_the_model("after"):
        second = plan_without_replacing(after, example_input, obstacle is None, upsample)
    notes = [*first.notes, *second.notes, *([f"{_UNMEASURED} {obstacle}"] if obstacle else [])]
    return Comparison(
        model=" and ".join(dict.fromkeys((first.model, record.source if record else second.model))),
        input_size=first.input_size,
        machine=first.machine,
        before=first.before,
        after=second.before,
        layers=tuple(_matched_layers(_sites_by_name(first, before), _sites_by_name(second, after))),
        notes=tuple(dict.fromkeys(notes)),
        configs=record.configs if record else (),
    )


@contextmanager
def _naming_the_model(side: str) -> Iterator[None]:
    """Errors name the model that they are about."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{side}: {error}") from error


def _obstacle_to_timing(before: nn.Module, after: nn.Module) -> str | None:
    """Why the two cannot be timed side by side; None where they can."""
    devices = [device_of(model) for model in (before, after)]
    if "meta" in (device.type for device in devices):
        return "on the meta device there is nothing to run"
    return None if devices[0] == devices[1] else f"one model is on {devices[0]}, the other on {devices[1]}"


def _planned_layer(site: Site) -> Layer:
    replaced = site.action is Action.REPLACE and site.replacement is not None
    return _layer(
        site,
        kind_before=site.kind,
        kind_after=in_words(site.replacement) if replaced and site.replacement else site.kind,
        reason=site.reason,
        before=site.before,
        after=site.after,
        replaced=replaced,
    )


def _sites_by_name(plan: Plan, model: nn.Module) -> dict[str, Site]:
    """The sites by name; what replaced an interpolation called as a function has the name of that call."""
    record = recorded(model)
    calls = {step.places[0]: step.names[0] for step in (record.replaced if record else ()) if step.intercepted}
    return {calls.get(site.name, site.name): site for site in plan}


def _matched_layers(first: dict[str, Site], second: dict[str, Site]) -> Iterator[Layer]:
    """The layers of both models in the order of the first; one that only the second has keeps its predecessor there."""
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
        site = old or new
        assert site is not None
        unchanged = old is not None and new is not None and old.kind == new.kind
        yield _layer(
            site,
            kind_before=old.kind if old else None,
            kind_after=new.kind if new else None,
            reason=site.reason if unchanged and site.action is Action.SKIP else "",
            before=old.before if old else None,
            after=new.before if new else None,
            replaced=new is not None and _replaces(new, old),
        )


def _replaces(new: Site, old: Site | None) -> bool:
    """Whether a layer is of a kind that replaces convolutions."""
    converted = new.operation in (Operation.DDF_UP, Operation.CONVERTED)
    return converted or (new.kind.startswith("depthwise") and (old is None or old.kind != new.kind))


def _layer(site: Site, **fields: Any) -> Layer:
    return Layer(
        name=site.name,
        calls=site.calls,
        input_shape=site.input_shape,
        output_shape=site.output_shape,
        found_by=site.found_by,
        caution=site.caution,
        operation=site.operation,
        conv_size=None if site.functional else site.kernel_size,
        override=site.override,
        **fields,
    )


def _versions() -> dict[str, str]:
    return {
        "ddf_convert": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
