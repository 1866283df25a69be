"""Rewriting: a plan is checked and every new layer built first; then they are swapped into the module tree."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import fx, nn

from ddf_convert.errors import UsageError
from ddf_convert.graph.build import build, kind_of, obstacle
from ddf_convert.graph.functional import functional_convolutions, replace_functions
from ddf_convert.graph.plan import ConvertConfig, Plan, Replacement, suggestion
from ddf_convert.graph.planner import plan as make_plan
from ddf_convert.graph.record import first_line
from ddf_convert.graph.sites import module_names
from ddf_convert.graph.trace import build_graph, describe
from ddf_convert.graph.wrappers import bare
from ddf_convert.inputs import ExampleInput


class Replaced(BaseModel):
    """One convolution that was replaced.

    Attributes:
        names: Every path at which it was registered; for one that was called as a function, its name in the plan.
        replacement: What took its place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = Field(min_length=1)
    replacement: Replacement

    @property
    def functional(self) -> bool:
        """Whether it was called as a function."""
        return self.names[0].endswith("()")


class Conversion(BaseModel):
    """What was done to a model, in order, so that it can be done again without deciding again.

    Attributes:
        source: The model, in words.
        replaced: Every replacement, in order.
        configs: The options of each conversion; a model can be converted more than once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    replaced: tuple[Replaced, ...] = ()
    configs: tuple[ConvertConfig, ...] = ()


def convert(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    example_input: ExampleInput | None = None,
    inplace: bool = False,
    as_graph: bool = False,
    **options: Any,
) -> nn.Module:
    """Applies a plan to a model, or plans and applies in one step.

    The model keeps its class, its methods and the names of its other parameters; the modules are swapped in the tree.
    Only where a convolution that is called as a function is replaced (``functional=True``) does a torch.fx GraphModule
    take the model's place: in it, ``self.training`` has the value that it has now wherever the forward pass reads it.
    New layers take the device, dtype, training mode and requires_grad of the convolution. They are drawn from
    torch's CPU generator, whose state is left as it was. The record of what was done is ``model.ddf_conversion``.

    Args:
        model: The model that the plan was made for.
        plan: What to do; None makes a plan from ``example_input`` and the options.
        example_input: As for ``plan``; only without a plan.
        inplace: Change the model itself instead of a copy.
        as_graph: Return the converted model's torch.fx GraphModule, with the DDF layers as nodes.
        **options: As for ``plan``; only without a plan.

    Returns:
        The converted copy, or the model itself if ``inplace``; in an ``nn.DataParallel`` if the model is.

    Raises:
        UsageError: The plan does not fit the model, or cannot be made. The model is then as it was.
    """
    if plan is None:
        if example_input is None:
            raise UsageError("convert needs a plan, or an example_input to make one")
        plan = make_plan(model, example_input, **options)
    elif example_input is not None or options:
        given = [*options, *(["example_input"] if example_input is not None else [])]
        raise UsageError(f"convert was given a plan and also {', '.join(given)}: those belong to plan()")
    inner = bare(model)
    paths = {names[0]: names for _, names in module_names(inner)}
    steps = [
        Replaced(names=paths.get(site.name, (site.name,)), replacement=site.replacement)
        for site in plan.replaced
        if site.replacement is not None
    ]
    before = recorded(inner)
    conversion = Conversion(
        source=before.source if before else describe(inner),
        replaced=(*(before.replaced if before else ()), *steps),
        configs=(*(before.configs if before else ()), plan.config),
    )
    if inplace and any(step.functional for step in steps):
        raise UsageError(
            "convolutions that are called as functions cannot be replaced in place: the model becomes a GraphModule;"
            " leave inplace out, or skip them in the plan"
        )
    layers = prepare(inner, steps)
    if not inplace:
        model = _copied(model)
        inner = bare(model)
    converted = swap(inner, layers)
    if as_graph and not isinstance(converted, fx.GraphModule):
        converted = build_graph(converted, describe(inner))
    inner.ddf_conversion = converted.ddf_conversion = conversion  # type: ignore[assignment]
    if converted is inner:
        return model
    return type(model)(converted) if model is not inner else converted


def recorded(model: nn.Module) -> Conversion | None:
    """The record of a model's conversion, if it was converted."""
    conversion = getattr(bare(model), "ddf_conversion", None)
    return conversion if isinstance(conversion, Conversion) else None


def prepare(model: nn.Module, steps: Sequence[Replaced]) -> dict[str, nn.Module]:
    """Checks that every step fits the model and builds its layer; the model and torch's random state stay as they are.

    Returns:
        The new layers, by the first name of the convolution that each replaces.

    Raises:
        UsageError: A step does not fit: no such module, another kind of module, other channels.
    """
    found = dict(model.named_modules(remove_duplicate=False))
    if any(step.functional for step in steps):
        found |= functional_convolutions(model)
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        return {step.names[0]: _built(_checked(model, found, step), step) for step in steps}


def swap(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Puts new layers in the places of old modules, wherever those are registered in the tree.

    Returns:
        The model; or, where convolutions that are called as functions are replaced, the GraphModule for it.
    """
    functions = {name: layer for name, layer in layers.items() if name.endswith("()")}
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items() if name not in functions}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    return replace_functions(model, functions) if functions else model


def _checked(model: nn.Module, modules: Mapping[str, nn.Module], step: Replaced) -> nn.Conv2d:
    """The convolution that a step replaces, once it is sure that it can."""
    options = step.replacement.options
    missing = [name for name in step.names if name not in modules]
    if missing:
        raise UsageError(
            f"the conversion does not fit {describe(model)}: it has no {missing[0]}{suggestion(missing[0], modules)}"
        )
    name, conv = step.names[0], modules[step.names[0]]
    if any(modules[other] is not conv for other in step.names):
        raise UsageError(
            f"the conversion does not fit {describe(model)}: {' and '.join(step.names)} should be one module"
        )
    reason = obstacle(conv)
    if reason is not None or not isinstance(conv, nn.Conv2d):
        raise UsageError(f"the conversion does not fit {describe(model)}: {name}: {reason}")
    actual: dict[str, int] = {
        "in_channels": conv.in_channels,
        "out_channels": conv.out_channels,
        "kernel_size": conv.kernel_size[0],
        "stride": conv.stride[0],
    }
    planned = {"out_channels": options.get("in_channels"), **options}
    for option, value in actual.items():
        if planned.get(option) != value:
            raise UsageError(
                f"the conversion does not fit {describe(model)}: {name} ({kind_of(conv)}) has {option} {value},"
                f" where the record has {planned.get(option)}"
            )
    return conv


def _built(conv: nn.Conv2d, step: Replaced) -> nn.Module:
    weight = conv.weight
    try:
        layer = build(step.replacement, device="meta" if weight.device.type == "meta" else "cpu")
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise UsageError(f"{step.names[0]}: the replacement cannot be built: {first_line(error)}") from error
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        layer = layer.to(memory_format=torch.channels_last)
    layer = layer.to(weight.device, weight.dtype)
    return layer.train(conv.training).requires_grad_(weight.requires_grad)


def _copied(model: nn.Module) -> nn.Module:
    try:
        with torch.inference_mode(False):  # or the copy could not be trained
            return copy.deepcopy(model)
    except Exception as error:
        raise UsageError(
            f"{type(model).__name__} cannot be copied: {error}; convert it in place with inplace=True"
        ) from error
