"""Sites: every convolution of a traced model, its calls, and whether 1x1 convolutions mix channels on both sides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ddf_convert.graph.channelwise import is_channelwise_node, is_multiplication
from ddf_convert.graph.trace import CONVOLUTIONS, Call, Traced
from ddf_convert.layers import DDF2d, DDFConv2d


@dataclass(frozen=True)
class Convolution:
    """One convolution of the model, before anything is decided about it.

    Attributes:
        names: Every path at which the module is registered; for a functional call, the fx node's name.
        module: The user's own module; None for a functional call.
        calls: Its calls in the forward pass, in order.
        bottleneck: 1x1 convolutions stand before and after every call, and nothing else meets the feature between.
        enclosing: Path and class of the untraced module that it runs inside of, if any.
        used_directly: The forward pass also reads its weight or bias by itself.
        shared_with: Another convolution (or other module) that holds the same weight or bias, if any.
    """

    names: tuple[str, ...]
    module: nn.Module | None
    calls: tuple[Call, ...]
    bottleneck: bool = False
    enclosing: str | None = None
    used_directly: bool = False
    shared_with: str | None = None

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def find_convolutions(model: nn.Module, traced: Traced) -> list[Convolution]:
    """Every 2D convolution of a model: in the order of the forward pass, then those that it does not reach.

    The convolutions that belong to a DDF layer are part of it and not listed.
    """
    graph = traced.graph_module.graph
    calls: dict[str, list[Call]] = {}
    for call in traced.calls:
        calls.setdefault(call.name, []).append(call)
    modules = module_names(model)
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    holders = _holders(model)
    found = {names[0]: _site(module, names, tuple(calls.get(names[0], ())), read, holders) for module, names in modules}
    functional = {
        name: Convolution((name,), None, tuple(own))
        for name, own in calls.items()
        if own[0].node.op == "call_function" and name not in found
    }
    everything = {**found, **functional}
    called = [name for name in calls if name in everything]
    return [everything[name] for name in dict.fromkeys([*called, *found])]


def module_names(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Every convolution module below the model, with all its paths, in the order of registration."""
    names: dict[int, tuple[nn.Module, list[str]]] = {}
    inside_ddf: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or path.startswith(inside_ddf):
            continue
        if isinstance(module, CONVOLUTIONS):
            names.setdefault(id(module), (module, []))[1].append(path)
        if isinstance(module, DDF2d | DDFConv2d):
            inside_ddf = (*inside_ddf, f"{path}.")
    return [(module, tuple(paths)) for module, paths in names.values()]


def _site(
    module: nn.Module, names: tuple[str, ...], calls: tuple[Call, ...], read: set[str], holders: dict[int, list[str]]
) -> Convolution:
    enclosing = next((call.node for call in calls if call.node.target != names[0]), None)
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    sharing = [path for parameter in parameters for path in holders[id(parameter)] if path not in names]
    return Convolution(
        names=names,
        module=module,
        calls=calls,
        bottleneck=bool(calls) and enclosing is None and all(is_bottleneck(call.node) for call in calls),
        enclosing=None if enclosing is None else _in_words(enclosing),
        used_directly=not read.isdisjoint(names),
        shared_with=next(iter(sharing), None),
    )


def _in_words(node: fx.Node) -> str:
    if node.op != "call_module":
        return str(node.target)
    module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
    return f"{node.target} ({type(module).__name__})"


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Paths of the modules that hold each parameter themselves, by the parameter's id."""
    holders: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(path or type(model).__name__)
    return holders


# --- the neighbours of a convolution ----------------------------------------------------------------------------------


def is_bottleneck(node: fx.Node) -> bool:
    """Whether a dense 1x1 convolution produces a convolution's input and is all that consumes its output.

    Operations that keep channels apart may stand between, and so may gates: the feature times something computed from
    itself (squeeze and excitation). A residual addition, a concatenation or the model's output may not: what meets
    the feature there would meet channels that nothing has mixed.
    """
    return _produced_by_1x1(node) and _consumed_by_1x1(node)


def _produced_by_1x1(node: fx.Node) -> bool:
    current = _first_input(node)
    while current is not None and not _is_dense_1x1(current):
        if is_multiplication(current):
            current = _gated(current)
        elif is_channelwise_node(current):
            current = _first_input(current)
        else:
            return False
    return current is not None


def _consumed_by_1x1(node: fx.Node) -> bool:
    features = {node}
    gates: set[fx.Node] = set()
    waiting = [node]
    mixed = False
    while waiting:
        feature = waiting.pop()
        users = list(feature.users)
        # Gates first: what computes a gate may reshape or mix as it likes, the feature itself passes by.
        for user in users:
            if is_multiplication(user) and _gated(user, features):
                for operand in user.all_input_nodes:
                    gates |= _slice(operand, features) or set()
        for user in users:
            if user in gates or user in features or not _carries_channels(user):
                continue
            if _is_dense_1x1(user):
                mixed = True
            elif _gated(user, features) if is_multiplication(user) else is_channelwise_node(user):
                if not _keeps_channels(feature, user):
                    return False
                features.add(user)
                waiting.append(user)
            else:
                return False
    return mixed


def _gated(node: fx.Node, features: set[fx.Node] | None = None) -> fx.Node | None:
    """The feature that a multiplication gates: its other side is a number, a parameter, or computed from the feature.

    ``features`` are the nodes that count as the feature; without them, the one side is tried against the other.
    """
    operands = list(node.all_input_nodes)
    if len(operands) == 1:
        return operands[0]
    for side, gate in (operands, operands[::-1]):
        feature = {side} if features is None else features
        if side in feature and _keeps_channels(side, node) and _slice(gate, feature) is not None:
            return side
    return None


def _slice(node: fx.Node, features: set[fx.Node]) -> set[fx.Node] | None:
    """The nodes that compute ``node`` from the features and the model's parameters; None if anything else is in it."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in features or current in found:
            continue
        if current.op == "placeholder":
            return None
        found.add(current)
        waiting.extend(current.all_input_nodes)
    return found


def _first_input(node: fx.Node) -> fx.Node | None:
    return next(iter(node.all_input_nodes), None)


def _keeps_channels(before: fx.Node, after: fx.Node) -> bool:
    channels = [
        value.shape[1] if isinstance(value, Tensor) and value.dim() == 4 else None
        for value in (before.meta.get("value"), after.meta.get("value"))
    ]
    return channels[0] is not None and channels[0] == channels[1]


def _carries_channels(node: fx.Node) -> bool:
    """False for sizes, numbers and dtypes."""
    value = node.meta.get("value")
    if isinstance(value, tuple | list):
        return any(isinstance(item, Tensor) for item in value)
    return isinstance(value, Tensor | dict)


def _is_dense_1x1(node: fx.Node) -> bool:
    """Whether a node is a 1x1 convolution over all channels, as a module or as a function."""
    if node.op == "call_module":
        module = node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    if node.op == "call_function" and node.target is torch.conv2d:
        weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
        value = weight.meta.get("value") if isinstance(weight, fx.Node) else weight
        feature = _first_input(node)
        if not isinstance(value, Tensor) or feature is None or not isinstance(feature.meta.get("value"), Tensor):
            return False
        return tuple(value.shape[2:]) == (1, 1) and value.shape[1] == feature.meta["value"].shape[1]
    return False
