"""Kernels in Numba's CUDA simulator, with a Python twin of each function of intrinsics.py.

The simulator (``NUMBA_ENABLE_CUDASIM=1``) runs kernels as Python threads on the CPU, slowly, to check their results.
Pointers are flat arrays with an offset here; elements are NumPy scalars of the type of a register.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddf_convert.cuda.codegen.ptx import element_types
from ddf_convert.cuda.kernel_spec import KernelSpec


class Pointer(NamedTuple):
    """An address: an element of a flat array."""

    array: Any
    offset: int = 0


def functions(dtype: str, add: bool) -> dict[str, Any]:
    """Returns the twins of ``intrinsics.functions`` for one dtype."""
    kind = np.float64 if dtype == "float64" else np.float32

    def widen(stored: Any) -> Any:
        return kind(_WIDEN[dtype](stored))

    def loads(lanes: int) -> Any:
        def load(pointer: Pointer, index: int, ok: bool, also: bool) -> tuple[Any, ...]:
            if not (ok and also):
                return (kind(0),) * lanes
            first = pointer.offset + index
            if first < 0 or first % lanes or first + lanes > len(pointer.array):
                raise IndexError(f"load of {lanes} elements at {first} of {len(pointer.array)}")
            return tuple(widen(pointer.array[first + lane]) for lane in range(lanes))

        return load

    def stores(lanes: int, narrow: Any) -> Any:
        def store(pointer: Pointer, index: int, values: tuple[Any, ...]) -> None:
            first = pointer.offset + index
            if first < 0 or first % lanes or first + lanes > len(pointer.array) or len(values) != lanes:
                raise IndexError(f"store of {lanes} elements at {first} of {len(pointer.array)}")
            for lane in range(lanes):
                pointer.array[first + lane] = narrow(values[lane])

        return store

    def fetches(lanes: int) -> Any:
        def fetch(array: Any, index: int) -> tuple[Any, ...]:
            if index < 0 or index % lanes or index + lanes > len(array):
                raise IndexError(f"fetch of {lanes} elements at {index} of {len(array)}")
            return tuple(array[index + lane] for lane in range(lanes))

        return fetch

    def put(array: Any, index: int, value: Any) -> None:
        if index < 0:
            raise IndexError(f"put at {index}")
        array[index] = value

    def fma_combine(total: Any, a: Any, b: Any, feature: Any) -> Any:
        combined = [a + each if add else a * each for each in b]
        return tuple(t + w * f for t, w, f in zip(total, combined, feature, strict=True))

    def accumulate(total: Any, weight: Any, product: Any) -> Any:
        return tuple(t + (p if add else weight * p) for t, p in zip(total, product, strict=True))

    def dot(weights: Any, product: Any) -> Any:
        return kind(sum(p if add else w * p for w, p in zip(weights, product, strict=True)))

    def sync_warp() -> None:
        from numba import cuda

        # The simulator has no warps; the kernels call this with all threads of the block.
        cuda.simulator.kernel._get_kernel_context().syncthreads()

    def everywhere(function: Any) -> dict[int, Any]:
        return dict.fromkeys((1, 2, 4), function)

    return {
        "ALIGNMENT": None,
        "shift": lambda pointer, index: Pointer(pointer.array, pointer.offset + index),
        "load": {lanes: loads(lanes) for lanes in (1, 2, 4)},
        "store": {lanes: stores(lanes, _NARROW[dtype]) for lanes in (1, 2, 4)},
        "store_sum": stores(1, kind),
        "fetch": {lanes: fetches(lanes) for lanes in (1, 2, 4)},
        "put": put,
        "divide": lambda dividend, divisor: int(dividend) // int(divisor),
        "opaque": lambda index: index,
        "sync_warp": sync_warp,
        "fma_combine": everywhere(fma_combine),
        "multiply": everywhere(lambda a, b: tuple(x * y for x, y in zip(a, b, strict=True))),
        "accumulate": everywhere(accumulate),
        "dot": everywhere(dot),
    }


def _widen_bfloat16(stored: Any) -> Any:
    return np.array([int(stored) & 0xFFFF], dtype=np.uint32).__lshift__(16).view(np.float32)[0]


def _narrow_bfloat16(value: Any) -> Any:
    return torch.tensor(float(value)).to(torch.bfloat16).view(torch.int16).item()


_WIDEN = {
    "float32": lambda stored: stored,
    "float64": lambda stored: stored,
    "float16": lambda stored: np.uint16(stored).view(np.float16),
    "bfloat16": _widen_bfloat16,
}
_NARROW = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": lambda value: np.float16(value).view(np.uint16),
    "bfloat16": _narrow_bfloat16,
}


def simulate(spec: KernelSpec, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Runs a kernel in the simulator; ``arguments`` are numbers, and dense CPU tensors for pointers."""
    from numba import cuda

    _, compute = element_types(spec.dtype)
    kernel = spec.build(functions(spec.dtype, spec.add), compute)
    kind = np.float64 if spec.dtype == "float64" else np.float32
    made = [
        Pointer(_flat(argument)) if letter in "sc" else kind(argument) if letter == "f" else argument
        for letter, argument in zip(spec.arguments, arguments, strict=True)
    ]
    cuda.jit(kernel)[blocks, spec.threads](*made)


def _flat(tensor: Tensor) -> Any:
    """Returns the elements in the order of memory."""
    words = {torch.float16: torch.uint16, torch.bfloat16: torch.int16}
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat.view(words.get(tensor.dtype, tensor.dtype)).numpy()
