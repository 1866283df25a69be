"""Conversions of parts: the steps that made a model what it is, read from its layers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from ddf_convert.conversion.interpolate_hook import is_intercepted, is_intercepting
from ddf_convert.conversion.origin import Origin, origin_of
from ddf_convert.conversion.registry import replacing_layers
from ddf_convert.conversion.rewriter import Replaced


@dataclass
class _Places:
    """Where a layer stands, and what belongs to it."""

    origin: Origin
    layer: list[str] = field(default_factory=list)
    shuffle: list[str] = field(default_factory=list)


def steps_in(model: nn.Module) -> tuple[list[Replaced], list[tuple[str, str]]]:
    """Every step that conversions of a model, of its parts, or of a model around it, took inside it.

    Args:
        model: Any module; if it is itself a layer that a conversion made, that is no step.

    Returns:
        The steps, in the order of the module tree; and the layers of which only half of a step is inside the model,
        with what is missing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[tuple[int, int], _Places] = {}
    shuffles: dict[int, list[str]] = {}
    for path, module in modules.items():
        origin = origin_of(module)
        if origin is None or not path:
            continue
        if isinstance(module, nn.Identity):
            shuffles.setdefault(id(origin), []).append(path)
        else:
            found.setdefault((id(origin), id(module)), _Places(origin)).layer.append(path)
    steps: list[Replaced] = []
    halves: list[tuple[str, str]] = []
    for (origin_id, _), places in found.items():
        places.shuffle = shuffles.pop(origin_id, [])
        if missing := _missing(places, modules):
            halves.append((places.layer[0], missing))
        else:
            steps.append(_step(places, modules))
    for paths in shuffles.values():
        halves.append((paths[0], "was replaced together with a convolution that is not in it"))
    return steps, halves


def is_still_there(step: Replaced, model: nn.Module) -> bool:
    """Whether what a step put into a model is in it."""
    for place in step.places:
        try:
            module = model.get_submodule(place)
        except AttributeError:
            continue
        if origin_of(module) is not None or isinstance(module, replacing_layers()):
            return True
    return False


def outstanding(model: nn.Module, steps: tuple[Replaced, ...]) -> list[Replaced]:
    """The steps that a fresh model still has to go through: all, but for those that its constructor took for parts.

    A model that was converted itself is no fresh model: of it, all are outstanding, and so it will be refused.
    """
    if "ddf_conversion" in vars(model):
        return list(steps)
    done = {(name, step.replacement.model_dump_json()) for step in steps_in(model)[0] for name in step.names}
    return [step for step in steps if (step.names[0], step.replacement.model_dump_json()) not in done]


def _missing(places: _Places, modules: dict[str, nn.Module]) -> str:
    """What a step needs and the model does not hold, in words; "" if the step is whole."""
    if places.origin.removes and not places.shuffle:
        return "was replaced together with a pixel shuffle that is not in it"
    if places.origin.call and not _owner(places.layer[0], modules):
        return "replaces a call of a function, and the code that calls it is not in it"
    return ""


def _owner(path: str, modules: dict[str, nn.Module]) -> list[str]:
    """The module whose code calls a layer in the place of a function: that interpolates, or the GraphModule around."""
    owner = path.rpartition(".")[0]
    if is_intercepting(type(modules[owner])):
        return [owner]
    while owner and not isinstance(modules[owner], fx.GraphModule):
        owner = owner.rpartition(".")[0]
    return [owner] if isinstance(modules[owner], fx.GraphModule) else []


def _step(places: _Places, modules: dict[str, nn.Module]) -> Replaced:
    origin = places.origin
    if not origin.call:
        return Replaced(names=tuple(places.layer), replacement=origin.replacement, removed=tuple(places.shuffle))
    around = places.layer[0].rpartition(".")[0]
    name = f"{around}.{origin.call}" if around else origin.call
    (owner,) = _owner(places.layer[0], modules)
    if isinstance(modules[owner], fx.GraphModule):
        graph = "" if is_intercepted(name) else owner
        return Replaced(names=(name,), replacement=origin.replacement, graph=graph)
    inside = f"{owner}." if owner else ""
    apart = [
        path
        for path, module in modules.items()
        if path.startswith(inside) and path != owner and is_intercepting(type(module))
    ]
    return Replaced(names=(name,), replacement=origin.replacement, apart=tuple(apart))
