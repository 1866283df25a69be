"""Parameters, loads and launches that reach NVIDIA's driver. Needs no GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ptx_machine

pytest.importorskip("numba_cuda", reason="needs numba-cuda, which compiles for GPUs without one")

from ddf_convert.cuda.codegen import driver as launch
from ddf_convert.cuda.kernel_spec import FilterNormSpec


class Driver:
    """Stands in for NVIDIA's driver and records its calls."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.loaded: list[bytes] = []
        self.entries: list[bytes] = []
        self.launches: list[SimpleNamespace] = []

    def cuLaunchKernel(self, function: Any, *rest: Any) -> tuple[int]:  # noqa: N802
        *sizes, shared, stream, separate, extra = rest
        keys = (ctypes.c_void_p * 5).from_address(extra)
        assert (keys[0], keys[2], keys[4]) == (1, 2, None)  # parameters, their size, the end
        size = ctypes.c_size_t.from_address(keys[3]).value
        parameters = ctypes.string_at(keys[1], size)
        assert not separate
        self.launches.append(SimpleNamespace(**locals()))
        return (self.status,)

    def cuGetErrorName(self, status: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"CUDA_ERROR_OF_THIS_TEST"

    def cuModuleLoadData(self, text: bytes) -> tuple[int, str]:  # noqa: N802
        self.loaded.append(text)
        return 0, "module"

    def cuModuleGetFunction(self, module: str, entry: bytes) -> tuple[int, str]:  # noqa: N802
        self.entries.append(entry)
        return 0, "function"

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802
        return 0, 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_reach_the_driver_as_a_c_struct(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(launch, "driver", lambda: driver)
    number = ctypes.c_double if dtype == "float64" else ctypes.c_float
    kinds = [ctypes.c_void_p, ctypes.c_void_p, number, *[ctypes.c_int64] * 7]

    class Parameters(ctypes.Structure):
        _fields_ = [(f"parameter_{place}", kind) for place, kind in enumerate(kinds)]

    values = [2**47 + 512, 2**47 + 1024, 1.5, 2**40 + 1, 3, -4, 5, 6, 7, 8]
    variant = FilterNormSpec(dtype, add=False, gradient=False)
    launch.launch("function", launch.parameter_format(variant), 5, variant.threads, 77, values)
    (launched,) = driver.launches
    assert (launched.function, launched.sizes, launched.shared, launched.stream) == (
        "function",
        [5, 1, 1, 128, 1, 1],
        0,
        77,
    )
    assert [
        getattr(Parameters.from_buffer_copy(launched.parameters), field) for field, _ in Parameters._fields_
    ] == values
    assert len(launched.parameters) == ctypes.sizeof(Parameters)
    declared = ptx_machine.compiled(variant, (9, 0)).source.parameters.values()
    assert [offset for _, offset in declared] == [getattr(Parameters, field).offset for field, _ in Parameters._fields_]


def test_refused_launch_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "driver", lambda: Driver(status=701))
    variant = FilterNormSpec("float32", add=False, gradient=False)
    with pytest.raises(launch.DriverError, match="2 blocks of 128 threads: CUDA_ERROR_OF_THIS_TEST"):
        launch.launch("function", launch.parameter_format(variant), 2, 128, 0, [0, 0, 1.0, *range(7)])


def test_kernel_is_loaded_once_and_launched_on_the_current_stream(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(launch, "driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    variant = FilterNormSpec("float16", add=False, gradient=True)
    tensors = [torch.zeros(9) for _ in range(3)]
    for _ in range(2):
        launch.run(variant, 0, 3, (*tensors, 1.0, *range(7)))
    (text,) = driver.loaded
    assert text.endswith(b"\0")
    assert b".entry " + driver.entries[0] + b"(" in text
    first, second = driver.launches
    assert first.parameters == second.parameters
    assert (first.stream, first.sizes) == (77, [3, 1, 1, 128, 1, 1])
    assert [int.from_bytes(first.parameters[at : at + 8], "little") for at in (0, 8, 16)] == [
        tensor.data_ptr() for tensor in tensors
    ]
