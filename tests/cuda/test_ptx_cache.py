"""Compiled CUDA kernels on disk, and what happens where the kernels cannot run. Needs no GPU."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ddf_convert import cuda, reference
from ddf_convert.cuda import dispatch
from ddf_convert.cuda.codegen import ptx as compiler
from ddf_convert.cuda.kernel_spec import FilterNormSpec
from ddf_convert.ops.registration import BACKENDS
from ddf_convert.utils import logging as notices

VARIANT = FilterNormSpec("float32", False, gradient=False)
SM90 = (9, 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    notices._told.clear()
    return compiler.cache_folder()


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were compiled; a stand-in compiles them at once."""
    made: list[str] = []

    def stand_in(variant: FilterNormSpec, capability: tuple[int, int]) -> str:
        made.append(variant.name)
        return f".visible .entry kernel() // {variant.name} {capability}\n"

    monkeypatch.setattr(compiler, "compile_ptx", stand_in)
    return made


def test_compiled_once(folder: Path, compilations: list[str]) -> None:
    first = compiler.ptx(VARIANT, SM90)
    assert compiler.ptx(VARIANT, SM90) == first
    assert compilations == [VARIANT.name]
    assert compiler.entry(first) == "kernel"
    (file,) = folder.iterdir()
    assert file.name.startswith("filter_norm_float32_sm90_")


def test_what_the_key_holds(folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for variant in (
        VARIANT,
        FilterNormSpec("float16", False, gradient=False),
        FilterNormSpec("float32", False, gradient=True),
    ):
        for capability in (SM90, (8, 0)):
            compiler.ptx(variant, capability)
    assert len(compilations) == len(list(folder.iterdir())) == 6
    monkeypatch.setattr(compiler, "_makers", lambda: "other sources or versions")
    compiler.ptx(VARIANT, SM90)
    assert len(compilations) == 7


@pytest.mark.parametrize("damage", [b"", b"// short", b"// " + b"0" * 64 + b"\n.visible .entry other()\n"], ids=repr)
def test_damaged_files_are_made_again(folder: Path, compilations: list[str], damage: bytes) -> None:
    whole = compiler.ptx(VARIANT, SM90)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert compiler.ptx(VARIANT, SM90) == whole
    assert len(compilations) == 2
    assert compiler.ptx(VARIANT, SM90) == whole
    assert len(compilations) == 2  # mended


def test_half_of_a_file_is_damaged(folder: Path, compilations: list[str]) -> None:
    whole = compiler.ptx(VARIANT, SM90)
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-10])
    assert compiler.ptx(VARIANT, SM90) == whole
    assert len(compilations) == 2


@pytest.mark.parametrize("place", ["file", "file/ddf_convert_cuda"])
def test_without_a_folder_to_write_to(
    place: str,
    tmp_path: Path,
    compilations: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).touch()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file"))
    notices._told.clear()
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        assert compiler.ptx(VARIANT, SM90) == compiler.ptx(VARIANT, SM90)
    assert len(compilations) == 2
    (record,) = caplog.records
    assert "set NUMBA_CACHE_DIR" in record.message


def test_nothing_is_left_of_an_interrupted_write(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    compiler.ptx(VARIANT, SM90)
    assert list(folder.iterdir()) == []


def test_slow_compilations_are_announced(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import time

    monkeypatch.setattr(notices, "_TIMEOUT_S", 0.01)
    monkeypatch.setattr(compiler, "compile_ptx", lambda variant, capability: time.sleep(0.3) or ".visible .entry k()")
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        compiler.ptx(VARIANT, SM90)
    assert f"compiling the CUDA kernel filter norm float32 (once; kept in {folder})" in caplog.text


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_two_processes_at_once_and_a_third_later(tmp_path: Path) -> None:
    code = """
        from ddf_convert.cuda.codegen import ptx as compiler
        from ddf_convert.cuda.kernel_spec import FilterNormSpec
        made = []
        compile_ptx = compiler.compile_ptx
        compiler.compile_ptx = lambda *arguments: made.append(1) or compile_ptx(*arguments)
        text = compiler.ptx(FilterNormSpec("float32", False, gradient=False), (9, 0))
        print(len(made), compiler.entry(text) in text, ".target sm_90" in text)
    """
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=120)
        assert out.split()[1:] == ["True", "True"]
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)).stdout.split() == ["0", "True", "True"]
    assert len(list(tmp_path.rglob("*.ptx"))) == 1
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.skipif(importlib.util.find_spec("numba_cuda") is None, reason="numba-cuda is not installed")
def test_compiles_where_numpy_has_no_row_stack() -> None:
    """numba-cuda 0.30.4 asks for it, and NumPy 2.5 has it no more."""
    result = python("""
        import numpy
        if hasattr(numpy, "row_stack"):
            del numpy.row_stack
        from ddf_convert.cuda.codegen import ptx as compiler
        from ddf_convert.cuda.kernel_spec import FilterNormSpec
        for _ in range(2):
            print(".target sm_90" in compiler.compile_ptx(FilterNormSpec("float32", False, gradient=False), (9, 0)))
            print(hasattr(numpy, "row_stack"))
    """)
    assert result.stdout.split() == ["True", "False"] * 2, result.stderr


def test_numpys_own_row_stack_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "row_stack", np.vstack, raising=False)
    monkeypatch.setattr(compiler.importlib, "import_module", lambda name: pytest.fail("not needed"))
    compiler._import_array_functions()
    assert np.row_stack is np.vstack


def test_a_name_lent_to_numba_cuda_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the import fails, or if this numba-cuda has no such module."""
    seen: list[bool] = []

    def fail(error: type[Exception]) -> None:
        def load(name: str) -> None:
            seen.append(hasattr(np, "row_stack"))
            raise error(name)

        monkeypatch.setattr(compiler.importlib, "import_module", load)

    monkeypatch.delattr(np, "row_stack", raising=False)
    monkeypatch.delitem(sys.modules, "numba.cuda.np.arrayobj", raising=False)
    fail(ModuleNotFoundError)
    compiler._import_array_functions()
    assert not hasattr(np, "row_stack")
    fail(ValueError)
    with pytest.raises(ValueError, match="arrayobj"):
        compiler._import_array_functions()
    assert not hasattr(np, "row_stack")
    assert seen == [True, True]


@pytest.mark.parametrize("home", [None, "", "nowhere"])
def test_without_a_home(
    home: str | None,
    compilations: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Kernels are compiled and not kept; no folder is made where the process happens to work."""
    monkeypatch.chdir(tmp_path)
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path if home is None else path.replace("~", home or "."))
    notices._told.clear()
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        assert compiler.ptx(VARIANT, SM90) == compiler.ptx(VARIANT, SM90)
        compiler.ptx(FilterNormSpec("float16", False, gradient=False), SM90)
    assert len(compilations) == 3
    assert list(tmp_path.iterdir()) == []
    (record,) = caplog.records
    assert "no folder to keep compiled CUDA kernels in" in record.message
    assert "set NUMBA_CACHE_DIR" in record.message


def test_importing_needs_no_compiler_and_no_gpu() -> None:
    result = python("""
        import sys
        from ddf_convert import cuda
        print([name for name in ("numba", "numba.cuda", "numba_cuda") if name in sys.modules])
    """)
    assert result.stdout.strip() == "[]", result.stderr


# --- where the kernels cannot run -------------------------------------------------------------------------------------

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch and numba-cuda could use; tests take something of it away."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: SM90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Example")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_try", lambda device: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    dispatch._reasons.clear()
    notices._told.clear()
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


def test_kernels_are_kept_again_once_there_is_room(
    folder: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        compiler.ptx(VARIANT, SM90)
    assert list(folder.iterdir()) == []
    for _ in range(2):
        compiler.ptx(VARIANT, SM90)
    assert len(compilations) == 2
    assert len(list(folder.iterdir())) == 1


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
