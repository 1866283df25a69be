"""Tracing: the model's torch.fx graph, with the shapes at every node and every call of a convolution."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from ddf_convert.errors import UsageError
from ddf_convert.fake import FakeCopy, fake_copy
from ddf_convert.graph.channelwise import is_channelwise
from ddf_convert.layers import DDF2d, DDFConv2d

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, DDF2d, DDFConv2d)

ExampleInput = Tensor | tuple[Any, ...] | list[Any]


@dataclass(frozen=True)
class Call:
    """One call of a convolution during the forward pass.

    Attributes:
        name: The module's path; for a functional call the fx node's name, with "()" where a module has that name too.
        node: The fx node that was running: the call itself, or that of an untraced module which holds the convolution.
        input_shape: (B, C, H, W).
        output_shape: (B, C, H, W).
    """

    name: str
    node: fx.Node
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True)
class Traced:
    """A model's graph and what its forward pass did with the example input.

    Attributes:
        graph_module: Over a weightless copy of the model; each node's ``meta["value"]`` is its (fake) result.
        calls: Every call of a convolution, in order.
    """

    graph_module: fx.GraphModule
    calls: tuple[Call, ...]


class Tracer(fx.Tracer):
    """torch.fx's tracer with timm's own leaves, the convolutions, and the modules that leave channels unmixed."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._leaves = tuple(get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph shows this module as one node."""
        leaf = type(m) in self._leaves or isinstance(m, CONVOLUTIONS) or is_channelwise(m)
        return leaf or super().is_leaf_module(m, module_qualified_name)


def as_inputs(example_input: ExampleInput) -> tuple[Any, ...]:
    """The positional arguments of forward: a tensor alone, or a tuple or list of arguments."""
    return tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)


def describe(model: nn.Module) -> str:
    """A model in words: its timm name, or its class."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    architecture = configuration.get("architecture") if hasattr(configuration, "get") else None
    return architecture if isinstance(architecture, str) and architecture else type(model).__name__


def trace(model: nn.Module, example_input: ExampleInput) -> Traced:
    """Traces a model and runs its graph on shapes alone; its weights are neither read nor copied.

    Args:
        model: Any module that torch.fx can trace.
        example_input: (B, C, H, W), or a tuple of arguments for forward.

    Raises:
        UsageError: torch.fx cannot trace the model, or the model does not accept the input.
    """
    inputs = as_inputs(example_input)
    fake = fake_copy(model, inputs)
    graph_module = build_graph(fake.module, len(inputs), describe(model))
    recorder = _Recorder(graph_module, fake)
    return Traced(graph_module, recorder.record(describe(model)))


def build_graph(module: nn.Module, inputs: int | None, name: str) -> fx.GraphModule:
    """The fx GraphModule of a module.

    Args:
        module: The module; the GraphModule shares its parts.
        inputs: How many positional arguments vary; the others are fixed to their defaults. None: those that have no
            default.
        name: What to call the model in errors.

    Raises:
        UsageError: torch.fx cannot trace the module.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    # An optional argument that is not given must be its default to "if mask is None", not a symbol that never is.
    fixed = {
        parameter.name: parameter.default
        for position, parameter in enumerate(parameters)
        if (inputs is None or position >= inputs)
        and (parameter.default is None or isinstance(parameter.default, bool | int | float | str))
    }
    tracer = Tracer()
    try:
        graph = tracer.trace(module, concrete_args=fixed or None)
    except Exception as error:  # forward is the user's code on symbolic values: anything can come out of it
        raise UsageError(
            f"{name}: torch.fx cannot trace the forward pass: {first_line(error)}."
            " Data-dependent control flow has to go, or be moved into a function marked with torch.fx.wrap"
        ) from error
    return fx.GraphModule(tracer.root, graph, type(module).__name__)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the full stop."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


class _Recorder(fx.Interpreter):
    """Runs a graph on fake tensors and notes the value of every node and every call of a convolution."""

    def __init__(self, graph_module: fx.GraphModule, fake: FakeCopy) -> None:
        super().__init__(graph_module)
        self.extra_traceback = False
        self._fake = fake
        self._paths = {path for path, _ in fake.module.named_modules()}
        self._calls: list[Call] = []
        self._node = next(iter(graph_module.graph.nodes))

    def record(self, name: str) -> tuple[Call, ...]:
        hooks = [
            part.register_forward_hook(lambda part, args, output, path=path: self._note(path, args[0], output))
            for path, part in self._fake.module.named_modules()
            if path and isinstance(part, CONVOLUTIONS)
        ]
        try:
            with self._fake.running():
                self.run(*self._fake.inputs)
        except Exception as error:
            raise self._refusal(name, error) from error
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(self._calls)

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        value = super().run_node(n)
        n.meta["value"] = value
        if n.op == "call_function" and n.target in (torch.conv2d, torch.conv_transpose2d):
            input = n.args[0] if n.args else n.kwargs["input"]
            name = f"{n.name}()" if n.name in self._paths else n.name
            self._note(name, self.env[input] if isinstance(input, fx.Node) else input, value)
        return value

    def _note(self, name: str, input: Any, output: Any) -> None:
        if isinstance(input, Tensor) and isinstance(output, Tensor):
            self._calls.append(Call(name, self._node, tuple(input.shape), tuple(output.shape)))

    def _refusal(self, name: str, error: Exception) -> UsageError:
        sizes = " and ".join("x".join(map(str, i.shape[1:])) for i in self._fake.inputs if isinstance(i, Tensor))
        place, advice = str(self._node.target), "try a larger --input-size"
        if self._node.op == "call_module":
            module = self.fetch_attr(str(self._node.target))
            place += f" ({type(module).__name__})"
            given = [self.env[node] for node in self._node.all_input_nodes]
            if isinstance(module, nn.Conv2d) and isinstance(given[0], Tensor) and given[0].dim() == 4:
                channels = given[0].shape[1]
                if given[0].dtype != module.weight.dtype:
                    advice = f"it takes {module.weight.dtype} and was given {given[0].dtype}"
                elif channels != module.in_channels:
                    advice = f"it takes {module.in_channels} channels and was given {channels}"
        return UsageError(f"{name} does not accept an input of {sizes}: {place} failed: {first_line(error)}; {advice}")
