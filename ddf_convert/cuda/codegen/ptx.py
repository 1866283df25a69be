"""Compiles kernels to PTX, once for each architecture, and caches it on disk; a slow compilation is announced.

The driver makes machine code of the PTX when it loads it, and caches that itself.
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
from pathlib import Path
from typing import Any

import numpy as np

from ddf_convert.cuda.kernel_spec import KernelSpec
from ddf_convert.reference import EPSILON, LEAST_SQUARE
from ddf_convert.utils.device import package_version
from ddf_convert.utils.logging import warn_if_slow, warn_once

_BFLOAT16 = (8, 0)  # the first architecture that rounds to bfloat16 itself
_lock = threading.Lock()  # Numba's compiler is not safe to enter twice
_import_lock = threading.Lock()

Capability = tuple[int, int]


def ptx(spec: KernelSpec, capability: Capability) -> str:
    """Returns the PTX of a kernel for a compute capability, such as (9, 0), from the cache on disk if it is there.

    Numba or NVVM raise if they cannot compile for this architecture.
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
    """Returns the PTX of a kernel, compiled now."""
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
    """Imports the part of numba-cuda that NumPy 2.5 breaks, before the first compilation does.

    At its import, numba-cuda 0.30.4 asks for ``numpy.row_stack``, which NumPy 2.5 no longer has. It is defined only
    during the import: other libraries look for it to tell versions of NumPy apart.
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
    """Replaces ``numpy.row_stack``."""
    return np.vstack(rows)


def element_types(dtype: str) -> tuple[Any, Any]:
    """Returns Numba's types of elements in memory and in registers; half types are stored as integers."""
    from numba.core import types

    stored = {
        "float32": types.float32,
        "float64": types.float64,
        "float16": types.uint16,
        "bfloat16": types.int16,
    }[dtype]
    return stored, types.float64 if dtype == "float64" else types.float32


def entry(ptx: str) -> str:
    """Returns the name of the kernel in PTX."""
    found = re.search(r"\.visible \.entry (\w+)", ptx)
    if found is None:
        raise ValueError("the PTX has no kernel")
    return found.group(1)


# --- the cache on disk: damaged files are made again; errors of the folder are only warned of -------------------------


def cache_folder() -> Path | None:
    """Returns the folder of compiled kernels: ``NUMBA_CACHE_DIR`` or the user's cache folder; None without a home."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "ddf_convert_cuda"
    if sys.platform == "win32":
        root = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # A relative path means that there is no home, or that the variable is to be ignored.
    return Path(root) / "ddf_convert" / "cuda" if os.path.isabs(root) else None


@functools.cache
def _toolchain_hash() -> str:
    """Returns a hash of everything but the spec that decides on the compiled code."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    for package in ("numba", "numba-cuda", "llvmlite", "nvidia-nvvm", "nvidia-cuda-nvcc-cu12"):
        digest.update(f"{package} {package_version(package)};".encode())
    digest.update(os.environ.get("CUDA_HOME", "").encode())
    digest.update(f"{EPSILON} {LEAST_SQUARE}".encode())  # of FilterNorm, defined outside of this package
    return digest.hexdigest()


def _file_name(spec: KernelSpec, capability: Capability) -> str:
    key = hashlib.sha256(f"{spec!r} {capability} {_toolchain_hash()}".encode()).hexdigest()
    return f"{spec.name}_sm{capability[0]}{capability[1]}_{key[:24]}.ptx"


def _read(file: Path) -> str | None:
    """Returns the PTX in a file if it is whole: its first line holds the hash of the rest."""
    try:
        hash_line, _, text = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hash_line != _hash_line(text):
        return None
    return text.decode()


def _write(file: Path, text: str) -> None:
    """Writes a file atomically; warns if it cannot be written."""
    part = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.part")
    content = text.encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(_hash_line(content) + b"\n" + content)
        part.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):  # the folder's path may be a file
            part.unlink()
        warn_once(
            f"cannot keep compiled CUDA kernels in {file.parent} ({error.strerror});"
            " set NUMBA_CACHE_DIR to a folder that can be written to"
        )


def _hash_line(content: bytes) -> bytes:
    return b"// " + hashlib.sha256(content).hexdigest().encode()
