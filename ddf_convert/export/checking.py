"""What was exported beside the model that it came from: at the example's sizes, and at others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ddf_convert.errors import DDFError
from ddf_convert.export.program import Arguments, Traced, reason, tensors_in
from ddf_convert.export.result import Check, Size

# As a fraction of the largest output: other programs add up in another order.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
_TOLERANCE = 1e-4
_ROUNDINGS = 4  # as far from PyTorch as so many times PyTorch's own error may be an export of a model that enlarges it

Run = Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Tensor]]


def tolerance(model: nn.Module) -> float:
    """What a difference may be, by the least precise numbers of a model."""
    found = {tensor.dtype for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    return max([TOLERANCES.get(dtype, _TOLERANCE) for dtype in found], default=_TOLERANCE)


def check(traced: Traced, run: Run, runner: str) -> tuple[Check, ...]:
    """Runs model and file beside each other.

    Args:
        traced: The model, and what its sizes may be.
        run: Runs what was exported: inputs to the tensors of the output.
        runner: Who runs it, for errors.

    Raises:
        DDFError: It does not run, or its outputs differ by more than the tolerance.
    """
    found = []
    for sizes in _sizes_to_check(traced.shapes.sizes):
        arguments = traced.inputs_at(sizes)
        one = Check(dict(zip(traced.shapes.names, map(_shape, tensors_in(arguments)), strict=True)), 0.0, 0.0)
        with torch.no_grad():
            try:
                expected = _outputs(traced.model, arguments)
            except Exception as error:  # the user's code; on the example it ran
                raise DDFError(
                    f"the model itself does not run on {one.at} ({reason(error)}), where torch.export found nothing"
                    " against other sizes: fix them (--static, dynamic=False); nothing was written"
                ) from error
            try:
                given = run(*arguments)
            except Exception as error:
                raise DDFError(
                    f"{runner} does not run what was exported on {one.at} ({reason(error)}); nothing was written"
                ) from error
            difference, largest = _compared(expected, given, f"{runner} at {one.at}")
            one = replace(one, difference=difference, largest=largest)
            if not difference <= tolerance(traced.model) * largest:
                one = replace(one, rounding=_rounding(traced.model, arguments, expected))
                if not difference <= _ROUNDINGS * (one.rounding or 0):
                    raise DDFError(
                        f"{runner} differs from PyTorch by {difference:.2g} at {one.at}, where outputs reach"
                        f" {largest:.2g} and {tolerance(traced.model):g} of that is allowed; nothing was written"
                    )
        found.append(one)
    return tuple(found)


def _outputs(model: nn.Module, arguments: Arguments) -> list[Tensor]:
    return tensors_in(model(*arguments[0], **arguments[1]))


def _rounding(model: nn.Module, arguments: Arguments, expected: Sequence[Tensor]) -> float | None:
    """How far outputs are off from the same model's in float64; None if it does not run in that."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    try:
        exact = _outputs(copy.deepcopy(model).double(), _pytree.tree_map_only(Tensor, widened, arguments))
        return _compared(exact, expected, "float64")[0]
    except Exception:  # the user's code, which need not be made for this
        return None


def _sizes_to_check(sizes: Sequence[Size]) -> Iterator[dict[str, int]]:
    """Those of the example; then another batch and other sizes; then one image, if that was not yet among them."""
    yield {}
    other = {size.name: _other(size, place) for place, size in enumerate(sizes) if size.fixed is None}
    if other:
        yield other
    batch = next((size for size in sizes if size.name == "batch" and size.fixed is None), None)
    if batch and batch.least == 1 != batch.example:
        yield {"batch": 1}


def _other(size: Size, place: int) -> int:
    """Another size than the example's: a little larger and, if it may be, odd where that is even; not all alike."""
    if size.name == "batch":
        wanted = size.example + 2
    else:
        wanted = size.example + max(1, size.example // (3 + place)) // 2 * 2 + 1
    wanted = -(-wanted // size.multiple_of) * size.multiple_of
    if size.most is not None and wanted > size.most:
        wanted = size.most // size.multiple_of * size.multiple_of
        if wanted == size.example:
            wanted = max(size.example - size.multiple_of, size.least)
    return wanted


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _compared(expected: Sequence[Tensor], given: Sequence[Tensor], where: str) -> tuple[float, float]:
    """The largest difference, and the largest number that was expected."""
    shapes = [[*map(_shape, tensors)] for tensors in (expected, given)]
    if shapes[0] != shapes[1]:
        raise DDFError(f"{where} gives shapes {shapes[1]} in the place of {shapes[0]}; nothing was written")
    difference = largest = 0.0
    for one, other in zip(expected, given, strict=True):
        one, other = one.detach().double(), other.detach().double()
        equal = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(equal, 0.0, (one - other).abs())
        finite = one[one.isfinite()]
        difference = max(difference, float(apart.nan_to_num(nan=float("inf")).max()) if apart.numel() else 0.0)
        largest = max(largest, float(finite.abs().max()) if finite.numel() else 0.0)
    return difference, largest
