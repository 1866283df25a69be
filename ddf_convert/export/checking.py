"""Compares what was exported with the model, at the example's sizes and at others, and writes the file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import DDFError
from ddf_convert.export.program import Arguments, TracedProgram, short_reason, tensors_in
from ddf_convert.export.sizes import Size
from ddf_convert.utils.logging import warn

# As a fraction of the largest output: other programs add up in another order.
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE = 1e-4
_MAX_ROUNDINGS = 4  # a model that amplifies rounding may differ by this many times PyTorch's own error

Runner = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Check:
    """One comparison of the exported program with the model.

    Attributes:
        inputs: The shapes, by name of the input.
        difference: The largest absolute difference of two outputs.
        largest: The largest absolute output of the model.
        rounding: PyTorch's own error, against float64; measured only if the difference exceeds the tolerance.
    """

    inputs: dict[str, tuple[int, ...]]
    difference: float
    largest: float
    rounding: float | None = None

    @property
    def at(self) -> str:
        """The shapes in words: ``1x3x224x224``."""
        return " and ".join("x".join(map(str, shape)) for shape in self.inputs.values())


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        file: Its path.
        format: "onnx" or "torch-export".
        bytes: Its size.
        opset: ONNX's version of the operators; None in other formats.
        operators: Number of uses of each operator, by name.
        inputs: Shapes, by name; names stand for sizes that are free.
        outputs: The same for the outputs.
        sizes: The sizes of the inputs, and what they may be.
        tolerance: The allowed difference, as a fraction of the largest output.
        checks: The comparisons with the model; empty if they were not asked for.
        left_out: What the model returns beside tensors, by name and type: no file holds it.
    """

    file: Path
    format: str
    bytes: int
    opset: int | None
    operators: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    sizes: tuple[Size, ...]
    tolerance: float
    checks: tuple[Check, ...]
    left_out: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """The largest difference of all checks; None if there was none."""
        return max((check.difference for check in self.checks), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything for JSON."""
        return {**asdict(self), "file": str(self.file), "difference": self.difference}


def check_and_write(
    traced: TracedProgram,
    content: bytes,
    file: Path,
    *,
    format: str,
    operators: dict[str, int],
    runner_name: str,
    make_runner: Callable[[bytes], Runner] | None,
    opset: int | None = None,
    inputs: dict[str, tuple[int | str, ...]] | None = None,
    outputs: dict[str, tuple[int | str, ...]] | None = None,
) -> Exported:
    """Compares an exported program with its model, writes it, and warns of what the file does not hold.

    Args:
        traced: The program's model and example.
        content: The content of the file.
        file: Its path.
        format: As in :class:`Exported`, and so are ``operators`` and ``opset``.
        operators: See there.
        runner_name: What runs the file, for errors.
        make_runner: Opens the content and returns a function that runs it; None skips the comparison.
        opset: See there.
        inputs: As in :class:`Exported`; None for those of the traced program.
        outputs: The same for the outputs.

    Raises:
        DDFError: The program does not run, or its outputs differ. Nothing is written then.
        UsageError: The file cannot be written.
    """
    checks = () if make_runner is None else _check(traced, make_runner(content), runner_name)
    write_file(file, content)
    if traced.left_out:
        warn(f"{file} holds tensors alone; left out of what the model returns: {', '.join(traced.left_out)}")
    return Exported(
        file=file,
        format=format,
        bytes=len(content),
        opset=opset,
        operators=operators,
        inputs=traced.inputs() if inputs is None else inputs,
        outputs=traced.outputs() if outputs is None else outputs,
        sizes=traced.shapes.sizes,
        tolerance=_tolerance(traced.model),
        checks=checks,
        left_out=traced.left_out,
    )


def _tolerance(model: nn.Module) -> float:
    """Returns the allowed relative difference for the least precise dtype of a model."""
    dtypes = {tensor.dtype for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return max([_TOLERANCES.get(dtype, _TOLERANCE) for dtype in dtypes], default=_TOLERANCE)


def _check(traced: TracedProgram, runner: Runner, runner_name: str) -> tuple[Check, ...]:
    checks = []
    for sizes in _sizes_to_check(traced.shapes.sizes):
        arguments = traced.arguments_at(sizes)
        check = Check(dict(zip(traced.shapes.names, map(_shape, tensors_in(arguments)), strict=True)), 0.0, 0.0)
        with torch.no_grad():
            try:
                expected = _outputs(traced.model, arguments)
            except Exception as error:  # the user's code; on the example it ran
                raise DDFError(
                    f"the model itself does not run on {check.at} ({short_reason(error)}), where torch.export found"
                    " nothing against other sizes: fix them (--static, dynamic=False); nothing was written"
                ) from error
            try:
                actual = runner(*arguments)
            except Exception as error:
                raise DDFError(
                    f"{runner_name} does not run what was exported on {check.at} ({short_reason(error)}); nothing was"
                    " written"
                ) from error
            difference, largest = _compare(expected, actual, f"{runner_name} at {check.at}")
            check = replace(check, difference=difference, largest=largest)
            if not difference <= _tolerance(traced.model) * largest:
                check = replace(check, rounding=_rounding(traced.model, arguments, expected))
                if not difference <= _MAX_ROUNDINGS * (check.rounding or 0):
                    raise DDFError(
                        f"{runner_name} differs from PyTorch by {difference:.2g} at {check.at}, where outputs reach"
                        f" {largest:.2g} and {_tolerance(traced.model):g} of that is allowed; nothing was written"
                    )
        checks.append(check)
    return tuple(checks)


def _outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    return tensors_in(model(*arguments[0], **arguments[1]))


def _rounding(model: nn.Module, arguments: Arguments, expected: Sequence[Tensor]) -> float | None:
    """Returns the error of outputs against the same model in float64; None if it does not run in that."""

    def to_double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    try:
        exact = _outputs(copy.deepcopy(model).double(), _pytree.tree_map_only(Tensor, to_double, arguments))
        return _compare(exact, expected, "float64")[0]
    except Exception:  # the user's code, which need not support float64
        return None


def _sizes_to_check(sizes: Sequence[Size]) -> Iterator[dict[str, int]]:
    """Yields the example's sizes, then another batch and other sizes, then one image if that is not among them."""
    yield {}
    other = {size.name: _other_value(size, index) for index, size in enumerate(sizes) if size.fixed is None}
    if other:
        yield other
    batch = next((size for size in sizes if size.name == "batch" and size.fixed is None), None)
    if batch and batch.least == 1 != batch.example:
        yield {"batch": 1}


def _other_value(size: Size, index: int) -> int:
    """Returns a value a little larger than the example's and, if allowed, odd where that is even; varies by index."""
    if size.name == "batch":
        value = size.example + 2
    else:
        value = size.example + max(1, size.example // (3 + index)) // 2 * 2 + 1
    value = -(-value // size.multiple_of) * size.multiple_of
    if size.most is not None and value > size.most:
        value = size.most // size.multiple_of * size.multiple_of
        if value == size.example:
            value = max(size.example - size.multiple_of, size.least)
    return value


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _compare(expected: Sequence[Tensor], actual: Sequence[Tensor], where: str) -> tuple[float, float]:
    """Returns the largest absolute difference, and the largest absolute expected number."""
    shapes = [[*map(_shape, tensors)] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise DDFError(f"{where} gives shapes {shapes[1]} instead of {shapes[0]}; nothing was written")
    difference = largest = 0.0
    for one, other in zip(expected, actual, strict=True):
        one, other = one.detach().double(), other.detach().double()
        equal = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(equal, 0.0, (one - other).abs())
        finite = one[one.isfinite()]
        difference = max(difference, float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0)
        largest = max(largest, float(finite.abs().max()) if finite.numel() else 0.0)
    return difference, largest
