"""Swapping: every new layer is checked against the model and built first; then all go into the module tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from ddf_convert.errors import UsageError
from ddf_convert.graph.build import build, kind_of, obstacle
from ddf_convert.graph.functional import functional_convolutions, replace_functions
from ddf_convert.graph.plan import Action, Replacement, Site, suggestion
from ddf_convert.graph.record import first_line
from ddf_convert.graph.sites import module_names
from ddf_convert.graph.trace import describe


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
        return _is_functional(self.names[0])


def _is_functional(name: str) -> bool:
    """Whether a name is that of a functional call (see ``record.function_name``), which no module's path can be."""
    return name.endswith("()")


def steps_of(sites: Iterable[Site], model: nn.Module) -> list[Replaced]:
    """What a plan's decisions come to for a model, in order."""
    paths = {names[0]: names for _, names in module_names(model)}
    return [
        Replaced(names=paths.get(site.name, (site.name,)), replacement=site.replacement)
        for site in sites
        if site.action is Action.REPLACE and site.replacement is not None
    ]


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
    functions = {name: layer for name, layer in layers.items() if _is_functional(name)}
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
