"""Compiled CUDA kernels on disk. Needs no GPU."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from support.processes import python

from ddf_convert.cuda.codegen import ptx as compiler
from ddf_convert.cuda.kernel_spec import FilterNormSpec
from ddf_convert.utils import logging as notices

VARIANT = FilterNormSpec("float32", False, gradient=False)
SM90 = (9, 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    notices._warned.clear()
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
    monkeypatch.setattr(compiler, "_toolchain_hash", lambda: "other sources or versions")
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
    assert len(compilations) == 2  # the first damaged read has repaired it


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
    notices._warned.clear()
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    notices._warned.clear()
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        assert compiler.ptx(VARIANT, SM90) == compiler.ptx(VARIANT, SM90)
        compiler.ptx(FilterNormSpec("float16", False, gradient=False), SM90)
    assert len(compilations) == 3
    assert list(tmp_path.iterdir()) == []
    (record,) = caplog.records
    assert "no folder to keep compiled CUDA kernels in" in record.message
    assert "set NUMBA_CACHE_DIR" in record.message


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
