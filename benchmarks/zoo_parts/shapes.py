"""What is checked of every architecture, on shapes alone: plan, conversion, forward pass, totals, manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import nn

import ddf_convert as ddf
from ddf_convert.artifacts.state import describe_difference
from ddf_convert.conversion.rewriter import apply_replacements
from zoo_parts.catalogue import Architecture, build, example_inputs
from zoo_parts.forward import Outcome, device_of, for_real, on_shapes
from zoo_parts.record import WrongError, line_of, noting

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
EVERYTHING: dict[str, Any] = {"depthwise": True, "stem": True, "allow_growth": True}


def check_shapes(architecture: Architecture) -> dict[str, Any]:
    """Checks one architecture. What depends on a step that failed is left out; all else is still looked at."""
    with line_of(architecture, "shapes") as line, noting(line, "build"):
        model = build(architecture)
        convolutions = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
        line["convs"] = len(convolutions)
        line["3x3"] = sum(isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) for conv in convolutions)
        if not line["3x3"]:  # nothing in it is replaced; a third of all are such, and among the slowest to look at
            return line
        with noting(line, "forward"):
            subject = _subject(architecture, model)
            line["forward"] = subject.forward.__name__
            with noting(line, "plan"):
                plan = ddf.plan(model, subject.inputs)
                line["sites"] = len(plan)
                line["params"] = plan.before.params
                line["found_by"] = dict(Counter(str(getattr(site, "found_by", None)) for site in plan))
                line["default"] = len(plan.replaced)
                with noting(line, "coverage"):
                    _covered(subject, plan)
                _convert(line, subject, plan, "default")
                replace_all(subject.model, plan)
                line["everything"] = len(plan.replaced)
                if not line["default"]:  # else it would take as long again, and --real does it for one of each file
                    _convert(line, subject, plan, "everything")
    return line


@dataclass(frozen=True)
class _Subject:
    """A model to convert.

    Attributes:
        architecture: What it is.
        model: Built from it.
        inputs: The arguments of its forward.
        forward: How to run it, and the same model converted.
        before: What its forward does.
    """

    architecture: Architecture
    model: nn.Module
    inputs: tuple[Any, ...]
    forward: Callable[[nn.Module, tuple[Any, ...]], Outcome]
    before: Outcome


def _subject(architecture: Architecture, model: nn.Module) -> _Subject:
    """The model on shapes alone, or one with weights if its shapes depend on values."""
    inputs = example_inputs(architecture, model)
    try:
        return _Subject(architecture, model, inputs, on_shapes, on_shapes(model, inputs))
    except Exception:  # refused in many ways; what is wrong with the model itself comes again
        model = build(architecture, "cpu")
        inputs = example_inputs(architecture, model)
        return _Subject(architecture, model, inputs, for_real, for_real(model, inputs))


def replace_all(model: nn.Module, plan: ddf.Plan) -> int:
    """Edits a plan as if it had been made with :data:`EVERYTHING`, in less time; how many sites that changes."""
    left = [site for site in plan if site.action is ddf.Action.SKIP and site.replacement and _module(model, site.name)]
    for site in left:
        site.replace()
    return len(left)


def _convert(line: dict[str, Any], subject: _Subject, plan: ddf.Plan, name: str) -> None:
    """Applies a plan, if there is anything to replace, and looks at the converted model."""
    if not plan.replaced:
        return
    with noting(line, f"convert, {name}"):
        converted = ddf.convert(subject.model, plan)
        with noting(line, f"names, {name}"):
            _same_names(subject.model, converted)
        with noting(line, f"forward, {name}"):
            _same_output(plan, subject.before, subject.forward(converted, subject.inputs))
        with noting(line, f"totals, {name}"):
            _same_totals(subject, plan, ddf.measure(converted, *subject.inputs))
        with noting(line, f"manifest, {name}"):
            _same_again(converted, build(subject.architecture, device_of(subject.model).type))


def _covered(subject: _Subject, plan: ddf.Plan) -> None:
    """Every convolution of the tree is in the plan, every one that ran is accounted for, and each has a reason."""
    sites = {id(_module(subject.model, site.name)) for site in plan}
    paths = {path: module for path, module in subject.model.named_modules() if isinstance(module, CONVOLUTIONS)}
    missing = [path for path, module in paths.items() if id(module) not in sites]
    if missing:
        raise WrongError(f"{len(missing)} of {len(paths)} convolutions are not in the plan, such as {missing[0]}")
    mute = [site.name for site in plan if not site.reason.strip()]
    if mute:
        raise WrongError(f"{len(mute)} sites have no reason, such as {mute[0]}")
    calls, ran = sum(site.calls for site in plan), subject.before.convolutions
    if calls != ran:
        raise WrongError(f"the forward pass runs {ran} 2D convolutions, the plan has {calls} calls")


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None  # a functional call has no module


def _same_names(model: nn.Module, converted: nn.Module) -> None:
    """The class stayed, and so did everything that is not inside a new layer."""
    if type(converted) is not type(model):
        raise WrongError(f"{type(model).__name__} became {type(converted).__name__}")
    new = tuple(f"{name}." for step in converted.ddf_conversion.replaced for name in step.names)  # type: ignore[union-attr]
    before, after = (
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items() if not name.startswith(new)}
        for each in (model, converted)
    )
    if before != after:
        raise WrongError(describe_difference(before, after))


def _same_output(plan: ddf.Plan, before: Outcome, after: Outcome) -> None:
    """The converted model returns what the original does, by way of its new layers."""
    if before.output != after.output:
        raise WrongError(f"the output {before.output} became {after.output}")
    calls = sum(site.calls for site in plan.replaced)
    if calls != after.ddf:
        raise WrongError(f"the forward pass runs {after.ddf} DDF operators, the plan has {calls} calls of new layers")


def _same_totals(subject: _Subject, plan: ddf.Plan, measured: ddf.Cost) -> None:
    """The plan promised what the converted model costs: but for MACs where other values mean other shapes."""
    for what in ("params", "macs") if subject.forward is on_shapes else ("params",):
        promised, found = getattr(plan.after, what), getattr(measured, what)
        if promised != found:
            raise WrongError(f"the plan promised {promised:,} {what}, the converted model has {found:,}")


def _same_again(converted: nn.Module, fresh: nn.Module) -> None:
    """The record of a conversion, through JSON, makes the same of a fresh model."""
    record = ddf.Conversion.model_validate_json(converted.ddf_conversion.model_dump_json())  # type: ignore[operator]
    apply_replacements(fresh, record.replaced)
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    difference = describe_difference(shapes, converted.state_dict())
    if difference:
        raise WrongError(difference)
    for mine, theirs in zip_longest(repr(converted).splitlines(), repr(fresh).splitlines(), fillvalue="nothing"):
        if mine != theirs:
            raise WrongError(f"{mine.strip()} became {theirs.strip()}")
