"""Bottlenecks: whether 1x1 convolutions on both sides of a convolution mix its channels."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from ddf_convert.graph.channelwise import is_channelwise_node, is_multiplication
from ddf_convert.graph.trace import VALUE


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
        for value in (before.meta.get(VALUE), after.meta.get(VALUE))
    ]
    return channels[0] is not None and channels[0] == channels[1]


def _carries_channels(node: fx.Node) -> bool:
    """False for sizes, numbers and dtypes; what is not known may carry them."""
    if VALUE not in node.meta:
        return True
    value = node.meta[VALUE]
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
        value = weight.meta.get(VALUE) if isinstance(weight, fx.Node) else weight
        feature = _first_input(node)
        if not isinstance(value, Tensor) or feature is None or not isinstance(feature.meta.get(VALUE), Tensor):
            return False
        return tuple(value.shape[2:]) == (1, 1) and value.shape[1] == feature.meta[VALUE].shape[1]
    return False
