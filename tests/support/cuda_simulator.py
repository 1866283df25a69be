"""Runs the CUDA kernels in Numba's simulator beside the reference in float64: a group of cases at a time.

    echo GROUP, LAYOUT, all | NUMBA_ENABLE_CUDASIM=1 python tests/support/cuda_simulator.py

For each line that it reads it prints one: a JSON list with, for each case of the group, its name, the largest error of
each result beside the largest value expected, and what is wrong with its shape, dtype or layout. With ``half`` for
``all`` it takes every other case, and in the other layout the rest. Unwritten memory is NaN, in shared
memory as in results.

Numba lets the threads of a block run as Python schedules them, and two of them can get a shared array of their own
each. Here they take turns at barriers, first to last and then last to first: results repeat, and where a barrier is
missing, one of the orders shows it. All threads must wait at the same barrier.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Half a unit in the last place where the result is rounded, and the rounding of sums.
TOLERANCES = {"float64": 1e-13, "float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3}
ALL = (True, True, True)


@dataclass(frozen=True)
class Case:
    """One call, forward and backward.

    Attributes:
        scale: Of FilterNorm inside the forward pass; None: without.
        needs: Which gradients are asked for; those that are not must have no elements.
    """

    batch: int = 1
    channels: int = 8
    height: int = 8
    width: int = 8
    size: int = 3
    stride: int = 1
    padding: int = 1
    dilation: int = 1
    heads: int = 1
    combine: str = "mul"
    dtype: str = "float32"
    scale: float | None = None
    upscale: int = 1
    needs: tuple[bool, bool, bool] = ALL

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        changed = [field for field in fields(self) if getattr(self, field.name) != field.default]
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in changed) or "defaults"


@dataclass(frozen=True)
class Norm:
    """FilterNorm and its gradient on their own."""

    shape: tuple[int, int, int, int]
    taps: int
    dtype: str = "float32"
    equal: bool = False  # all taps

    @property
    def name(self) -> str:
        """All of it."""
        return f"norm {self.shape} taps={self.taps} {self.dtype}{' equal' if self.equal else ''}"


FOUR = tuple(TOLERANCES)
HALVES = ("float16", "bfloat16")
GROUPS: dict[str, tuple[Case | Norm, ...]] = {
    "dtypes": (
        *(Case(dtype=dtype) for dtype in FOUR),
        *(Case(dtype=dtype, stride=2, channels=12, height=5, width=8) for dtype in ("float64", *HALVES)),
        Case(dtype="bfloat16", height=5, width=7, channels=5, combine="add"),
        Case(dtype="float16", channels=6, heads=2, width=6, height=3, scale=0.5),
        Case(dtype="float64", combine="add", stride=2, height=4, width=4),
    ),
    "geometry": (
        Case(stride=2, combine="add"),
        Case(stride=2, height=9, width=7),
        Case(stride=2, padding=2, width=9, channels=4),
        Case(stride=2, padding=2, dilation=2),
        Case(stride=2, padding=0, dilation=3, height=9, width=10),
        Case(padding=0),
        Case(padding=2, dilation=2),
        Case(padding=3, dilation=3, combine="add", heads=4),
        Case(padding=0, dilation=2, height=7, width=6, channels=4),
    ),
    "shapes": (
        Case(batch=2, channels=20, height=4, width=12, combine="add"),
        Case(height=5, width=7, channels=5),
        Case(channels=6, width=6, heads=2, height=7),
        Case(channels=9, heads=3, height=3, width=4, batch=2),
        Case(channels=1, height=4, width=4),
        Case(channels=136, height=4, width=4),
        Case(channels=136, height=2, width=3, heads=2, stride=2, dtype="bfloat16"),
        Case(channels=4, height=1, width=1),
        Case(channels=4, height=20, width=20),
    ),
    "kernel sizes": (
        Case(size=5, padding=2, channels=4, height=4, width=4),
        Case(size=5, padding=2, stride=2, height=6, width=4, heads=2),
        Case(size=5, padding=4, dilation=2, channels=3, height=5, width=5, combine="add"),
        Case(size=5, padding=2, dtype="float64", channels=3, height=5, width=4),
        Case(size=7, padding=3, channels=3, height=4, width=4, dtype="float16"),
        Case(size=7, padding=3, channels=4, height=7, width=5, stride=2, combine="add"),
    ),
    "plain": (
        *(Case(stride=3, height=9, width=10, dtype=dtype) for dtype in FOUR),
        Case(stride=3, padding=2, dilation=2, heads=2, combine="add"),
        Case(size=9, padding=4, height=5, width=6, channels=4),
        Case(size=1, padding=0),
        Case(size=1, padding=1, stride=2, dtype="float16", combine="add", heads=4),
        Case(size=7, padding=3, channels=3, height=5, width=4, dtype="float64"),
        Case(stride=3, scale=0.3, batch=2, heads=2),
    ),
    "normalized": (
        Case(scale=0.47),
        Case(scale=0.47, stride=2, heads=2),
        Case(scale=1.5, size=5, padding=2, channels=4, height=4),
        Case(scale=0.2, size=7, padding=3, channels=4, height=4, width=4),
        *(Case(scale=0.47, dtype=dtype, channels=4, height=4, width=4) for dtype in ("float64", *HALVES)),
        *(Norm((2, 18, 3, 5), 9, dtype) for dtype in FOUR),
        Norm((1, 49, 2, 3), 49),
        Norm((3, 8, 4, 1), 4),
        Norm((1, 27, 2, 2), 9, equal=True),
        Norm((1, 9, 2, 2), 9, "float16", equal=True),
        Norm((0, 9, 2, 2), 9),
    ),
    "upscaled": (
        *(Case(upscale=2, dtype=dtype, channels=6, height=3, width=5, heads=2) for dtype in FOUR),
        Case(upscale=2, scale=0.47, channels=8, height=4, width=8, batch=2),
        Case(upscale=3, size=5, padding=4, dilation=2, channels=3, height=5, width=4, combine="add"),
        Case(upscale=2, stride=2, padding=0, channels=4, height=6, width=9),
        Case(upscale=2, stride=3, scale=0.3, channels=4, heads=2, height=6, width=5),
        Case(upscale=2, size=9, padding=4, channels=2, height=3, width=4, combine="add"),
        Case(upscale=2, batch=0),
    ),
    "needs": (
        *(Case(needs=needs, channels=4, height=4, width=4) for needs in ((True, False, False), (False, True, False))),
        *(Case(needs=needs, channels=4, height=4, width=4) for needs in ((False, False, True), (False, False, False))),
        *(Case(needs=needs, stride=3) for needs in ((True, False, True), (False, True, False), (False, False, True))),
        Case(batch=0),
        Case(batch=0, stride=3, size=9, padding=4),
        Case(batch=0, scale=0.5),
        Case(channels=0),
        Case(height=0, padding=2),
        Case(height=0, padding=2, stride=3, width=4),
    ),
}
INCOMPLETE = "incomplete"  # two cases that must fail


# --- the simulator ----------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Makes memory NaN before it is written, threads of a block take turns, and each kernel is written out once."""
    from numba.cuda.simulator import kernel, kernelapi

    from ddf_convert.cuda.kernel_spec import KernelSpec

    torch.use_deterministic_algorithms(True)  # with it, torch fills what it allocates with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    one = torch.zeros(1)
    for made in (torch.empty(4), torch.empty_like(one), one.new_empty(2, dtype=torch.float64)):
        assert made.isnan().all(), "torch no longer fills what it allocates"
    kernelapi.np = _Numpy()
    kernel.BlockThread = _Thread
    kernel.BlockManager = _Block
    write_out, written = KernelSpec.build, {}

    def build(variant: KernelSpec, functions: dict[str, Any], compute: Any) -> Callable[..., None]:
        if variant not in written:  # it says what the functions and the type of sums are
            written[variant] = write_out(variant, functions, compute)
        return written[variant]

    KernelSpec.build = build


class _Numpy:
    """NumPy, whose new arrays hold NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def empty(self, shape: Any, dtype: Any) -> Any:
        return np.full(shape, math.nan, dtype)


def _locked() -> threading.Lock:
    """A lock that one thread waits for until another releases it."""
    lock = threading.Lock()
    lock.acquire()
    return lock


class _Thread(threading.Thread):
    """A thread of a block; it runs from one barrier to the next."""

    def __init__(self, block: _Block, block_index: Any, thread_index: Any, arguments: tuple[Any, ...]) -> None:
        from numba.cuda.simulator.kernelapi import Dim3

        super().__init__(daemon=True)
        self.blockIdx, self.threadIdx = Dim3(*block_index), Dim3(*thread_index)
        self._block = block
        self._arguments = arguments
        self._turn = _locked()
        self.barrier: int | None = None  # line of the kernel at which it waits
        self.error: BaseException | None = None

    def run(self) -> None:
        self._turn.acquire()
        try:
            self._block.kernel(*self._arguments)
        except BaseException as error:
            self.error = error
        self.barrier = None
        self._block.handed_back.release()

    def advance(self) -> None:
        """Runs it up to its next barrier, or its end."""
        self._turn.release()
        self._block.handed_back.acquire()
        if self.error is not None:
            raise RuntimeError(f"block {self.blockIdx.x}, thread {self.threadIdx.x}: {self.error}") from self.error

    def syncthreads(self) -> None:
        """What the simulator calls for a barrier."""
        frame: Any = sys._getframe()
        while not frame.f_code.co_filename.startswith("<ddf_convert "):
            frame = frame.f_back
        self.barrier = frame.f_lineno
        self._block.handed_back.release()
        self._turn.acquire()


class _Block:
    """Stands for the simulator's manager of a block."""

    def __init__(self, kernel: Any, grid: Any, threads: Any, debug: bool) -> None:
        self.kernel = kernel
        self.handed_back = _locked()
        self._shape = threads

    def run(self, index: Any, *arguments: Any) -> None:
        threads = [_Thread(self, index, place, arguments) for place in np.ndindex(*self._shape)]
        for thread in threads:
            thread.start()
        waits = True
        while waits:
            for thread in threads:
                thread.advance()
            barriers = {thread.barrier for thread in threads}
            if len(barriers) > 1:
                raise RuntimeError(f"block {index}: the threads wait at different barriers: lines {barriers}")
            waits = barriers != {None}
            threads.reverse()


# --- cases ------------------------------------------------------------------------------------------------------------


def check(case: Case | Norm, layout: torch.memory_format) -> tuple[dict[str, float], list[str]]:
    """The errors of each result, and complaints about what each of them is."""
    errors: dict[str, float] = {}
    complaints: list[str] = []
    for name, made, expected, dtype, kept in (_norm if isinstance(case, Norm) else _call)(case, layout):
        if made.shape != expected.shape or made.dtype != dtype:
            complaints.append(f"{name} is {tuple(made.shape)} of {made.dtype}, not {tuple(expected.shape)} of {dtype}")
        elif kept is not None and not made.is_contiguous(memory_format=kept):
            complaints.append(f"{name} is not {kept}: its strides are {made.stride()}")
        elif made.numel():
            scale = max(1e-30, expected.abs().max().item())
            errors[name] = (made.double() - expected).abs().max().item() / scale
    return errors, complaints


# Name, result, what is expected, its dtype, and its layout if it has to have one.
Result = tuple[str, Tensor, Tensor, torch.dtype, torch.memory_format | None]


def _call(case: Case, layout: torch.memory_format) -> Iterator[Result]:
    from ddf_convert import reference
    from ddf_convert.cuda import dispatch
    from ddf_convert.reference.checks import gradient_formats, memory_format, output_size

    dtype = getattr(torch, case.dtype)
    geometry = reference.Geometry(case.stride, case.padding, case.dilation, case.combine, case.upscale)
    rows, columns = (output_size(side, case.size, *geometry[:3]) for side in (case.height, case.width))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype, memory_format=layout)

    input = draw(case.batch, case.channels, case.height, case.width)
    upscale, filters = case.upscale, case.upscale**2
    channel = torch.randn(case.batch, filters * case.channels, case.size, case.size).to(dtype)
    spatial = draw(case.batch, filters * case.heads * case.size**2, rows, columns)
    grad = draw(case.batch, case.channels, upscale * rows, upscale * columns)
    exact = [tensor.double() for tensor in (input, channel, spatial)]
    normalized = exact[2] if case.scale is None else reference.filter_norm(exact[2], case.size**2, case.scale)

    output = dispatch.forward(input, channel, spatial, geometry, case.scale)
    yield "output", output, reference.forward(*exact[:2], normalized, geometry), dtype, memory_format(input)
    gradients = dispatch.backward(grad, input, channel, spatial, geometry, case.needs)
    expected = reference.backward(grad.double(), *exact, geometry, case.needs)
    names = ("grad_input", "grad_channel", "grad_spatial")
    for name, made, wanted, kept in zip(names, gradients, expected, gradient_formats(input), strict=True):
        assert (made is None) == (wanted is None)
        if made is not None:
            yield name, made, wanted, dtype, kept


def _norm(case: Norm, layout: torch.memory_format) -> Iterator[Result]:
    from ddf_convert import reference
    from ddf_convert.cuda import dispatch
    from ddf_convert.reference.checks import memory_format

    dtype = getattr(torch, case.dtype)
    filters = torch.randn(case.shape)
    if case.equal:
        filters = filters[:, :1].expand(case.shape)
    filters, grad = (each.to(dtype, memory_format=layout) for each in (filters, torch.randn(case.shape)))
    made = dispatch.filter_norm(filters, case.taps, 0.7)
    yield "normalized", made, reference.filter_norm(filters.double(), case.taps, 0.7), dtype, memory_format(filters)
    if case.equal:
        return  # the gradient is 1e10 times that of the result: more than halves hold
    made = dispatch.filter_norm_backward(grad, filters, case.taps, 0.7)
    exact = reference.filter_norm_backward(grad.double(), filters.double(), case.taps, 0.7)
    yield "gradient", made, exact, dtype, memory_format(filters)


def chosen(name: str, layout: str, part: str) -> tuple[Case | Norm, ...]:
    """The cases of a group, or half of them."""
    return GROUPS[name] if part == "all" else GROUPS[name][list(LAYOUTS).index(layout) :: 2]


def group(name: str, layout: str, part: str) -> list[dict[str, Any]]:
    """Runs cases; returns what it found of each."""
    if name == INCOMPLETE:
        with without_last_block():
            return [found(case, layout) for case in GROUPS["dtypes"][:2]]
    return [found(case, layout) for case in chosen(name, layout, part)]


def found(case: Case | Norm, layout: str) -> dict[str, Any]:
    """What there is to say of one case."""
    torch.manual_seed(0)
    try:
        errors, complaints = check(case, LAYOUTS[layout])
    except Exception as error:
        errors, complaints = {}, [f"{type(error).__name__}: {error}"]
    return {"case": case.name, "dtype": case.dtype, "errors": errors, "complaints": complaints}


def without_last_block() -> Any:
    """Leaves out the last block of every launch."""
    from ddf_convert.cuda.codegen import simulator

    whole = simulator.simulate
    return mock.patch.object(
        simulator, "simulate", lambda variant, blocks, arguments: whole(variant, blocks - 1, arguments)
    )


def main() -> None:
    """Serves the groups that standard input names, until it ends."""
    assert os.environ.get("NUMBA_ENABLE_CUDASIM") == "1", "set NUMBA_ENABLE_CUDASIM=1"
    torch.set_num_threads(1)
    prepare()
    for line in sys.stdin:
        print(json.dumps(group(*line.strip().split(", "))), flush=True)


if __name__ == "__main__":
    main()
