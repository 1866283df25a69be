"""A model as a ``torch.export`` program, with sizes as free as its forward allows, and tensors as its only outputs."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import timm.layers.padding
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.export.sizes import AXES, InputShapes, free_axes, input_shapes, node_shape
from ddf_convert.layers.base import same_padding
from ddf_convert.utils.example_input import ExampleInput, as_arguments, in_words
from ddf_convert.utils.fake_copy import real_copy, unchanged_random_states
from ddf_convert.utils.logging import logger_level

_TRACED_BATCH = 2  # torch.export specializes a size of 1
_MAX_REASON = 200  # characters of an error
_LOGGERS = ("torch.export", "torch._export", "torch.onnx", "torch.fx", "onnxscript", "onnx_ir")

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class TracedProgram:
    """A program, and the model that it was traced from.

    Attributes:
        program: The program, with ``ddf_convert``'s operators, on the CPU.
        model: A copy of the model in evaluation mode, on the CPU, with the same weights.
        arguments: The example, on the CPU, as it was given.
        shapes: Shapes of the inputs.
        left_out: What the forward returns beside tensors, by name and type.
    """

    program: ExportedProgram
    model: nn.Module
    arguments: Arguments
    shapes: InputShapes
    left_out: tuple[str, ...] = ()

    def arguments_at(self, sizes: Mapping[str, int]) -> Arguments:
        """Returns the example resized to sizes by name; one that is left out is the example's."""
        shapes = iter(self.shapes.at(sizes))
        return _map_tensors(lambda tensor: _resize(tensor, next(shapes)), self.arguments)

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Returns the shapes of the input tensors by name."""
        return dict(zip(self.shapes.names, map(self.shapes.renamed, self.shapes.shapes), strict=True))

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Returns the shapes of the output tensors, named by their path in what the forward returns."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        structure = self.program.call_spec.out_spec
        assert structure is not None
        output = _pytree.tree_unflatten(self.program.graph_signature.user_outputs, structure)
        shapes: dict[str, tuple[int | str, ...]] = {}
        for path, name in _pytree.tree_flatten_with_path(output)[0]:
            node = nodes.get(name) if isinstance(name, str) else None
            if node is not None and isinstance(node.meta.get("val"), Tensor):
                keys = tuple(re.findall(r"\w+", _pytree.keystr(path)))
                shapes[_output_name(keys)] = self.shapes.renamed(node_shape(node))
        return shapes


def trace(
    model: nn.Module, example_input: ExampleInput, dynamic: bool, fixed: Mapping[str, str] | None = None
) -> TracedProgram:
    """Exports a model in evaluation mode on the CPU.

    Args:
        model: Any module; it is not changed.
        example_input: Its input.
        dynamic: Keep the sizes of the batch and of images free where that is possible.
        fixed: Axes that are not free nevertheless, and why: "batch", "height", "width".

    Raises:
        UsageError: The model does not run on the example, or returns no tensor.
        DDFError: ``torch.export`` cannot follow it.
    """
    copied = real_copy(model, *_fill_meta_tensors(as_arguments(model, example_input)))
    module = copied.module.cpu().requires_grad_(False)
    arguments = _map_tensors(lambda tensor: tensor.detach().cpu(), (copied.args, copied.kwargs))
    name = type(model).__name__
    with torch.no_grad(), unchanged_random_states(), quiet():
        try:
            output = _call(module, arguments)
        except Exception as error:  # the user's code can raise anything
            words = in_words(*arguments)
            raise UsageError(f"{name} does not run on an example input of {words}: {short_reason(error)}") from error
        module, left_out = _return_tensors_only(module, output)
        if not tensors_in(_tensors_only(output)[0]):
            raise UsageError(f"{name} returns no tensor{': ' if left_out else ''}{', '.join(left_out)}")
        fixed = dict(fixed or {}) if dynamic else dict.fromkeys(AXES.values(), "as asked")
        args, kwargs = arguments if "batch" in fixed else _with_larger_batch(module, arguments, fixed)
        try:
            with _symbolic_same_padding():
                dynamic_shapes = _dynamic_shapes(module, args, kwargs, fixed)
                program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        except Exception as error:
            raise DDFError(f"torch.export cannot follow the forward of {name}: {short_reason(error)}") from error

        def why_fixed(axis: int, size: int) -> str:
            return fixed.get(AXES[axis]) or _why_fixed(module, arguments, axis, size)

        shapes = input_shapes(program, tensors_in(arguments), why_fixed)
        if more := shapes.fixed_by_guards():
            return trace(model, example_input, dynamic, fixed | more)
        return TracedProgram(program, module, arguments, shapes, left_out)


def tensors_in(values: Any) -> list[Tensor]:
    """Returns the tensors among nested values, in order."""
    return [leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def short_reason(error: BaseException) -> str:
    """Returns the first line of an error, cut where it is long."""
    line = first_line(error)
    return line if len(line) <= _MAX_REASON else f"{line[:_MAX_REASON]} ..."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without the warnings and logs of torch's exporters; what fails is raised anyway."""
    with warnings.catch_warnings(), logger_level(logging.CRITICAL, *_LOGGERS):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _symbolic_same_padding() -> Iterator[None]:
    """A context in which timm's SAME padding of a symbolic size has no ``max``, which would specialize the size.

    The numbers are the same, so it does not matter if another thread meets it in the meantime.
    """
    original = timm.layers.padding.get_same_padding

    def padding(x: Any, kernel_size: int, stride: int, dilation: int) -> Any:
        function = same_padding if isinstance(x, torch.SymInt) else original
        return function(x, kernel_size, stride, dilation)

    with mock.patch.object(timm.layers.padding, "get_same_padding", padding):
        yield


def _call(module: nn.Module, arguments: Arguments) -> Any:
    return module(*arguments[0], **arguments[1])


def _map_tensors(function: Any, arguments: Arguments) -> Arguments:
    mapped: Arguments = _pytree.tree_map_only(Tensor, function, arguments)
    return mapped


# --- examples of other sizes ---


def _fill_meta_tensors(arguments: Arguments) -> Arguments:
    """Replaces tensors on the meta device by random ones."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return empty.normal_(generator=generator) if empty.is_floating_point() else empty.fill_(1)

    return _map_tensors(fill, arguments)


def _dynamic_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: Mapping[str, str]) -> Any:
    """Returns ``dynamic_shapes`` for ``torch.export``, which then finds out which sizes depend on each other."""
    bound = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def axes_of(leaf: Any) -> dict[int, Any] | None:
        axes = free_axes(leaf) if isinstance(leaf, Tensor) else ()
        return {axis: Dim.AUTO for axis in axes if AXES[axis] not in fixed} or None

    return _pytree.tree_map(axes_of, bound)


def _with_larger_batch(module: nn.Module, arguments: Arguments, fixed: dict[str, str]) -> Arguments:
    """Returns the example as a batch of two instead of one; if the model refuses that, adds why to ``fixed``."""
    tensors = tensors_in(arguments)
    if not tensors or not tensors[0].dim() or tensors[0].shape[0] != 1:
        return arguments
    larger = _resize_axis(arguments, 0, 1, _TRACED_BATCH)
    try:
        _call(module, larger)
    except Exception as error:
        fixed["batch"] = f"the model refuses a batch of {_TRACED_BATCH} ({short_reason(error)})"
        return arguments
    return larger


def _why_fixed(module: nn.Module, arguments: Arguments, axis: int, size: int) -> str:
    """Says whether the model itself refuses another size, or only its traced forward does not allow it."""
    try:
        _call(module, _resize_axis(arguments, axis, size, 2 * size))  # twice, since odd sizes may be refused as such
    except Exception as error:
        return f"the model refuses {2 * size} ({short_reason(error)})"
    return "its forward takes it for a number, or calculates differently by it"


def _resize_axis(arguments: Arguments, axis: int, old: int, new: int) -> Arguments:
    """Resizes an axis of all the tensors that have the old size there."""

    def resize(tensor: Tensor) -> Tensor:
        if tensor.dim() <= axis or tensor.shape[axis] != old or axis not in free_axes(tensor):
            return tensor
        return _resize(tensor, (*tensor.shape[:axis], new, *tensor.shape[axis + 1 :]))

    return _map_tensors(resize, arguments)


def _resize(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resamples to the nearest pixel, and fills a larger batch with repetitions, each shifted by another amount."""
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old == new:
            continue
        index = torch.arange(new)
        tensor = tensor.index_select(axis, index * old // new if axis else index % old)
        if axis == 0 and tensor.dim() > 1:
            tensor = torch.stack([torch.roll(each, shift, -1) for shift, each in enumerate(tensor)])
    return tensor


# --- outputs: tensors in dicts, lists and tuples ---


def _return_tensors_only(module: nn.Module, output: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """Changes a module in place so that its forward returns tensors only; its class becomes one of the same name.

    Args:
        module: The module.
        output: What its forward returned.

    Returns:
        The module, and what its forward no longer returns, as from :func:`_tensors_only`.
    """
    tensors, left_out = _tensors_only(output)
    if not left_out and _pytree.tree_structure(tensors) == _pytree.tree_structure(output):
        return module, ()
    kind = type(module)
    own = module.__dict__.pop("forward", None)  # a forward set on the instance hides that of the class
    original: Any = kind.forward if own is None else own

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        returned = original(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        return _tensors_only(returned)[0]

    if own is None:
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    else:
        module.__dict__["forward"] = functools.wraps(own)(functools.partial(forward, module))
    return module, left_out


def _tensors_only(output: Any) -> tuple[Any, tuple[str, ...]]:
    """Returns an output with None for all that is not a tensor, and the names and types of that: ``output_1 (int)``.

    Dataclasses, named tuples and the like become dicts.
    """
    left_out: list[str] = []
    return _keep_tensors(output, (), left_out), tuple(left_out)


def _keep_tensors(value: Any, keys: tuple[str, ...], left_out: list[str]) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    named = _as_mapping(value)
    if named is not None:
        kind = OrderedDict if type(value) is OrderedDict else dict
        return kind((key, _keep_tensors(each, (*keys, str(key)), left_out)) for key, each in named.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        parts = [_keep_tensors(each, (*keys, str(index)), left_out) for index, each in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if type(value) in _pytree.SUPPORTED_NODES and not isinstance(value, torch.Size):
        return _pytree.tree_map(lambda leaf: _keep_tensors(leaf, keys, left_out), value)
    left_out.append(f"{_output_name(keys)} ({type(value).__name__})")
    return None


def _as_mapping(value: Any) -> Mapping[Any, Any] | None:
    """Returns the fields of a mapping, dataclass, named tuple or namespace."""
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return vars(value) if isinstance(value, SimpleNamespace) else None


def _output_name(keys: tuple[str, ...]) -> str:
    """Returns ``logits`` for a dict, ``output_1`` for a tuple, ``output`` for a single tensor."""
    return "_".join(("output", *keys) if not keys or keys[0].isdecimal() else keys)
