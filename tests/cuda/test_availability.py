"""What happens where the CUDA kernels cannot run. Needs no GPU."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import types

import pytest
import torch
from support.processes import python
from torch import Tensor

from ddf_convert import cuda, reference
from ddf_convert.cuda import dispatch
from ddf_convert.ops.ddf import BACKENDS
from ddf_convert.utils import logging as notices

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch and numba-cuda could use; tests take something of it away."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Example")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_try", lambda device: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    dispatch._reasons.clear()
    notices._warned.clear()
    yield
    dispatch._reasons.clear()


@pytest.mark.usefixtures("gpu")
@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_usable() -> None:
    assert cuda.unusable(GPU) is None


@pytest.mark.usefixtures("gpu")
def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        dispatch._reasons.clear()
        return cuda.unusable(GPU) or ""

    def refuse(device: torch.device) -> None:
        raise RuntimeError("load of filter_norm: CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_try", refuse)
        assert "UNSUPPORTED_PTX_VERSION" in reason()
        assert "update it" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
        assert "NVIDIA Example has compute capability 7.0" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert reason() == "numba-cuda is not installed: pip install 'numba-cuda[cu13]'"
        patch.setattr(torch.version, "cuda", "12.8")
        assert "[cu12]" in reason()
    with monkeypatch.context() as patch:
        patch.setattr(torch.version, "cuda", None)
        assert "not built for CUDA" in reason()


@pytest.mark.slow
def test_the_simulator_is_a_reason() -> None:
    result = python(
        """
        import importlib.util, torch
        torch.version.cuda = "13.0"
        from ddf_convert import cuda
        print(cuda.unusable(torch.device("cuda", 0)))
        """,
        NUMBA_ENABLE_CUDASIM="1",
    )
    if importlib.util.find_spec("numba_cuda") is None:
        assert "numba-cuda is not installed" in result.stdout
    else:
        assert "unset it" in result.stdout, result.stderr


# What may be better at the next call: errors as torch, the driver and the system raise them, alone or behind others.
PASSING = {
    "torch": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
    "torch, context": lambda: RuntimeError("CUDA error: out of memory"),
    "driver": lambda: RuntimeError("load of filter_norm: CUDA_ERROR_OUT_OF_MEMORY"),
    "memory": MemoryError,
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device", "kernel.ptx"),
    "disk, wrapped": lambda: wrapped(OSError(errno.EIO, "Input/output error")),
    "files": lambda: OSError(errno.EMFILE, "Too many open files"),
    "cut off": lambda: InterruptedError(errno.EINTR, "Interrupted system call"),
}
LASTING = {
    "old driver": lambda: RuntimeError("load of filter_norm: CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
    "no library": lambda: OSError("libnvvm.so: cannot open shared object file"),
    "no file": lambda: FileNotFoundError(errno.ENOENT, "No such file or directory"),
    "wrong result": lambda: RuntimeError("it gave a wrong result; please report it"),
    "numba": lambda: wrapped(TypeError("no such type")),
}


def wrapped(error: Exception) -> Exception:
    outer = ValueError("while lowering")
    outer.__cause__ = error
    return outer


class OnGPU(types.SimpleNamespace):
    """As much of a tensor as is asked whether kernels can work on it."""

    device = GPU


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("error", PASSING)
def test_what_may_pass_is_tried_again(
    error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[torch.device] = []

    def try_(device: torch.device) -> None:
        tried.append(device)
        if len(tried) < 3:
            raise PASSING[error]()

    monkeypatch.setattr(dispatch, "_missing", lambda: None)
    monkeypatch.setattr(dispatch, "_try", try_)
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        assert [cuda.usable(OnGPU()) for _ in range(4)] == [False, False, True, True]  # type: ignore[arg-type]
    assert len(tried) == 3
    (record,) = caplog.records
    assert "slower PyTorch reference for now" in record.message
    assert "the next call tries again" in record.message


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("error", LASTING)
def test_what_will_not_pass_is_tried_once(
    error: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[torch.device] = []

    def fail(device: torch.device) -> None:
        tried.append(device)
        raise LASTING[error]()

    monkeypatch.setattr(dispatch, "_missing", lambda: None)
    monkeypatch.setattr(dispatch, "_try", fail)
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        assert [cuda.usable(OnGPU()) for _ in range(3)] == [False] * 3  # type: ignore[arg-type]
    assert len(tried) == len(caplog.records) == 1


@pytest.mark.usefixtures("gpu")
def test_an_interrupt_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(device: torch.device) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dispatch, "_missing", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "_try", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cuda.unusable(GPU)
    assert cuda.unusable(GPU) is None


@pytest.mark.usefixtures("gpu")
def test_one_warning_and_the_reference(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(dispatch, "_missing", lambda: "something is missing: pip install it")
    made = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3), torch.randn(1, 9, 5, 5)

    usable = dispatch.usable
    monkeypatch.setattr(cuda, "usable", lambda tensor: usable(OnGPU()))  # type: ignore[arg-type]

    def call() -> Tensor:
        operator = importlib.import_module("ddf_convert.ops.ddf")
        return operator._forward(BACKENDS["CUDA"], *made, 1, 1, 1, "mul")

    with caplog.at_level(logging.WARNING, "ddf_convert"):
        torch.testing.assert_close(call(), reference.forward(*made, reference.Geometry(padding=1)))
        call()
    (record,) = caplog.records
    assert "slower PyTorch reference: something is missing: pip install it" in record.message


@pytest.mark.usefixtures("gpu")
def test_a_graph_capture_is_not_the_time_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(dispatch, "_missing", lambda: "not to be asked")
    assert cuda.usable(types.SimpleNamespace(device=GPU))  # type: ignore[arg-type]


@pytest.mark.slow
def test_importing_needs_no_compiler_and_no_gpu() -> None:
    result = python("""
        import sys
        from ddf_convert import cuda
        print([name for name in ("numba", "numba.cuda", "numba_cuda") if name in sys.modules])
    """)
    assert result.stdout.strip() == "[]", result.stderr
