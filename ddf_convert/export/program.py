"""A model as a ``torch.export`` program, with sizes as free as its forward leaves them."""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import timm.layers.padding
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.export.outputs import name_of, tensors_alone, with_tensors_alone
from ddf_convert.export.sizes import AXES, Shapes, axes, fixed_by_conditions, shape_of, shapes_of
from ddf_convert.layers.base import same_padding
from ddf_convert.utils.example_input import ExampleInput, as_arguments, in_words
from ddf_convert.utils.fake_copy import real_copy, unchanged_random_states
from ddf_convert.utils.logging import logger_level, warn

_TRACED_BATCH = 2  # torch.export takes a size of 1 for one that is always 1
_LONGEST = 200  # characters of an error
_WORDY = ("torch.export", "torch._export", "torch.onnx", "torch.fx", "onnxscript", "onnx_ir")  # loggers

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Traced:
    """A program, and the model that it came from.

    Attributes:
        program: With ``ddf_convert``'s operators, on the CPU.
        model: A copy of the model in evaluation mode, on the CPU, with the same weights.
        arguments: The example, on the CPU, as it was given.
        shapes: Those of the inputs.
        left_out: What the forward returns beside tensors, by name and type.
    """

    program: ExportedProgram
    model: nn.Module
    arguments: Arguments
    shapes: Shapes
    left_out: tuple[str, ...] = ()

    def tell_what_is_left_out(self, file: Path) -> None:
        """Warns of what the file does not hold, if there is something."""
        if self.left_out:
            warn(f"{file} holds tensors alone; left out of what the model returns: {', '.join(self.left_out)}")

    def inputs_at(self, sizes: Mapping[str, int]) -> Arguments:
        """The example at other sizes: maps resampled to the nearest pixel, those of a larger batch each moved a little.

        Args:
            sizes: By name; the example's where one is left out.
        """
        shapes = iter(self.shapes.at(sizes))
        resized: Arguments = _pytree.tree_map_only(
            Tensor, lambda tensor: _resized(tensor, next(shapes)), self.arguments
        )
        return resized

    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the tensors that go in, by their names."""
        return dict(zip(self.shapes.names, map(self.shapes.renamed, self.shapes.shapes), strict=True))

    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Shapes of the tensors that come out, by names that say where they stand in what the forward returns."""
        nodes = {node.name: node for node in self.program.graph.nodes}
        structure = self.program.call_spec.out_spec
        assert structure is not None
        whole = _pytree.tree_unflatten(self.program.graph_signature.user_outputs, structure)
        found: dict[str, tuple[int | str, ...]] = {}
        for path, name in _pytree.tree_flatten_with_path(whole)[0]:
            node = nodes.get(name) if isinstance(name, str) else None
            if node is not None and isinstance(node.meta.get("val"), Tensor):
                found[_output_name(path)] = self.shapes.renamed(shape_of(node))
        return found


def trace(
    model: nn.Module, example_input: ExampleInput, dynamic: bool, fixed: Mapping[str, str] | None = None
) -> Traced:
    """Exports a model.

    Args:
        model: Any module; it stays as it is. What is exported is evaluation mode, on the CPU.
        example_input: What to call it with.
        dynamic: Leave the size of the batch, and those of images, free where that is possible.
        fixed: What is not free nevertheless, and why: "batch", "height", "width".

    Raises:
        UsageError: The model does not run on the example, or returns no tensor.
        DDFError: ``torch.export`` cannot follow it.
    """
    copied = real_copy(model, *_filled(as_arguments(model, example_input)))
    module = copied.module.cpu().requires_grad_(False)
    arguments: Arguments = _pytree.tree_map_only(
        Tensor, lambda tensor: tensor.detach().cpu(), (copied.args, copied.kwargs)
    )
    name = type(model).__name__
    with torch.no_grad(), unchanged_random_states(), quiet():
        try:
            output = _run(module, arguments)
        except Exception as error:  # the user's code: anything can come out of it
            words = in_words(*arguments)
            raise UsageError(f"{name} does not run on an example input of {words}: {reason(error)}") from error
        module, left_out = with_tensors_alone(module, output)
        if not tensors_in(tensors_alone(output)[0]):
            raise UsageError(f"{name} returns no tensor{': ' if left_out else ''}{', '.join(left_out)}")
        fixed = dict(fixed or {}) if dynamic else dict.fromkeys(AXES.values(), "as asked")
        args, kwargs = arguments if "batch" in fixed else _batched(module, arguments, fixed)
        try:
            with _symbolic_same_padding():
                free = _free(module, args, kwargs, fixed)
                program = torch.export.export(module, args, kwargs, dynamic_shapes=free, strict=False)
        except Exception as error:
            raise DDFError(f"torch.export cannot follow the forward of {name}: {reason(error)}") from error

        def why_fixed(axis: int, size: int) -> str:
            return fixed.get(AXES[axis]) or _why_fixed(module, arguments, axis, size)

        shapes = shapes_of(program, tensors_in(arguments), why_fixed)
        if more := fixed_by_conditions(shapes):
            return trace(model, example_input, dynamic, fixed | more)
        return Traced(program, module, arguments, shapes, left_out)


def reason(error: BaseException) -> str:
    """One line of an error, and not all of a long one."""
    line = first_line(error)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


def _run(module: nn.Module, arguments: Arguments) -> Any:
    return module(*arguments[0], **arguments[1])


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among nested values, in order."""
    return [leaf for leaf in _pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _filled(arguments: Arguments) -> Arguments:
    """Arguments with contents: those without get random numbers."""
    generator = torch.Generator().manual_seed(0)

    def fill(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return empty.normal_(generator=generator) if empty.is_floating_point() else empty.fill_(1)

    filled: Arguments = _pytree.tree_map_only(Tensor, fill, arguments)
    return filled


def _free(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fixed: Mapping[str, str]) -> Any:
    """``dynamic_shapes`` of ``torch.export``, which then finds out which sizes depend on each other."""
    bound = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)

    def of(leaf: Any) -> dict[int, Any] | None:
        free = axes(leaf) if isinstance(leaf, Tensor) else ()
        return {axis: Dim.AUTO for axis in free if AXES[axis] not in fixed} or None

    return _pytree.tree_map(of, bound)


def _batched(module: nn.Module, arguments: Arguments, fixed: dict[str, str]) -> Arguments:
    """The example as a batch of more than one; notes why it cannot be one, if it cannot."""
    tensors = tensors_in(arguments)
    if not tensors or not tensors[0].dim() or tensors[0].shape[0] != 1:
        return arguments
    more = _grown(arguments, 0, 1, _TRACED_BATCH)
    try:
        _run(module, more)
    except Exception as error:
        fixed["batch"] = f"the model refuses a batch of {_TRACED_BATCH} ({reason(error)})"
        return arguments
    return more


def _why_fixed(module: nn.Module, arguments: Arguments, axis: int, size: int) -> str:
    """Whether the model itself refuses another size, or only what is written in its forward stands in the way."""
    try:
        _run(module, _grown(arguments, axis, size, 2 * size))  # twice: odd sizes may be refused for their oddness
    except Exception as error:
        return f"the model refuses {2 * size} ({reason(error)})"
    return "its forward takes it for a number, or calculates differently by it"


def _grown(arguments: Arguments, axis: int, old: int, new: int) -> Arguments:
    """Arguments with another size along an axis of all the tensors that have the old one there."""

    def grow(tensor: Tensor) -> Tensor:
        if tensor.dim() <= axis or tensor.shape[axis] != old or axis not in axes(tensor):
            return tensor
        return _resized(tensor, (*tensor.shape[:axis], new, *tensor.shape[axis + 1 :]))

    grown: Arguments = _pytree.tree_map_only(Tensor, grow, arguments)
    return grown


def _resized(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    for axis, (old, new) in enumerate(zip(tensor.shape, shape, strict=True)):
        if old == new:
            continue
        places = torch.arange(new)
        tensor = tensor.index_select(axis, places * old // new if axis else places % old)
        if axis == 0 and tensor.dim() > 1:
            tensor = torch.stack([torch.roll(each, place, -1) for place, each in enumerate(tensor)])
    return tensor


def _output_name(path: tuple[Any, ...]) -> str:
    return name_of(tuple(re.findall(r"\w+", _pytree.keystr(path))))


@contextlib.contextmanager
def _symbolic_same_padding() -> Iterator[None]:
    """SAME padding in timm, of a symbolic size, without its ``max``, which would tie the program to the example's size.

    The numbers are the same, so another thread that meets it in the meantime does not notice.
    """
    original = timm.layers.padding.get_same_padding

    def padding(x: Any, kernel_size: int, stride: int, dilation: int) -> Any:
        run = same_padding if isinstance(x, torch.SymInt) else original
        return run(x, kernel_size, stride, dilation)

    with mock.patch.object(timm.layers.padding, "get_same_padding", padding):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What torch logs and warns of while it tries things is not news to the user: what fails is raised."""
    with warnings.catch_warnings(), logger_level(logging.CRITICAL, *_WORDY):
        warnings.simplefilter("ignore")
        yield
