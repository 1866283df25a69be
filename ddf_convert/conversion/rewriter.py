"""Rewriting: replacements become edits of the model, all checked and built before the first one is applied."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ddf_convert.conversion.eligibility import build, geometry, kernel_for, kind_of, obstacle
from ddf_convert.conversion.interpolate_hook import intercept, obstacle_to_intercepting
from ddf_convert.conversion.plan import Action, Site
from ddf_convert.conversion.record import AppliedReplacement, note_origin
from ddf_convert.conversion.sites import (
    ARGUMENTS,
    OPTIONS,
    is_interpolate_call,
    layer_path,
    nearest_parameter,
    owner_of,
    site_modules,
)
from ddf_convert.conversion.tracer import Traced, build_graph, site_nodes
from ddf_convert.errors import DDFError, UsageError, first_line, suggestion
from ddf_convert.utils.modules import model_name


@dataclass(frozen=True)
class SwapModule:
    """Registers a layer wherever the module of that name is registered."""

    name: str
    layer: nn.Module


@dataclass(frozen=True)
class InterceptInterpolate:
    """Answers one ``F.interpolate`` call of the owner's forward by a layer.

    Without a layer, the owner's calls are merely not counted as those of an intercepted module around it.
    """

    owner: str
    attribute: str = ""
    layer: nn.Module | None = None


@dataclass(frozen=True)
class ReplaceCall:
    """Replaces a functional convolution in the torch.fx graph of the module at ``graph``."""

    name: str
    layer: nn.Module
    graph: str


Edit = SwapModule | InterceptInterpolate | ReplaceCall


def replacements_of(sites: Iterable[Site], model: nn.Module) -> list[AppliedReplacement]:
    """Lists the replacements that a plan's decisions mean for a model, in order.

    Raises:
        UsageError: A pixel shuffle is to be replaced with a convolution that is also replaced by itself.
    """
    sites = list(sites)
    paths = {names[0]: names for _, names in site_modules(model)}
    replaced = {site.name: site for site in sites if site.action is Action.REPLACE and site.replacement is not None}
    callers = _interpolating_modules(sites, model)
    replacements = []
    for site in replaced.values():
        assert site.replacement is not None
        names = paths.get(site.name, (site.name,))
        removed: tuple[str, ...] = ()
        apart: tuple[str, ...] = ()
        if site.convolution:
            if site.convolution in replaced:
                raise UsageError(
                    f"{site.name} is replaced together with {site.convolution}, which the plan replaces by itself too:"
                    " skip one of them"
                )
            names, removed = paths.get(site.convolution, (site.convolution,)), names
        elif is_interpolate_call(site.name):
            owner = owner_of(site.name)
            apart = tuple(name for name in callers if name != owner and (not owner or name.startswith(f"{owner}.")))
        replacements.append(AppliedReplacement(names=names, replacement=site.replacement, removed=removed, apart=apart))
    return replacements


def _interpolating_modules(sites: Sequence[Site], model: nn.Module) -> list[str]:
    """The modules whose forward calls ``F.interpolate``, and that stay."""
    modules = dict(model.named_modules())
    owners = [owner_of(site.name) for site in sites if is_interpolate_call(site.name)]
    kept = [
        site.name for site in sites if site.action is Action.SKIP and isinstance(modules.get(site.name), nn.Upsample)
    ]
    return list(dict.fromkeys([*owners, *kept]))


# --- from replacements to edits, to the model -------------------------------------------------------------------------


def apply_replacements(
    model: nn.Module, replacements: Sequence[AppliedReplacement], traced: Traced | None = None
) -> nn.Module:
    """Applies replacements to a model in place; torch's random state stays as it is.

    Args:
        model: The model.
        replacements: What to replace.
        traced: The graphs of the model that this one is a weightless copy of. Without them, the model is traced if
            functional convolutions are replaced.

    Returns:
        The model; or, where functional convolutions are replaced, the GraphModule that replaces it.

    Raises:
        UsageError: A replacement does not fit the model: no such module, another kind of module, other channels. The
            model is then as it was.
    """
    paths = {each.graph for each in replacements if each.functional}
    graph = traced.graph_over(model) if traced and paths == {""} else None
    graphs = trace_parts(model, paths) if graph is None else {"": graph}
    edits = make_edits(model, replacements, graphs)
    for edit in edits:
        if isinstance(edit, InterceptInterpolate):
            _intercept_interpolate(model, edit)
    swaps = {id(model.get_submodule(edit.name)): edit.layer for edit in edits if isinstance(edit, SwapModule)}
    for tree in (model, *graphs.values()):
        _swap_modules(tree, swaps)
    converted = model
    graph_is_stale = any(isinstance(edit, InterceptInterpolate) for edit in edits)
    for path in sorted(graphs, key=len, reverse=True):  # parts before what holds them
        graph_module = trace_parts(model, [path])[path] if graph_is_stale else graphs[path]
        part = model.get_submodule(path)
        calls = [edit for edit in edits if isinstance(edit, ReplaceCall) and edit.graph == path]
        converted = _replace_calls(graph_module, path, calls, type(part).__name__)
        if path:
            _swap_modules(model, {id(part): converted})
            converted, graph_is_stale = model, True
    return converted


def make_edits(
    model: nn.Module, replacements: Sequence[AppliedReplacement], graphs: Mapping[str, fx.GraphModule]
) -> list[Edit]:
    """Checks that every replacement fits the model and builds its layer; the model stays as it is.

    Raises:
        UsageError: One does not fit.
    """
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    modules |= functional_convolutions(graphs)
    edits: dict[str, Edit] = {}
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        for applied in replacements:
            name = applied.names[0]
            layer = _build_like(_check_fits(model, modules, applied), applied)
            if not applied.intercepted and (reason := attribute_in_the_way(modules[name], layer)) is not None:
                raise UsageError(f"{name} cannot be replaced: it {reason}")
            applied = applied.model_copy()  # a note of its own: layers with one note belong together
            note_origin(layer, applied)
            if applied.functional:
                edits[name] = ReplaceCall(name, layer, applied.graph)
            elif applied.intercepted:
                edits[name] = InterceptInterpolate(owner_of(name), layer_path(name).rpartition(".")[2], layer)
            else:
                edits[name] = SwapModule(name, layer)
            if applied.removed:
                identity = nn.Identity()
                note_origin(identity, applied)
                edits[applied.removed[0]] = SwapModule(applied.removed[0], identity)
    apart = dict.fromkeys(path for applied in replacements for path in applied.apart if path not in edits)
    return [*(InterceptInterpolate(path) for path in apart), *edits.values()]


def _intercept_interpolate(model: nn.Module, edit: InterceptInterpolate) -> None:
    intercept(model.get_submodule(edit.owner), {edit.attribute: edit.layer} if edit.layer is not None else {})


def _swap_modules(tree: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Registers new modules wherever the old ones, given by their ids, are registered."""
    for parent in list(tree.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in new:
                carry_over_attributes(child, new[id(child)])
                parent._modules[key] = new[id(child)]


def _replace_calls(
    graph_module: fx.GraphModule, path: str, edits: Sequence[ReplaceCall], class_name: str
) -> fx.GraphModule:
    """Returns a GraphModule that calls layers instead of functions, without the weights that only those used."""
    graph, calls = graph_module.graph, site_nodes(graph_module, path)
    for edit in edits:
        place = layer_path(edit.name).removeprefix(f"{path}." if path else "")
        graph_module.add_submodule(place, edit.layer)
        for node in calls[edit.name]:
            with graph.inserting_before(node):
                replaced = graph.call_module(place, (_argument(node, "input"),))
            node.replace_all_uses_with(replaced)
            operands = node.all_input_nodes
            graph.erase_node(node)
            for operand in operands:
                if operand.op == "get_attr" and not operand.users:
                    graph.erase_node(operand)
    # A new GraphModule takes over what its graph names, and nothing else.
    return fx.GraphModule(graph_module, graph, class_name)


# --- functional convolutions, in torch.fx graphs ----------------------------------------------------------------------


def trace_parts(model: nn.Module, paths: Iterable[str]) -> dict[str, fx.GraphModule]:
    """Traces parts of a model, each by itself, by their paths; "" is the whole model.

    Raises:
        UsageError: The model has no such part, or torch.fx cannot trace it.
    """
    parts, graphs = dict(model.named_modules(remove_duplicate=False)), {}
    for path in dict.fromkeys(paths):
        if path not in parts:
            raise UsageError(f"the conversion does not fit {model_name(model)}: it has no {path}")
        graphs[path] = build_graph(parts[path], model_name(parts[path]))
    return graphs


def functional_convolutions(graphs: Mapping[str, fx.GraphModule]) -> dict[str, nn.Conv2d]:
    """Returns, by the names of the calls, modules that do what functional convolutions with own parameters do.

    Their parameters are the model's.
    """
    convolutions = {}
    for path, graph_module in graphs.items():
        for name, nodes in site_nodes(graph_module, path).items():
            conv = _as_module(graph_module, nodes[0])
            if conv is not None:
                convolutions[name] = conv
    return convolutions


def _as_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Conv2d | None:
    """None where there is no such module: for transposed convolutions, computed weights, computed options."""
    if node.target is not torch.conv2d:
        return None
    weight, bias = (_parameter(graph_module, _argument(node, name)) for name in ("weight", "bias"))
    if weight is None or (bias is None and _argument(node, "bias") is not None):
        return None
    options: dict[str, Any] = {name: _argument(node, name, default) for name, default in OPTIONS.items()}
    options["kernel_size"] = tuple(weight.shape[2:])
    try:
        conv = nn.Conv2d(
            weight.shape[1] * options["groups"], weight.shape[0], **options, bias=bias is not None, device="meta"
        )
    except (TypeError, ValueError, RuntimeError):
        return None
    conv.weight, conv.bias = weight, bias
    return conv.train(graph_module.training)


def _argument(node: fx.Node, name: str, default: Any = None) -> Any:
    position = ARGUMENTS[torch.conv2d].index(name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _parameter(graph_module: fx.GraphModule, value: Any) -> nn.Parameter | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    owner, _, name = str(value.target).rpartition(".")
    tensor: Tensor | None = getattr(graph_module.get_submodule(owner), name)
    return tensor if isinstance(tensor, nn.Parameter) else None


# --- does a replacement fit? ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Template:
    """What a new layer takes over: device, dtype and layout of a weight, and the mode."""

    weight: Tensor | None
    training: bool


def _check_fits(model: nn.Module, modules: Mapping[str, nn.Module], applied: AppliedReplacement) -> _Template:
    """Checks that what a replacement replaces is in the model, as recorded."""

    def unfit(words: str) -> UsageError:
        return UsageError(f"the conversion does not fit {model_name(model)}: {words}")

    name = applied.names[0]
    if (applied.intercepted or applied.functional) and len(applied.names) > 1:
        raise unfit(f"{name} is one call of a function, and the record has {len(applied.names)} names for it")
    if applied.apart and not applied.intercepted:
        raise unfit(f"{name}: only calls of F.interpolate are kept apart from others, not {applied.apart[0]}")
    needed = (owner_of(name),) if applied.intercepted else applied.names
    for missing in (each for each in (*needed, *applied.removed, *applied.apart) if each not in modules):
        raise unfit(f"it has no {missing}{suggestion(missing, modules)}")
    for names in (needed, applied.removed):
        if any(modules[other] is not modules[names[0]] for other in names[1:]):
            raise unfit(f"{' and '.join(names)} should be one module")
    old = modules[needed[0]]
    if applied.intercepted:
        if (reason := obstacle_to_intercepting(old)) is not None:
            raise unfit(f"{name}: {reason}")
        attribute = layer_path(name).rpartition(".")[2]
        if hasattr(old, attribute):
            raise unfit(f"{needed[0] or 'it'} has {attribute} already")
        return _Template(nearest_parameter(model, name), old.training)
    expected = _replaced_class(applied)
    reason = obstacle(old, upsample=expected is not nn.Conv2d or bool(applied.removed))
    if reason is None and not isinstance(old, expected):
        reason = f"is {type(old).__name__}, where the record has {expected.__name__}"
    if reason is not None:
        raise unfit(f"{name}: {reason}")
    replacement = applied.replacement
    planned = {"out_channels": replacement.options.get("in_channels"), **replacement.options}
    for part in (replacement.interpolation, replacement.mix):
        planned |= dict(part) if part else {}
    shuffle = modules[applied.removed[0]] if applied.removed else None
    for option, value in _options_of(old, shuffle).items():
        if planned.get(option) != value:
            raise unfit(f"{name} ({kind_of(old)}) has {option} {value}, where the record has {planned.get(option)}")
    weight = nearest_parameter(model, name) if isinstance(old, nn.Upsample) else old.weight
    assert weight is None or isinstance(weight, Tensor)
    return _Template(weight, old.training)


def _replaced_class(applied: AppliedReplacement) -> type[nn.Module]:
    if applied.replacement.interpolation:
        return nn.Upsample
    return nn.ConvTranspose2d if applied.replacement.is_ddf_up and not applied.removed else nn.Conv2d


def _options_of(old: nn.Module, shuffle: nn.Module | None) -> dict[str, Any]:
    """The options of a module, and of the pixel shuffle behind it, that the new layer's have to agree with."""
    if isinstance(old, nn.Upsample):
        factors = {old.scale_factor} if not isinstance(old.scale_factor, tuple) else set(old.scale_factor)
        factor = factors.pop() if len(factors) == 1 else old.scale_factor
        return {"scale_factor": factor, "mode": old.mode, "align_corners": bool(old.align_corners)}
    assert isinstance(old, nn.Conv2d | nn.ConvTranspose2d)
    size, stride = old.kernel_size[0], old.stride[0]
    options: dict[str, Any] = {"in_channels": old.in_channels, "out_channels": old.out_channels}
    if isinstance(old, nn.ConvTranspose2d):
        return options | {"scale_factor": stride, "kernel_size": kernel_for(size, stride, int(old.padding[0]))}
    if shuffle is None:
        return options | geometry(old)
    factor = shuffle.upscale_factor if isinstance(shuffle, nn.PixelShuffle) else 0
    channels = old.out_channels // max(factor, 1) ** 2
    return options | {"out_channels": channels, "kernel_size": size, "scale_factor": factor}


def _build_like(template: _Template, applied: AppliedReplacement) -> nn.Module:
    weight = torch.empty(0) if template.weight is None else template.weight
    try:
        layer = build(applied.replacement, device="meta" if weight.device.type == "meta" else "cpu")
    except DDFError:
        raise
    except KeyError as error:
        raise UsageError(f"{applied.names[0]}: the replacement cannot be built: it has no {error}") from error
    except Exception as error:  # options are whatever a file says, and users register layer types of their own
        raise UsageError(f"{applied.names[0]}: the replacement cannot be built: {first_line(error)}") from error
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        layer = layer.to(memory_format=torch.channels_last)
    layer = layer.to(weight.device, weight.dtype)
    return layer.train(template.training)  # trainable, also where the old module was frozen: its weights are random


# --- attributes that code has set on a module -------------------------------------------------------------------------

_CONSTRUCTOR_ARGUMENTS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Conv2d: (1, 1, 1),
    nn.ConvTranspose2d: (1, 1, 1),
    nn.Upsample: (),
    nn.PixelShuffle: (1,),
}
# What every module has itself; a compiled call would run the old module.
_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl", "_reversed_padding_repeated_twice"}


def carry_over_attributes(old: nn.Module, new: nn.Module) -> None:
    """Gives a new layer the plain attributes of the module that it replaces, such as those that a library set on it.

    Values that a subclass gives to its class go over too, and methods bound to the module are bound to the layer.
    Parameters, buffers, submodules, hooks, and what the layer has itself do not.
    """
    for name, value in _plain_attributes(old).items():
        if not _defines(new, name):
            bound_to_old = isinstance(value, MethodType) and value.__self__ is old
            new.__dict__[name] = MethodType(value.__func__, new) if bound_to_old else value


def attribute_in_the_way(old: nn.Module, new: nn.Module) -> str | None:
    """Says why a layer cannot take over what code has set on a module: it needs the name itself; None if it can."""
    by_torch = next((names for kind, names in _attributes_by_torch() if isinstance(old, kind)), frozenset())
    taken = next((name for name in _plain_attributes(old) if name not in by_torch and _defines(new, name)), None)
    return taken and f"has an attribute {taken!r}, a name that {type(new).__name__} needs for itself"


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    classes = [kind for kind in type(module).__mro__ if not any(issubclass(t, kind) for t in _CONSTRUCTOR_ARGUMENTS)]
    of_classes = {
        name: value
        for kind in reversed(classes)
        for name, value in vars(kind).items()
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
    }
    return {name: value for name, value in {**of_classes, **vars(module)}.items() if name not in _INTERNAL}


@cache
def _attributes_by_torch() -> tuple[tuple[type[nn.Module], frozenset[str]], ...]:
    """The attributes that the constructors of torch's own classes set."""
    with torch.device("meta"):  # draws no random numbers
        return tuple((kind, frozenset(vars(kind(*given)))) for kind, given in _CONSTRUCTOR_ARGUMENTS.items())


def _defines(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a value or part of that name, or a method or property that not all modules have."""
    if any(name in names for names in (vars(layer), layer._parameters, layer._buffers, layer._modules)):
        return True
    attribute = inspect.getattr_static(type(layer), name, None)
    inherited = attribute is inspect.getattr_static(nn.Module, name, None)
    return not inherited and (callable(attribute) or hasattr(attribute, "__get__"))
