"""Convolutions that are called as functions: found, and replaced, in the torch.fx graph of the whole model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ddf_convert.conversion.recorder import ARGUMENTS, OPTIONS
from ddf_convert.conversion.tracer import build_graph, convolutions_in, describe
from ddf_convert.errors import UsageError


def functional_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Modules that do what the functional calls with weights of the model's own do, by the names of the calls.

    Their parameters are the model's.

    Raises:
        UsageError: torch.fx cannot trace the model.
    """
    graph_module = build_graph(model, describe(model))
    found = {}
    for name, nodes in convolutions_in(graph_module, "").items():
        conv = _as_module(graph_module, nodes[0])
        if conv is not None:
            found[name] = conv
    return found


def functional_convolutions_in(model: nn.Module, graphs: Iterable[str]) -> dict[str, nn.Conv2d]:
    """The same for parts of a model, each traced by itself, by the names of the calls in the model.

    Args:
        model: The model.
        graphs: Paths of the parts; "" is the whole model.

    Raises:
        UsageError: The model has no such part, or torch.fx cannot trace it.
    """
    parts, found = dict(model.named_modules(remove_duplicate=False)), {}
    for graph in dict.fromkeys(graphs):
        if graph not in parts:
            raise UsageError(f"the conversion does not fit {describe(model)}: it has no {graph}")
        called = functional_convolutions(parts[graph])
        found.update({f"{graph}.{name}" if graph else name: conv for name, conv in called.items()})
    return found


def replace_functions(model: nn.Module, layers: dict[str, nn.Module]) -> fx.GraphModule:
    """The model's GraphModule with modules in the places of functional calls, by the names of the calls.

    The weights that only those calls used are gone from it.

    Raises:
        UsageError: torch.fx cannot trace the model.
    """
    graph_module = build_graph(model, describe(model))
    calls = convolutions_in(graph_module, "")
    for name, layer in layers.items():
        target = place_of(name)
        graph_module.add_submodule(target, layer)
        for node in calls[name]:
            with graph_module.graph.inserting_before(node):
                replaced = graph_module.graph.call_module(target, (_argument(node, "input"),))
            node.replace_all_uses_with(replaced)
            operands = node.all_input_nodes
            graph_module.graph.erase_node(node)
            for operand in operands:
                if operand.op == "get_attr" and not operand.users:
                    graph_module.graph.erase_node(operand)
    # A new GraphModule takes over what its graph names, and nothing else.
    return fx.GraphModule(graph_module, graph_module.graph, type(model).__name__)


def place_of(name: str) -> str:
    """The path, in the converted model, of what replaces a functional call: "neck.ddf_conv2d" for "neck.conv2d()"."""
    owner, _, word = name.removesuffix("()").rpartition(".")
    return f"{owner}.ddf_{word}" if owner else f"ddf_{word}"


def _as_module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Conv2d | None:
    """None where there is none: transposed, computed weights, computed options."""
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
    found: Tensor | None = getattr(graph_module.get_submodule(owner), name)
    return found if isinstance(found, nn.Parameter) else None
