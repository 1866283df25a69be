"""From a spec to PTX: compiled once for each architecture, kept on disk, announced when it takes long.

PTX is what Numba makes; the driver turns it into machine code when it is loaded, and keeps that itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import re
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ddf_convert.cuda.kernel_spec import KernelSpec
from ddf_convert.reference import EPSILON, LEAST_SQUARE
from ddf_convert.utils.logging import warn_if_slow, warn_once

_BFLOAT16 = (8, 0)  # the first architecture that rounds to bfloat16 itself
_lock = threading.Lock()  # Numba's compiler is not safe to enter twice
_import_lock = threading.Lock()

Capability = tuple[int, int]


def ptx(spec: KernelSpec, capability: Capability) -> str:
    """The PTX of a kernel, from the cache on disk if it is there.

    Args:
        spec: The kernel.
        capability: Compute capability to compile for, such as (9, 0).

    Raises:
        Exception: Numba's or NVVM's, where they cannot compile for this architecture.
    """
    folder = cache_folder()
    if folder is None:
        warn_once(
            "no folder to keep compiled CUDA kernels in: every process compiles them, which takes seconds each;"
            " set NUMBA_CACHE_DIR to a folder that can be written to"
        )
        with _lock:
            return compile_ptx(spec, capability)
    file = folder / _file_name(spec, capability)
    kept = _read(file)
    if kept is not None:
        return kept
    words = f"compiling the CUDA kernel {spec.name.replace('_', ' ')} (once; kept in {folder})"
    with warn_if_slow(words), _lock:
        made = compile_ptx(spec, capability)
    _write(file, made)
    return made


def compile_ptx(spec: KernelSpec, capability: Capability) -> str:
    """The PTX of a kernel, compiled now. Arguments as for :func:`ptx`."""
    from numba import cuda
    from numba.core import types

    from ddf_convert.cuda.codegen import intrinsics

    _import_array_functions()

    stored, compute = element_types(spec.dtype)
    functions = intrinsics.functions(stored, compute, spec.add, native_bfloat16=capability >= _BFLOAT16)
    kernel = spec.build(functions, compute)
    kinds = {"s": types.CPointer(stored), "c": types.CPointer(compute), "f": compute, "i": types.int64}
    signature = types.void(*(kinds[letter] for letter in spec.arguments))
    made: str
    made, _ = cuda.compile(  # type: ignore[attr-defined]
        kernel,
        signature,
        device=False,
        abi="numba",
        cc=capability,
        output="ptx",  # without launch bounds: with them ptxas spills a few registers for occupancy
    )
    return made


def _import_array_functions() -> None:
    """Imports the part of numba-cuda that NumPy 2.5 breaks, which else the first compilation imports.

    numba-cuda 0.30.4 asks for ``numpy.row_stack`` as it is imported, to have an implementation of it. NumPy 2.5 has it
    no more. It is there during the import alone: other libraries look for it to tell versions of NumPy apart.
    """
    module = "numba.cuda.np.arrayobj"
    with _import_lock:
        if module in sys.modules or hasattr(np, "row_stack"):
            return
        vars(np)["row_stack"] = _row_stack
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:  # another version of numba-cuda, which may not need it
            pass
        finally:
            del vars(np)["row_stack"]


def _row_stack(rows: Any) -> Any:
    """What ``numpy.row_stack`` was."""
    return np.vstack(rows)


def element_types(dtype: str) -> tuple[Any, Any]:
    """Numba's types of elements in memory and in registers; halves are stored as integers, see device.py."""
    from numba.core import types

    stored = {
        "float32": types.float32,
        "float64": types.float64,
        "float16": types.uint16,
        "bfloat16": types.int16,
    }[dtype]
    return stored, types.float64 if dtype == "float64" else types.float32


def entry(ptx: str) -> str:
    """The name of the kernel in PTX."""
    found = re.search(r"\.visible \.entry (\w+)", ptx)
    if found is None:
        raise ValueError("the PTX has no kernel")
    return found.group(1)


# --- the cache on disk: a file for each kernel; damaged ones are made again, a folder that refuses is done without ----


def cache_folder() -> Path | None:
    """Where compiled kernels are kept: ``NUMBA_CACHE_DIR``, or the user's folder for caches; None without a home."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "ddf_convert_cuda"
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # Relative: there is no home, or a variable that is to be ignored as it is.
    return Path(root) / "ddf_convert" / "cuda" if os.path.isabs(root) else None


@functools.cache
def _makers() -> str:
    """Everything but the spec that decides what the compiler makes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for package in ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "none"
        digest.update(f"{package} {version};".encode())
    digest.update(os.environ.get("CUDA_HOME", "").encode())
    digest.update(f"{EPSILON} {LEAST_SQUARE}".encode())  # of FilterNorm, defined outside of this package
    return digest.hexdigest()


def _file_name(spec: KernelSpec, capability: Capability) -> str:
    key = hashlib.sha256(f"{spec!r} {capability} {_makers()}".encode()).hexdigest()
    return f"{spec.name}_sm{capability[0]}{capability[1]}_{key[:24]}.ptx"


def _read(file: Path) -> str | None:
    """What was kept, if it is whole: the first line says what the rest must hash to."""
    try:
        seal, _, text = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if seal != _seal(text):
        return None
    return text.decode()


def _write(file: Path, text: str) -> None:
    """Whole or not at all, whoever else writes the same; a folder that cannot be written to is no error."""
    part = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.part")
    content = text.encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_seal(content) + b"\n" + content)
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):  # where there is a file in the folder's place
            part.unlink()
        warn_once(
            f"cannot keep compiled CUDA kernels in {file.parent} ({error.strerror});"
            " set NUMBA_CACHE_DIR to a folder that can be written to"
        )


def _seal(content: bytes) -> bytes:
    return b"// " + hashlib.sha256(content).hexdigest().encode()
