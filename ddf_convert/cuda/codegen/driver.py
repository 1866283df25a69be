"""Loads compiled kernels with NVIDIA's driver and launches them on torch's current stream, asynchronously."""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from ddf_convert.cuda.codegen.ptx import entry, ptx
from ddf_convert.cuda.kernel_spec import KernelSpec

_lock = threading.Lock()
_loaded: dict[tuple[KernelSpec, int], tuple[Any, struct.Struct]] = {}  # a kernel stays loaded as long as the process
_bound = threading.local()

# The driver takes a kernel's parameters as one packed buffer, in a list of keys and values (see cuLaunchKernel).
_PARAMETERS, _PARAMETERS_SIZE, _END = 1, 2, 0
_FORMAT = {"s": "P", "c": "P", "i": "q"}


class DriverError(RuntimeError):
    """The driver refused a call."""


def run(spec: KernelSpec, device: int, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Launches a kernel on the current stream of a device; raises DriverError if the driver cannot.

    ``arguments`` are numbers, and tensors on that device for pointers. Other streams must not free the tensors before
    the kernel is done: torch's allocator takes care of that for tensors of the current stream.
    """
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return run(spec, device, blocks, arguments)
    function, format = _loaded.get((spec, device)) or _load(spec, device)
    if device not in getattr(_bound, "devices", ()):
        _bind(device)
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    launch(function, format, blocks, spec.threads, torch._C._cuda_getCurrentRawStream(device), values)


def launch(function: Any, format: struct.Struct, blocks: int, threads: int, stream: int, values: list[Any]) -> None:
    """Launches a CUfunction with parameters in a format; raises DriverError if the driver refuses."""
    parameters = ctypes.create_string_buffer(format.pack(*values), format.size)
    size = ctypes.c_size_t(format.size)
    extra = (ctypes.c_void_p * 5)(
        _PARAMETERS, ctypes.addressof(parameters), _PARAMETERS_SIZE, ctypes.addressof(size), _END
    )
    (status,) = driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, 0, ctypes.addressof(extra))
    if status:
        raise DriverError(f"launch of {blocks} blocks of {threads} threads: {_reason(status)}")


@functools.cache
def driver() -> Any:
    """Returns NVIDIA's driver as Python functions (of the package cuda-bindings, which numba-cuda needs)."""
    from cuda.bindings import driver

    return driver


def parameter_format(spec: KernelSpec) -> struct.Struct:
    """Returns the memory layout of a kernel's parameters, which is that of a C struct."""
    letters = {**_FORMAT, "f": "d" if spec.dtype == "float64" else "f"}
    return struct.Struct("@" + "".join(letters[letter] for letter in spec.arguments))


def _load(spec: KernelSpec, device: int) -> tuple[Any, struct.Struct]:
    """Compiles a kernel, or reads it from the disk, and loads it into the current device's context."""
    if torch.cuda.is_current_stream_capturing():
        raise DriverError(
            f"the CUDA kernel {spec.name} is not loaded yet and a CUDA graph is being captured;"
            " run the model once before the capture"
        )
    text = ptx(spec, torch.cuda.get_device_capability(device))
    with _lock:
        if (spec, device) not in _loaded:
            _bind(device)
            status, module = driver().cuModuleLoadData(text.encode() + b"\0")
            if status:
                raise DriverError(f"load of {spec.name}: {_reason(status)}")
            status, function = driver().cuModuleGetFunction(module, entry(text).encode())
            if status:
                raise DriverError(f"{spec.name} in its module: {_reason(status)}")
            _loaded[spec, device] = function, parameter_format(spec)
    return _loaded[spec, device]


def _bind(device: int) -> None:
    """Binds the device's context to this thread, unless torch has done so: a new thread has none."""
    status, context = driver().cuCtxGetCurrent()
    if status or not int(context):
        status, handle = driver().cuDeviceGet(device)
        if not status:
            status, context = driver().cuDevicePrimaryCtxRetain(handle)
        if not status:
            (status,) = driver().cuCtxSetCurrent(context)
        if status:
            raise DriverError(f"context of cuda:{device}: {_reason(status)}")
    _bound.devices = {*getattr(_bound, "devices", ()), device}


def _reason(status: Any) -> str:
    code, name = driver().cuGetErrorName(status)
    return name.decode() if not code and name else str(status)
