"""Tracing: torch.fx graphs of a model, whole or in pieces, with the fake value of every node."""

from __future__ import annotations

import copy
import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn

from ddf_convert.conversion.interpolate_hook import class_of
from ddf_convert.conversion.recorder import Entry, Recording
from ddf_convert.conversion.sites import (
    FUNCTIONS,
    UPSAMPLING_FUNCTIONS,
    answers_interpolate,
    call_name,
    is_site,
    join_path,
    owner_of,
)
from ddf_convert.errors import UsageError, first_line
from ddf_convert.utils.fake_copy import fake_copy, unchanged_random_states
from ddf_convert.utils.hooks import without_global_hooks

VALUE = "value"  # the key of a node's fake result in its meta

# --- operations that keep channels apart ------------------------------------------------------------------------------

# Modules of these files work on each channel by itself, or (normalization) rescale channels without mixing them.
_TORCH_FILES = "activation batchnorm dropout instancenorm normalization padding pooling upsampling"
_TIMM_FILES = """
    activations activations_me blur_pool drop evo_norm fast_norm filter_response_norm layer_scale norm norm_act
    pool2d_same split_batchnorm
"""
_CHANNELWISE_FILES = {f"torch.nn.modules.{name}" for name in _TORCH_FILES.split()}
_CHANNELWISE_FILES |= {f"timm.layers.{name}" for name in _TIMM_FILES.split()}
_FUNCTIONS = """
    adaptive_avg_pool2d adaptive_max_pool2d alpha_dropout avg_pool2d batch_norm celu celu_ clamp clamp_ clamp_max
    clamp_min clone contiguous detach dropout dropout2d dropout_ elu elu_ feature_dropout float gelu group_norm half
    hardshrink hardsigmoid hardswish hardtanh hardtanh_ instance_norm interpolate leaky_relu leaky_relu_ max_pool2d mean
    mish pad prelu relu relu6 relu_ rrelu selu selu_ sigmoid sigmoid_ silu softplus softsign tanh tanh_ to type type_as
    bfloat16 double upsample drop_path drop_block_2d drop_block_fast_2d
"""
_CHANNELWISE_FUNCTIONS = frozenset(_FUNCTIONS.split())
# Functions that choose by a flag whether to return indices carry no name of their own.
_DISPATCHED: tuple[Callable[..., Any], ...] = (F.max_pool2d, F.adaptive_max_pool2d)
_MULTIPLICATIONS = frozenset({"mul", "mul_", "imul", "multiply", "multiply_"})


def is_channelwise(module: nn.Module) -> bool:
    """Whether a module is known to keep channels apart: normalization, activation, pooling, dropout, padding, ..."""
    if isinstance(module, nn.MultiheadAttention):
        return False
    return isinstance(module, nn.Identity) or any(
        base.__module__ in _CHANNELWISE_FILES for base in type(module).__mro__
    )


def is_channelwise_node(node: fx.Node) -> bool:
    """Whether a node is an operation on one feature that keeps its channels apart."""
    if node.op == "call_module":
        return is_channelwise(node_module(node))
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _DISPATCHED or _function_name(node) in _CHANNELWISE_FUNCTIONS


def is_multiplication(node: fx.Node) -> bool:
    """Whether a node multiplies elementwise."""
    return node.op in ("call_function", "call_method") and _function_name(node) in _MULTIPLICATIONS


def node_module(node: fx.Node) -> nn.Module:
    """Returns the module that a call_module node calls."""
    root = node.graph.owning_module
    assert root is not None
    return root.get_submodule(str(node.target))


def _function_name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


# --- tracing ----------------------------------------------------------------------------------------------------------

_PACKED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Piece:
    """A traced module."""

    path: str  # "" is the whole model
    graph_module: fx.GraphModule  # over a weightless copy; a node's meta has its fake result, if known
    nodes: dict[str, list[fx.Node]]  # that call sites, by the site's name in the model
    entries: int  # how often the module is called


@dataclass
class Traced:
    """A model's graphs."""

    pieces: list[Piece] = field(default_factory=list)  # the whole model alone where it can be traced
    untraced: dict[str, str] = field(default_factory=dict)  # why not, by the paths of other modules
    by_default: bool = False  # the example input leaves optional arguments at their defaults

    def graph_over(self, copied: nn.Module) -> fx.GraphModule | None:
        """Returns the whole model's graph over another copy, as :func:`build_graph` traces it; None if it differs."""
        whole = next((piece.graph_module for piece in self.pieces if not piece.path), None)
        if whole is None or not self.by_default:
            return None
        if any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in whole.graph.nodes):
            return None
        return fx.GraphModule(copied, copy.deepcopy(whole.graph), type(copied).__name__)

    def why_untraced(self, name: str) -> tuple[str, str]:
        """Returns the innermost untraced module that holds a site, and the reason; two empty texts if none does."""
        path = name
        while path:
            path = owner_of(path)
            if path in self.untraced:
                return path, self.untraced[path]
        return "", ""


class Tracer(fx.Tracer):
    """torch.fx's tracer, for which timm's own leaves, sites, channelwise modules and ``leaves`` are one node each."""

    def __init__(self, leaves: tuple[nn.Module, ...] = ()) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self._leaf_classes = tuple(get_notrace_modules())
        self._leaves = {id(leaf) for leaf in leaves}
        self.running: list[nn.Module] = []  # what is being traced, the innermost last; stays so after an error

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph shows this module as one node."""
        is_ours = id(m) in self._leaves or class_of(m) in self._leaf_classes or is_site(m) or is_channelwise(m)
        return is_ours or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Traces a call of a module."""
        self.running.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.running.pop()
        return result


@without_global_hooks()
@unchanged_random_states()
def trace(model: nn.Module, recording: Recording) -> Traced:
    """Traces a model that was recorded: whole, else in pieces; the model stays as it is.

    A module whose own forward cannot be traced becomes one node in the graph around it, and its children that hold
    sites are traced by themselves. So are the modules that timm wants torch.fx not to look into.
    """
    traced = Traced()
    copied = recording.copied
    if recording.on_values:
        try:
            copied = fake_copy(model, mode=recording.mode)
        except UsageError as error:
            traced.untraced[""] = str(error)
            return traced
    root = copied.module
    if "" in recording.entries:
        traced.by_default = _fixed_arguments(root, recording.entries[""][0]) == _fixed_arguments(root, None)
    paths = {id(module): path for path, module in root.named_modules()}
    waiting, seen = deque([""]), set()
    while waiting:
        path = waiting.popleft()
        module, entries = root.get_submodule(path), recording.entries.get(path, [])
        if not entries or path in seen:
            continue
        seen.add(path)
        graph_module, opaque = _trace_around_opaque(module, entries[0])
        opaque_paths = {paths[id(part)]: reason for part, reason in opaque.items()}
        traced.untraced |= opaque_paths
        for part in opaque_paths:
            waiting.extend(_called_below(part, root, recording))
        if graph_module is not None:
            _propagate(graph_module, module, path, recording)
            traced.pieces.append(Piece(path, graph_module, site_nodes(graph_module, path), len(entries)))
            for leaf in _leaves_with_sites(graph_module, path, recording):
                if leaf not in opaque_paths:
                    traced.untraced.setdefault(leaf, "is one node for torch.fx")
                    waiting.append(leaf)
    return traced


@without_global_hooks()
@unchanged_random_states()
def build_graph(module: nn.Module, name: str) -> fx.GraphModule:
    """Traces a whole module, with its optional arguments fixed to their defaults; the GraphModule shares its parts."""
    try:
        return _trace_module(module, Tracer(), None)
    except Exception as error:  # forward is the user's code on symbolic values: anything can come out of it
        raise UsageError(
            f"{name}: torch.fx cannot trace the forward pass: {first_line(error)}."
            " Data-dependent control flow has to go, or be moved into a function marked with torch.fx.wrap"
        ) from error


def _trace_module(module: nn.Module, tracer: Tracer, entry: Entry | None) -> fx.GraphModule:
    """Traces a module as it is called in ``entry``, if there is one: flags and numbers are fixed."""
    graph = tracer.trace(module, concrete_args=_fixed_arguments(module, entry) or None)
    return fx.GraphModule(tracer.root, graph, type(module).__name__)


def _fixed_arguments(module: nn.Module, entry: Entry | None) -> dict[str, Any]:
    """The arguments of a call that are no tensors, or the defaults of a call with none.

    An optional argument that is not given must be its default to "if mask is None", not a symbol that never is.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    values = {parameter.name: parameter.default for parameter in parameters} | _bound_arguments(module, entry)
    packed = {parameter.name for parameter in parameters if parameter.kind in _PACKED}
    return {
        name: value
        for name, value in values.items()
        if name not in packed and (value is None or isinstance(value, bool | int | float | str))
    }


def _trace_around_opaque(module: nn.Module, entry: Entry) -> tuple[fx.GraphModule | None, dict[nn.Module, str]]:
    """Traces a module, if its own forward can be; returns also the modules below that cannot, with the reasons."""
    opaque: dict[nn.Module, str] = {}
    while True:
        tracer = Tracer(tuple(opaque))
        try:
            return _trace_module(module, tracer, entry), opaque
        except Exception as error:
            reason = f"torch.fx cannot trace ({first_line(error).partition('. ')[0]})"
        # An opaque module fails only for what it is called with: the forward that calls it is to blame.
        culprit = next((part for part in reversed(tracer.running) if part not in opaque), module)
        if culprit is module:
            return None, {module: reason}
        # Blocks of one class fail the same way: each would cost a trace of its own.
        ours = type(culprit).__module__.partition(".")[0] != "torch"
        same = [part for part in module.modules() if part is culprit or (ours and type(part) is type(culprit))]
        opaque |= {part: reason for part in same if part is not module and part not in opaque}


def _bound_arguments(module: nn.Module, entry: Entry | None) -> dict[str, Any]:
    """The arguments of a call by the names of the signature; empty if it does not fit the signature."""
    if entry is None:
        return {}
    try:
        bound = inspect.signature(module.forward).bind(*entry.args, **entry.kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return bound.arguments


def _called_below(path: str, root: nn.Module, recording: Recording) -> Iterator[str]:
    """The nearest modules below one that were called and hold sites: those of a ModuleList, which is not called."""
    for name, child in root.get_submodule(path).named_children():
        below = join_path(path, name)
        if below in recording.entries:
            yield below
        elif not is_site(child):
            yield from _called_below(below, root, recording)


def _leaves_with_sites(graph_module: fx.GraphModule, path: str, recording: Recording) -> Iterator[str]:
    targets = dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module")
    yield from (below for target in targets if (below := join_path(path, target)) in recording.entries)


def site_nodes(graph_module: fx.GraphModule, path: str) -> dict[str, list[fx.Node]]:
    """Returns the nodes that call sites, by the site's name; ``path`` is that of the traced module."""
    nodes: dict[str, list[fx.Node]] = {}
    calls: dict[str, Counter[str]] = {}  # of functions, by each call of the module that makes them
    for node in graph_module.graph.nodes:
        # Each call of a module has a key of its own in the stack ("block", "block@1", ...).
        stack = [(key, value[0]) for key, value in node.meta.get("nn_module_stack", {}).items()]
        if node.op == "call_module" and is_site(graph_module.get_submodule(node.target)):
            nodes.setdefault(join_path(path, node.target), []).append(node)
            if answers_interpolate(node.target):
                key = stack[-2][0] if len(stack) > 1 else ""  # the last is the layer itself
                calls.setdefault(key, Counter())["interpolate"] += 1
        elif node.op == "call_function" and (node.target in FUNCTIONS or node.target in UPSAMPLING_FUNCTIONS):
            key, owner = stack[-1] if stack else ("", "")
            name = call_name(join_path(path, owner), node.target, calls.setdefault(key, Counter()))
            nodes.setdefault(name, []).append(node)
    return nodes


def _propagate(graph_module: fx.GraphModule, module: nn.Module, path: str, recording: Recording) -> None:
    """Gives every node its value, as far as the graph runs on fake tensors."""
    packed = {name for name, each in inspect.signature(module.forward).parameters.items() if each.kind in _PACKED}
    arguments = _bound_arguments(module, recording.entries[path][0])
    propagator = _Propagator(graph_module, path, recording)
    try:
        with recording.mode:
            propagator.run(*(value for name, value in arguments.items() if name not in packed))
    except Exception:  # what depends on values ends here: of the nodes after it nothing is known
        return


class _Propagator(fx.Interpreter):
    """Runs a graph on fake tensors, and takes the recorded outputs of modules that hold sites."""

    def __init__(self, graph_module: fx.GraphModule, path: str, recording: Recording) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self._path = path
        self._entries = recording.entries
        self._calls: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta[VALUE] = value
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = join_path(self._path, str(target))
        if path not in self._entries:
            return super().call_module(target, args, kwargs)
        self._calls[path] += 1
        return self._entries[path][min(self._calls[path], len(self._entries[path])) - 1].output
