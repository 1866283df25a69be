"""Swapping: every new layer is checked against the model and built first; then all go into the module tree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ddf_convert.conversion.analysis import module_names, neighbor
from ddf_convert.conversion.attributes import attribute_in_the_way, carry_over_attributes
from ddf_convert.conversion.eligibility import build, geometry, kernel_for, kind_of, obstacle
from ddf_convert.conversion.functional import functional_convolutions_in, place_of, replace_functions
from ddf_convert.conversion.interpolate_hook import Apart, intercept, is_intercepted, obstacle_to_intercepting
from ddf_convert.conversion.origin import Origin, note, origin_of
from ddf_convert.conversion.plan import Action, Replacement, Site
from ddf_convert.conversion.tracer import describe
from ddf_convert.errors import DDFError, UsageError, first_line, suggestion


class Replaced(BaseModel):
    """One convolution, or one upsampling, that was replaced.

    Attributes:
        names: Every path at which it was registered; for one that was called as a function, its name in the plan.
        replacement: What took its place.
        removed: Every path of the pixel shuffle that is part of what took its place.
        apart: Of an interpolation that is called as a function, the modules inside the one that calls it that call the
            same function, and stay as they are.
        graph: Of a convolution that was called as a function, the path of the module that becomes a GraphModule for
            it: a part that was converted by itself; "" is the whole model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: tuple[str, ...] = Field(min_length=1)
    replacement: Replacement
    removed: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    graph: str = ""

    @property
    def functional(self) -> bool:
        """Whether it is a convolution that was called as a function."""
        return _is_functional(self.names[0])

    @property
    def intercepted(self) -> bool:
        """Whether it is an interpolation that was called as a function."""
        return is_intercepted(self.names[0])

    @property
    def places(self) -> tuple[str, ...]:
        """Every path of the new layer in the converted model."""
        return tuple(map(place_of, self.names)) if self.functional or self.intercepted else self.names


def _is_functional(name: str) -> bool:
    """Whether a name is that of a functional call (see ``record.function_name``), which no module's path can be."""
    return name.endswith("()") and not is_intercepted(name)


def steps_of(sites: Iterable[Site], model: nn.Module) -> list[Replaced]:
    """What a plan's decisions come to for a model, in order.

    Raises:
        UsageError: A pixel shuffle is to be replaced together with a convolution that is replaced by itself too.
    """
    sites = list(sites)
    paths = {names[0]: names for _, names in module_names(model)}
    replaced = [site for site in sites if site.action is Action.REPLACE and site.replacement is not None]
    known = {site.name for site in replaced}
    callers = _callers(sites, model)
    steps = []
    for site in replaced:
        assert site.replacement is not None
        names = paths.get(site.name, (site.name,))
        if site.convolution:
            if site.convolution in known:
                raise UsageError(
                    f"{site.name} is replaced together with {site.convolution}, which the plan replaces by itself too:"
                    " skip one of them"
                )
            convolution = paths.get(site.convolution, (site.convolution,))
            steps.append(Replaced(names=convolution, replacement=site.replacement, removed=names))
        elif is_intercepted(site.name):
            owner = _owner(site.name)
            inside = tuple(name for name in callers if name != owner and (not owner or name.startswith(f"{owner}.")))
            steps.append(Replaced(names=names, replacement=site.replacement, apart=inside))
        else:
            steps.append(Replaced(names=names, replacement=site.replacement))
    return steps


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _callers(sites: Sequence[Site], model: nn.Module) -> list[str]:
    """The modules whose forward interpolates, and that stay."""
    modules = dict(model.named_modules())
    owners = (_owner(site.name) for site in sites if is_intercepted(site.name))
    kept = (
        site.name for site in sites if site.action is Action.SKIP and isinstance(modules.get(site.name), nn.Upsample)
    )
    return list(dict.fromkeys((*owners, *kept)))


def prepare(model: nn.Module, steps: Sequence[Replaced]) -> dict[str, nn.Module]:
    """Checks that every step fits the model and builds its layer; the model and torch's random state stay as they are.

    Returns:
        The new layers, by the first name of what each replaces. Among them are an ``Identity`` for each pixel shuffle
        that goes, and a mark for each module that stays and has to be kept apart.

    Raises:
        UsageError: A step does not fit: no such module, another kind of module, other channels.
    """
    found = dict(model.named_modules(remove_duplicate=False))
    found |= functional_convolutions_in(model, (step.graph for step in steps if step.functional))
    prepared: dict[str, nn.Module] = {}
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for step in steps:
            layer = prepared[step.names[0]] = _built(_checked(model, found, step), step)
            if not step.intercepted and (reason := attribute_in_the_way(found[step.names[0]], layer)) is not None:
                raise UsageError(f"{step.names[0]} cannot be replaced: it {reason}")
            call = step.names[0].rpartition(".")[2] if step.functional or step.intercepted else ""
            origin = Origin(step.replacement, call, bool(step.removed), step.graph)
            note(layer, origin)
            for name in step.removed[:1]:
                prepared[name] = nn.Identity()
                note(prepared[name], origin)
            prepared |= {name: Apart() for name in step.apart if name not in prepared}
    return prepared


def swap(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Puts new layers in the places of old modules, wherever those are registered in the tree.

    Args:
        model: The model; it changes.
        layers: As :func:`prepare` gives them.

    Returns:
        The model; or, where convolutions that are called as functions are replaced, the GraphModule for it.
    """
    functions = {name: layer for name, layer in layers.items() if _is_functional(name)}
    calls = {name: layer for name, layer in layers.items() if is_intercepted(name)}
    apart = [name for name, layer in layers.items() if isinstance(layer, Apart)]
    others = layers.keys() - functions.keys() - calls.keys() - set(apart)
    new = {id(model.get_submodule(name)): layers[name] for name in layers if name in others}
    for name in apart:
        intercept(model.get_submodule(name))
    for name, layer in calls.items():
        owner, _, attribute = place_of(name).rpartition(".")
        intercept(model.get_submodule(owner), {attribute: layer})
    _put(model, new)
    by_graph: dict[str, dict[str, nn.Module]] = {}
    for name, layer in functions.items():
        origin = origin_of(layer)
        by_graph.setdefault(origin.graph if origin else "", {})[name] = layer
    whole = by_graph.pop("", {})
    for graph, inside in by_graph.items():
        part = model.get_submodule(graph)
        relative = {name.removeprefix(f"{graph}."): layer for name, layer in inside.items()}
        _put(model, {id(part): replace_functions(part, relative)})
    return replace_functions(model, whole) if whole else model


def _put(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Registers new modules wherever the old ones, which are known by their ids, are registered."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in new:
                carry_over_attributes(child, new[id(child)])
                parent._modules[key] = new[id(child)]


@dataclass(frozen=True)
class _Like:
    """What a new layer takes over.

    Attributes:
        weight: For device, dtype and layout; None if nothing around has any.
        training: The mode.
    """

    weight: Tensor | None
    training: bool


def _checked(model: nn.Module, modules: Mapping[str, nn.Module], step: Replaced) -> _Like:
    """What a step replaces, once it is sure that it can."""

    def unfit(words: str) -> UsageError:
        return UsageError(f"the conversion does not fit {describe(model)}: {words}")

    options, name = step.replacement.options, step.names[0]
    if (step.intercepted or step.functional) and len(step.names) > 1:
        raise unfit(f"{name} is one call of a function, and the record has {len(step.names)} names for it")
    if step.apart and not step.intercepted:
        raise unfit(f"{name}: only calls of F.interpolate are kept apart from others, not {step.apart[0]}")
    needed = (_owner(name),) if step.intercepted else step.names
    for missing in (each for each in (*needed, *step.removed, *step.apart) if each not in modules):
        raise unfit(f"it has no {missing}{suggestion(missing, modules)}")
    for names in (needed, step.removed):
        if any(modules[other] is not modules[names[0]] for other in names[1:]):
            raise unfit(f"{' and '.join(names)} should be one module")
    place = modules[needed[0]]
    if step.intercepted:
        if (reason := obstacle_to_intercepting(place)) is not None:
            raise unfit(f"{name}: {reason}")
        if hasattr(place, place_of(name).rpartition(".")[2]):
            raise unfit(f"{needed[0] or 'it'} has {place_of(name).rpartition('.')[2]} already")
        return _Like(neighbor(model, name), place.training)
    expected = _replaced_by(step)
    reason = obstacle(place, upsample=expected is not nn.Conv2d or bool(step.removed))
    if reason is None and not isinstance(place, expected):
        reason = f"is {type(place).__name__}, where the record has {expected.__name__}"
    if reason is not None:
        raise unfit(f"{name}: {reason}")
    interpolation = step.replacement.interpolation
    planned = {"out_channels": options.get("in_channels"), **options}
    for part in (interpolation, step.replacement.mix):
        planned |= dict(part) if part else {}
    shuffle = modules[step.removed[0]] if step.removed else None
    for option, value in _actual(place, shuffle).items():
        if planned.get(option) != value:
            raise unfit(f"{name} ({kind_of(place)}) has {option} {value}, where the record has {planned.get(option)}")
    weight = neighbor(model, name) if isinstance(place, nn.Upsample) else place.weight
    assert weight is None or isinstance(weight, Tensor)
    return _Like(weight, place.training)


def _replaced_by(step: Replaced) -> type[nn.Module]:
    """The kind of module that a step replaces."""
    if step.replacement.interpolation:
        return nn.Upsample
    return nn.ConvTranspose2d if step.replacement.is_ddf_up and not step.removed else nn.Conv2d


def _actual(place: nn.Module, shuffle: nn.Module | None) -> dict[str, Any]:
    """Of what stands in a place, what the new layer's options have to agree with."""
    if isinstance(place, nn.Upsample):
        factors = {place.scale_factor} if not isinstance(place.scale_factor, tuple) else set(place.scale_factor)
        factor = factors.pop() if len(factors) == 1 else place.scale_factor
        return {"scale_factor": factor, "mode": place.mode, "align_corners": bool(place.align_corners)}
    assert isinstance(place, nn.Conv2d | nn.ConvTranspose2d)
    size, stride = place.kernel_size[0], place.stride[0]
    actual: dict[str, Any] = {"in_channels": place.in_channels, "out_channels": place.out_channels}
    if isinstance(place, nn.ConvTranspose2d):
        return actual | {"scale_factor": stride, "kernel_size": kernel_for(size, stride, int(place.padding[0]))}
    if shuffle is None:
        return actual | geometry(place)
    factor = shuffle.upscale_factor if isinstance(shuffle, nn.PixelShuffle) else 0
    channels = place.out_channels // max(factor, 1) ** 2
    return actual | {"out_channels": channels, "kernel_size": size, "scale_factor": factor}


def _built(like: _Like, step: Replaced) -> nn.Module:
    weight = torch.empty(0) if like.weight is None else like.weight
    try:
        layer = build(step.replacement, device="meta" if weight.device.type == "meta" else "cpu")
    except DDFError:
        raise
    except KeyError as error:
        raise UsageError(f"{step.names[0]}: the replacement cannot be built: it has no {error}") from error
    except Exception as error:  # options are whatever a file says, and filters may be of anybody's making
        raise UsageError(f"{step.names[0]}: the replacement cannot be built: {first_line(error)}") from error
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        layer = layer.to(memory_format=torch.channels_last)
    layer = layer.to(weight.device, weight.dtype)
    return layer.train(like.training)  # trainable, also where the old module was frozen: its weights are random
