"""What is checked of an architecture, on shapes alone or with real numbers; the result is a line of JSON."""

from __future__ import annotations

import logging
import re
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from common.pool import Worker
from torch import Tensor, nn

import ddf_convert as ddf
from architectures.catalog import Architecture, build, example_inputs
from architectures.forward import ForwardResult, device_of, for_real, on_shapes, tensors
from ddf_convert.artifacts.state import describe_difference
from ddf_convert.conversion.rewriter import apply_replacements

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
EVERYTHING: dict[str, Any] = {"depthwise": True, "stem": True, "allow_growth": True}
SIZES = (64, 96, 128)  # tried before the model's own, which may be slow
LOAD_SECONDS = 300  # for loading one model
LONGEST = 240  # characters of a reason

_loader = Worker(setup=logging.disable, daemon=True)


class WrongError(Exception):
    """A check failed."""


@contextmanager
def line_of(architecture: Architecture, check: str) -> Iterator[dict[str, Any]]:
    """Yields a new line, which gets the processor's seconds that the block took."""
    line: dict[str, Any] = {
        "check": check,
        "library": architecture.library,
        "name": architecture.name,
        "file": architecture.file,
    }
    start = time.process_time()  # whatever else the machine does
    try:
        yield line
    finally:
        line["seconds"] = round(time.process_time() - start, 2)


@contextmanager
def noting_failures(line: dict[str, Any], step: str) -> Iterator[None]:
    """Makes an exception in the block a failure of the line; the program goes on after the block."""
    try:
        yield
    except WrongError as error:
        fail(line, step, str(error))
    except Exception as error:  # models of other people raise anything
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
        fail(line, step, f"{type(error).__name__}: {error}", at=place)


def fail(line: dict[str, Any], step: str, reason: str, **more: Any) -> None:
    """Adds a failure to a line, without this machine's paths."""
    reason = re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", " ".join(reason.split()))
    if len(reason) > LONGEST:
        reason = f"{reason[:LONGEST]} ..."
    line.setdefault("failures", []).append({"step": step, "reason": reason, **more})


# --- on shapes alone ---


def check_shapes(architecture: Architecture) -> dict[str, Any]:
    """Checks plan, conversion, forward pass, totals and manifest on shapes alone.

    What depends on a step that failed is left out; all else is still checked.
    """
    with line_of(architecture, "shapes") as line, noting_failures(line, "build"):
        model = build(architecture)
        convolutions = [module for module in model.modules() if isinstance(module, CONVOLUTIONS)]
        line["convs"] = len(convolutions)
        line["3x3"] = sum(isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) for conv in convolutions)
        if not line["3x3"]:  # nothing in it is replaced; a third of all are such, and among the slowest to look at
            return line
        with noting_failures(line, "forward"):
            subject = _subject(architecture, model)
            line["forward"] = subject.forward.__name__
            with noting_failures(line, "plan"):
                plan = ddf.plan(model, subject.inputs)
                line["sites"] = len(plan)
                line["params"] = plan.before.params
                line["found_by"] = dict(Counter(str(getattr(site, "found_by", None)) for site in plan))
                line["default"] = len(plan.replaced)
                with noting_failures(line, "coverage"):
                    _check_coverage(subject, plan)
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
        architecture: The model's.
        model: Not converted.
        inputs: Arguments of its forward.
        forward: Runs it, and the converted model.
        before: The result of its forward.
    """

    architecture: Architecture
    model: nn.Module
    inputs: tuple[Any, ...]
    forward: Callable[[nn.Module, tuple[Any, ...]], ForwardResult]
    before: ForwardResult


def _subject(architecture: Architecture, model: nn.Module) -> _Subject:
    """Returns the model on shapes alone, or one with weights if its shapes depend on values."""
    inputs = example_inputs(architecture, model)
    try:
        return _Subject(architecture, model, inputs, on_shapes, on_shapes(model, inputs))
    except Exception:  # refused in many ways; what is wrong with the model itself comes again
        model = build(architecture, "cpu")
        inputs = example_inputs(architecture, model)
        return _Subject(architecture, model, inputs, for_real, for_real(model, inputs))


def replace_all(model: nn.Module, plan: ddf.Plan) -> int:
    """Edits a plan as if it had been made with :data:`EVERYTHING`, in less time; returns how many sites changed."""
    left = [site for site in plan if site.action is ddf.Action.SKIP and site.replacement and _module(model, site.name)]
    for site in left:
        site.replace()
    return len(left)


def _convert(line: dict[str, Any], subject: _Subject, plan: ddf.Plan, name: str) -> None:
    """Applies a plan, if there is anything to replace, and checks the converted model."""
    if not plan.replaced:
        return
    with noting_failures(line, f"convert, {name}"):
        converted = ddf.convert(subject.model, plan)
        with noting_failures(line, f"names, {name}"):
            _check_names(subject.model, converted)
        with noting_failures(line, f"forward, {name}"):
            _check_output(plan, subject.before, subject.forward(converted, subject.inputs))
        with noting_failures(line, f"totals, {name}"):
            _check_totals(subject, plan, ddf.measure(converted, *subject.inputs))
        with noting_failures(line, f"manifest, {name}"):
            _check_manifest(converted, build(subject.architecture, device_of(subject.model).type))


def _check_coverage(subject: _Subject, plan: ddf.Plan) -> None:
    """Checks that every convolution is in the plan with a reason, and every call that ran."""
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


def _check_names(model: nn.Module, converted: nn.Module) -> None:
    """Checks that the class stayed, and everything that is not inside a new layer."""
    if type(converted) is not type(model):
        raise WrongError(f"{type(model).__name__} became {type(converted).__name__}")
    new = tuple(f"{name}." for step in converted.ddf_conversion.replaced for name in step.names)  # type: ignore[union-attr]
    before, after = (
        {name: tuple(tensor.shape) for name, tensor in each.state_dict().items() if not name.startswith(new)}
        for each in (model, converted)
    )
    if before != after:
        raise WrongError(describe_difference(before, after))


def _check_output(plan: ddf.Plan, before: ForwardResult, after: ForwardResult) -> None:
    """Checks that the converted model returns what the original does, and runs its new layers."""
    if before.output != after.output:
        raise WrongError(f"the output {before.output} became {after.output}")
    calls = sum(site.calls for site in plan.replaced)
    if calls != after.ddf:
        raise WrongError(f"the forward pass runs {after.ddf} DDF operators, the plan has {calls} calls of new layers")


def _check_totals(subject: _Subject, plan: ddf.Plan, measured: ddf.Cost) -> None:
    """Checks the plan's costs against the converted model's; MACs only if shapes do not depend on values."""
    for what in ("params", "macs") if subject.forward is on_shapes else ("params",):
        promised, found = getattr(plan.after, what), getattr(measured, what)
        if promised != found:
            raise WrongError(f"the plan promised {promised:,} {what}, the converted model has {found:,}")


def _check_manifest(converted: nn.Module, fresh: nn.Module) -> None:
    """Checks that the record of a conversion, through JSON, converts a fresh model the same way."""
    record = ddf.Conversion.model_validate_json(converted.ddf_conversion.model_dump_json())  # type: ignore[operator]
    apply_replacements(fresh, record.replaced)
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    difference = describe_difference(shapes, converted.state_dict())
    if difference:
        raise WrongError(difference)
    for mine, theirs in zip_longest(repr(converted).splitlines(), repr(fresh).splitlines(), fillvalue="nothing"):
        if mine != theirs:
            raise WrongError(f"{mine.strip()} became {theirs.strip()}")


# --- with real numbers ---


def check_real(architecture: Architecture) -> dict[str, Any]:
    """Trains a converted model for a step, saves it, and has another process load and run it."""
    with line_of(architecture, "real") as line, noting_failures(line, "build"):
        torch.manual_seed(0)
        model = build(architecture, "cpu")
        size = line["size"] = _size(architecture, model)
        image = example_inputs(architecture, model, size)
        with noting_failures(line, "convert"):
            converted = ddf.convert(model, example_input=image, inplace=True, **EVERYTHING)
            line["replaced"] = len(converted.ddf_conversion.replaced)  # type: ignore[union-attr]
            with noting_failures(line, "training"):
                _train(converted, example_inputs(architecture, model, size, batch=2))
            with noting_failures(line, "artifact"), tempfile.TemporaryDirectory() as folder:
                _save(architecture, converted.eval(), image, Path(folder))
                difference = _loader.call(LOAD_SECONDS, load, architecture, folder)
                if difference:
                    raise WrongError(difference)
    return line


def _size(architecture: Architecture, model: nn.Module) -> int | None:
    """Returns the smallest side of an image that the model takes; None for its own."""
    own = tensors(example_inputs(architecture, model))[0].shape[-1]
    for size in SIZES:
        with suppress(Exception):
            if size < own:
                on_shapes(model, example_inputs(architecture, model, size))
                return size
    return None


def _train(model: nn.Module, images: tuple[Any, ...]) -> None:
    """Checks that outputs and gradients in training mode are finite, and that every new layer gets gradients."""
    model.train()
    outputs = [tensor for tensor in tensors(model(*images)) if tensor.requires_grad]
    _check_finite({f"output {place}": tensor for place, tensor in enumerate(outputs)})
    torch.stack([tensor.square().mean() for tensor in outputs]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    _check_finite(gradients)
    new = [tuple(f"{name}." for name in step.names) for step in model.ddf_conversion.replaced]  # type: ignore[union-attr]
    without = [names[0] for names in new if not any(key.startswith(names) for key in gradients)]
    if without:
        raise WrongError(f"{len(without)} of {len(new)} new layers got no gradient, such as {without[0]}*")


def _check_finite(values: dict[str, Tensor]) -> None:
    infinite = [name for name, value in values.items() if not value.isfinite().all()]
    if infinite:
        raise WrongError(f"{len(infinite)} of {len(values)} are not finite, such as {infinite[0]}")


@torch.no_grad()
def _save(architecture: Architecture, model: nn.Module, images: tuple[Any, ...], folder: Path) -> None:
    manifest = ddf.save(model, folder / "model")
    if architecture.library == "timm" and manifest.source.kind != "timm":
        raise WrongError("it was saved as a model of the user's own")
    torch.save((images, tensors(model(*images))), folder / "numbers.pt")


@torch.no_grad()
def load(architecture: Architecture, folder: str) -> str:
    """Loads a model in this process; returns how its outputs differ from those that were saved."""
    if architecture.library == "timm":
        model = ddf.load(Path(folder, "model"))
    else:
        model = ddf.restore(build(architecture, "cpu"), Path(folder, "model"))
    images, expected = torch.load(Path(folder, "numbers.pt"), weights_only=True)
    found = tensors(model(*images))
    if len(found) != len(expected):
        return f"{len(expected)} outputs became {len(found)}"
    wrong = [place for place, pair in enumerate(zip(expected, found, strict=True)) if not torch.equal(*pair)]
    return f"{len(wrong)} of {len(found)} outputs differ" if wrong else ""
