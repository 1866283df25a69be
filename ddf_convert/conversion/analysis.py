"""Analysis: the convolutions and upsamplings of a model, their calls, and their neighbors in the graph."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ddf_convert.conversion.plan import FoundBy
from ddf_convert.conversion.recorder import Call, Recording
from ddf_convert.conversion.sites import nearest_parameter, owner_of, site_kinds, site_modules
from ddf_convert.conversion.tracer import VALUE, Traced, is_channelwise_node, is_multiplication, node_module

_ModuleNames = Mapping[str, tuple[nn.Module, tuple[str, ...]]]


@dataclass(frozen=True)
class Candidate:
    """A convolution, or an upsampling, before anything is decided about it."""

    names: tuple[str, ...]  # every path of the module; a functional call has one name
    module: nn.Module | None  # the user's own; None for a functional call
    calls: tuple[Call, ...]  # in the forward pass, in order
    found_by: FoundBy = FoundBy.FX
    caution: str = ""  # what is not known of it, and why
    bottleneck: bool = False  # 1x1 convolutions stand on both sides of every call
    used_directly: bool = False  # the forward pass also reads its weights itself
    shared_with: str | None = None  # another module that holds the same weight or bias
    used_elsewhere: bool = False  # something else uses the weights of a functional call too
    owner: nn.Module | None = None  # the module that makes the calls of a functional upsampling
    dtype: torch.dtype = torch.float32  # of the parameters around it, if it has none
    fed_by: str = ""  # the convolution whose output only this pixel shuffle reads
    on_image: bool = False  # called before any convolution is

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def find_candidates(model: nn.Module, recording: Recording, traced: Traced) -> list[Candidate]:
    """Lists every 2D convolution, in the order of the forward pass, then those that it does not reach.

    Upsamplings are listed if they were recorded. What is inside a layer of an earlier conversion is not listed.
    """
    calls: dict[str, list[Call]] = {}
    for call in recording.calls:
        calls.setdefault(call.name, []).append(call)
    modules = {names[0]: (module, names) for module, names in site_modules(model, recording.kinds)}
    early = _called_before_convolutions(recording, modules)
    holders = _holders(model)
    candidates = []
    for name in dict.fromkeys([*calls, *modules]):
        module, names = modules.get(name, (None, (name,)))
        own_calls = tuple(calls.get(name, ()))
        parameters = [] if module is None else [value for value in module._parameters.values() if value is not None]
        sharing = [path for parameter in parameters for path in holders[id(parameter)] if path not in names]
        nodes, found_by, caution = _nodes_of(name, own_calls, recording, traced)
        like = nearest_parameter(model, name)
        candidates.append(
            Candidate(
                names=names,
                module=module,
                calls=own_calls,
                found_by=found_by,
                caution=caution,
                bottleneck=bool(nodes) and module is not None and all(map(is_bottleneck, nodes)),
                used_directly=not recording.read_directly.isdisjoint(names),
                shared_with=next(iter(sharing), None),
                used_elsewhere=_is_used_elsewhere(own_calls, recording, modules),
                owner=model.get_submodule(owner_of(name)) if own_calls and own_calls[0].upsampled else None,
                dtype=torch.float32 if like is None else like.dtype,
                fed_by=_producer(nodes, traced) if isinstance(module, nn.PixelShuffle) else "",
                on_image=name in early,
            )
        )
    return candidates


def _called_before_convolutions(recording: Recording, modules: _ModuleNames) -> set[str]:
    early: set[str] = set()
    for call in recording.calls:
        module, _ = modules.get(call.name, (None, ()))
        if call.function is not None or isinstance(module, site_kinds(upsample=False)):
            return early
        early.add(call.name)
    return set()  # nothing comes before a convolution where none is called


def _producer(nodes: list[fx.Node], traced: Traced) -> str:
    """The convolution whose output a pixel shuffle, called once, is the only reader of; "" if there is none."""
    if len(nodes) != 1 or not nodes[0].args or not isinstance(source := nodes[0].args[0], fx.Node):
        return ""
    reader = nodes[0]
    while _is_identity(source) and list(source.users) == [reader] and isinstance(source.args[0], fx.Node):
        reader, source = source, source.args[0]
    if list(source.users) != [reader]:
        return ""
    return next((name for piece in traced.pieces for name, calls in piece.nodes.items() if calls == [source]), "")


def _is_identity(node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(node_module(node), nn.Identity)


def _nodes_of(
    name: str, calls: tuple[Call, ...], recording: Recording, traced: Traced
) -> tuple[list[fx.Node], FoundBy, str]:
    """The nodes of a site's calls, if the graphs hold all of them; how it was found, and what is not known."""
    pieces = [piece for piece in traced.pieces if name in piece.nodes]
    nodes = [node for piece in pieces for node in piece.nodes[name]]
    complete = sum(piece.entries * len(piece.nodes[name]) for piece in pieces) == len(calls)
    if complete and all(not piece.path for piece in pieces):
        return nodes, FoundBy.FX, ""
    path, reason = traced.why_untraced(name)
    class_name = type(recording.copied.module.get_submodule(path)).__name__
    inside = f"inside {path or 'the model'} ({class_name}), which {reason}" if reason else ""
    if complete:
        return nodes, FoundBy.PIECES, f"{inside}: of what surrounds this piece nothing is known"
    return [], FoundBy.HOOKS, f"{inside or 'called where torch.fx does not see it'}: of its neighbors nothing is known"


def _is_used_elsewhere(calls: tuple[Call, ...], recording: Recording, modules: Container[str]) -> bool:
    """Whether something else uses the parameters of a functional call."""
    function = calls[0].function if calls else None
    parameters = function.parameters if function else ()
    return any(recording.uses[path] != len(calls) or owner_of(path) in modules for path in parameters)


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each parameter, by the parameter's id."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path or type(model).__name__)
    return holders


# --- bottlenecks ------------------------------------------------------------------------------------------------------


def is_bottleneck(node: fx.Node) -> bool:
    """Whether a dense 1x1 convolution produces a convolution's input and is all that consumes its output.

    Channelwise operations may stand between, and gates: the feature times something computed from itself (squeeze and
    excitation). A residual addition, a concatenation or the model's output may not: they would meet channels that
    nothing has mixed.
    """
    return _is_produced_by_1x1(node) and _is_consumed_by_1x1(node)


def _is_produced_by_1x1(node: fx.Node) -> bool:
    current = _first_input(node)
    while current is not None and not _is_dense_1x1(current):
        if is_multiplication(current):
            current = _gated_feature(current)
        elif is_channelwise_node(current):
            current = _first_input(current)
        else:
            return False
    return current is not None


def _is_consumed_by_1x1(node: fx.Node) -> bool:
    features = {node}
    gates: set[fx.Node] = set()
    waiting = [node]
    mixed = False
    while waiting:
        feature = waiting.pop()
        users = list(feature.users)
        # Gates first: what computes a gate may reshape or mix as it likes, the feature itself passes by.
        for user in users:
            if is_multiplication(user) and _gated_feature(user, features):
                for operand in user.all_input_nodes:
                    gates |= _computed_from(operand, features) or set()
        for user in users:
            if user in gates or user in features or not _carries_channels(user):
                continue
            if _is_dense_1x1(user):
                mixed = True
            elif _gated_feature(user, features) if is_multiplication(user) else is_channelwise_node(user):
                if not _keeps_channels(feature, user):
                    return False
                features.add(user)
                waiting.append(user)
            else:
                return False
    return mixed


def _gated_feature(node: fx.Node, features: set[fx.Node] | None = None) -> fx.Node | None:
    """The feature that a multiplication gates: its other side is a number, a parameter, or computed from the feature.

    ``features`` are the nodes that count as the feature; without them, each side is tried against the other.
    """
    operands = list(node.all_input_nodes)
    if len(operands) == 1:
        return operands[0]
    for side, gate in (operands, operands[::-1]):
        feature = {side} if features is None else features
        if side in feature and _keeps_channels(side, node) and _computed_from(gate, feature) is not None:
            return side
    return None


def _computed_from(node: fx.Node, features: set[fx.Node]) -> set[fx.Node] | None:
    """The nodes that compute ``node`` from the features and the model's parameters; None if anything else is in it."""
    nodes: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in features or current in nodes:
            continue
        if current.op == "placeholder":
            return None
        nodes.add(current)
        waiting.extend(current.all_input_nodes)
    return nodes


def _first_input(node: fx.Node) -> fx.Node | None:
    return next(iter(node.all_input_nodes), None)


def _keeps_channels(before: fx.Node, after: fx.Node) -> bool:
    channels = [
        value.shape[1] if isinstance(value, Tensor) and value.dim() == 4 else None
        for value in (before.meta.get(VALUE), after.meta.get(VALUE))
    ]
    return channels[0] is not None and channels[0] == channels[1]


def _carries_channels(node: fx.Node) -> bool:
    """False for sizes, numbers and dtypes; an unknown value may carry channels."""
    if VALUE not in node.meta:
        return True
    value = node.meta[VALUE]
    if isinstance(value, tuple | list):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor | dict)


def _is_dense_1x1(node: fx.Node) -> bool:
    """Whether a node is a 1x1 convolution over all channels, as a module or as a function."""
    if node.op == "call_module":
        module = node_module(node)
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    if node.op == "call_function" and node.target is torch.conv2d:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        value = weight.meta.get(VALUE) if isinstance(weight, fx.Node) else weight
        feature = _first_input(node)
        if not isinstance(value, Tensor) or feature is None or not isinstance(feature.meta.get(VALUE), Tensor):
            return False
        return tuple(value.shape[2:]) == (1, 1) and value.shape[1] == feature.meta[VALUE].shape[1]
    return False
