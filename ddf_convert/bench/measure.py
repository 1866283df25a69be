"""What all benchmarks share: settings, the figures of one function, memory, precision, and the bandwidth of a copy."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.cost.timing import copies_needed, host_us, in_turn, median_ms
from ddf_convert.errors import UsageError, first_line
from ddf_convert.utils.device import describe

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Figures = dict[str, Any]
"""``forward_ms``, ``forward_backward_ms``, ``peak_mib``, ``host_us`` (None where unknown); or ``error`` alone."""

Progress = Callable[[str], object]
"""Receives what is measured next, for the user."""

_COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far beyond any cache
# Parameters of glibc's mallopt, and their defaults.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


def no_progress(message: str) -> None:
    """Ignores the progress."""


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What every benchmark needs to know.

    Attributes:
        batch: Images at a time.
        dtype: A key of ``DTYPES``.
        device: The device to measure.
        seconds: Minimum time to spend on each figure.
    """

    batch: int
    dtype: str
    device: torch.device
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain data."""
        return {**asdict(self), "device": str(self.device)}

    def document(self, bench: str, **content: Any) -> dict[str, Any]:
        """Returns the result of a benchmark as plain data, with the machine that it ran on."""
        return {"bench": bench, "machine": describe(self.device), **content}


@dataclass(frozen=True, kw_only=True)
class ConvBenchSettings(BenchSettings):
    """What the benchmarks of operator and layers need to know too.

    Attributes:
        channels: C.
        kernel_size: K.

    Raises:
        UsageError: K is even or below 3: FilterNorm has nothing to normalize, or the filter no center.
    """

    channels: int
    kernel_size: int

    def __post_init__(self) -> None:
        if self.kernel_size < 3 or self.kernel_size % 2 == 0:
            raise UsageError(f"--kernel-size {self.kernel_size}: must be odd, and at least 3")


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Implementation:
    """One of the functions that are measured side by side.

    Attributes:
        name: Its name in the tables.
        function: A function of the first input tensors.
        inputs: How many of them it takes.
        tf32: Whether its float32 products may be TF32.
        own: Whether it is ours: its failure is an error, that of a baseline a gap in the table.
    """

    name: str
    function: Callable[..., Tensor]
    inputs: int = 1
    tf32: bool = False
    own: bool = False

    def measure(self, inputs: Sequence[Sequence[Tensor]], device: torch.device, seconds: float) -> Figures:
        """Measures it on sets of inputs that are used in turn; of each set it takes what it needs.

        Raises:
            RuntimeError: The GPU is left unusable, so that nothing after it could be measured.
        """
        inputs = [tensors[: self.inputs] for tensors in inputs]
        if self.own:
            return measure(self.function, inputs, device, seconds)
        try:
            return measure(self.function, inputs, device, seconds)
        except torch.OutOfMemoryError:
            error = "out of memory"
        except Exception as caught:
            error = f"{type(caught).__name__}: {first_line(caught)}"
        if device.type == "cuda":  # here, where the failed call's tensors are free again
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        return {"error": error}


def measure(
    function: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]], device: torch.device, seconds: float
) -> Figures:
    """Measures a function of tensors, or a module with its parameters.

    Args:
        function: A function with one output.
        inputs: Sets of arguments of the same shapes, used in turn; those that require gradients get them.
        device: Their device.
        seconds: Minimum time to spend on each figure.
    """
    parameters: list[Tensor] = list(function.parameters()) if isinstance(function, nn.Module) else []

    def forward(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    grads = [torch.randn_like(forward(*tensors)) for tensors in inputs]

    def forward_backward(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        return torch.autograd.grad(function(*tensors), leaves + parameters, grad)

    with_grads = [(grad, *tensors) for grad, tensors in zip(grads, inputs, strict=True)]
    forward_backward(*with_grads[0])  # compilation and autotuning at first use belong to no figure
    return {
        "forward_ms": median_ms(in_turn(forward, inputs), device, seconds),
        "forward_backward_ms": median_ms(in_turn(forward_backward, with_grads), device, seconds),
        "peak_mib": peak_mib(lambda: forward_backward(*with_grads[0]), device),
        "host_us": host_us(in_turn(forward, inputs), device, seconds / 2),
    }


def random_leaf(shape: Sequence[int], dtype: str, layout: str, device: torch.device) -> Tensor:
    """Returns a normally distributed tensor that requires a gradient; dtype and layout by name."""
    tensor = torch.empty(shape, dtype=DTYPES[dtype], device=device, memory_format=LAYOUTS[layout])
    return tensor.normal_().requires_grad_()


def input_sets(make: Callable[[], Sequence[Tensor]], device: torch.device) -> list[Sequence[Tensor]]:
    """Returns one set of inputs; on a GPU so many that together they exceed its cache."""
    first = make()
    return [first, *(make() for _ in range(copies_needed(first, device) - 1))]


def map_sets(shape: Sequence[int], dtype: str, layout: str, device: torch.device) -> list[Sequence[Tensor]]:
    """Returns sets of one random map each, for layers that take one input."""
    return input_sets(lambda: (random_leaf(shape, dtype, layout, device),), device)


def move(module: nn.Module, dtype: str, layout: str, device: torch.device) -> nn.Module:
    """Moves a module to a device, a dtype and a layout, the latter two by name, and returns it."""
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "memory_format": LAYOUTS[layout], "device": device}
    return module.to(**options)


@contextlib.contextmanager
def convolution_settings(tf32: bool) -> Iterator[None]:
    """Sets whether float32 products are TF32, and lets cuDNN find its fastest algorithm; restores both at the end."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with warnings.catch_warnings():  # torch has newer names for TF32, but torch.compile fails with them
        warnings.simplefilter("ignore")
        before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, tf32, tf32
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


# --- memory -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Makes glibc keep freed memory instead of returning it to the system; does nothing where there is no glibc.

    Otherwise a large output costs a page fault for every 4 KiB of the next one. At 112x112 these faults are most of the
    time of some runs and absent from others. Training under jemalloc or tcmalloc behaves as here.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
        mallopt(_TRIM_THRESHOLD, _DEFAULT_TRIM_THRESHOLD)


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Returns the MiB that a call needs at its peak beyond what was allocated before; None where that is unknown.

    On a GPU this counts torch's allocator. On the CPU it counts the resident memory of the process, on Linux alone.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # or the call would reuse free memory and seem to need none
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:  # some containers forbid it
        return None
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


# --- bandwidth: the limit of a memory-bound operator ------------------------------------------------------------------


def copy_bandwidth(device: torch.device, seconds: float, size: int | None = None) -> float:
    """Returns the bandwidth of ``copy_`` between two tensors in bytes a second, reads and writes added.

    Args:
        device: The device.
        seconds: Minimum time to spend on it.
        size: Bytes of each tensor; far beyond the caches if None, and on a GPU at most an eighth of its free memory.
    """
    if size is None:
        size = _COPY_BYTES[device.type]
        if device.type == "cuda":
            size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    moved = 2 * source.nbytes
    return moved / (median_ms(lambda: target.copy_(source), device, seconds) / 1e3)


def forward_bytes(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, output: Tensor) -> int:
    """Counts each tensor of the operator once, as read or written."""
    return sum(tensor.nbytes for tensor in (input, channel_filter, spatial_filter, output))


def forward_backward_bytes(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, output: Tensor) -> int:
    """Counts what forward, the gradient of the input and the gradients of the filters read and write.

    A gradient is as large as its tensor. The gradient of the input needs the output's gradient and both filters. The
    gradients of the filters need the input, the output's gradient and both filters.
    """
    maps, filters = input.nbytes, channel_filter.nbytes + spatial_filter.nbytes
    grad_input = output.nbytes + filters + maps
    grad_filters = maps + output.nbytes + filters + filters
    return forward_bytes(input, channel_filter, spatial_filter, output) + grad_input + grad_filters
