"""Compilation of kernels: at first use, kept on disk, announced when it takes long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, NullCache

from ddf_convert.notices import tell, told_if_slow

_ready: set[tuple[Any, type]] = set()


def _hash_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _KernelCache(FunctionCache):
    """Numba's disk cache, keyed by all sources of the kernels too: Numba itself looks only at the kernel's own file."""

    _sources = _hash_sources()

    def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
        return (*super()._index_key(*arguments), self._sources)  # type: ignore[no-untyped-call]


def kernel(function: Callable[..., None]) -> Any:
    """Decorates a function ``(first, last, ..., like)`` that Numba compiles at its first call, without the GIL."""
    dispatcher: Any = njit(nogil=True)(function)
    try:
        dispatcher._cache = _KernelCache(function)  # type: ignore[no-untyped-call]
    except RuntimeError:  # no folder that can be written to: compile in every process
        tell("no folder to keep compiled kernels in; set NUMBA_CACHE_DIR to one that can be written to")
    return dispatcher


def prepare(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Compiles a kernel for these arguments, or loads it from the disk, if this process has not done so yet.

    Only the last argument, which says how tensors are stored, changes its type from call to call.
    """
    key = (kernel, type(arguments[-1]))
    if key in _ready:
        return
    with told_if_slow(_announcement(kernel, arguments[-1])):
        try:
            kernel(0, 0, *arguments)
        except Exception:
            # A damaged or unreadable cache must not stop anyone; what else is wrong shows again without the cache.
            folder, kernel._cache = cache_folder(kernel), NullCache()
            kernel(0, 0, *arguments)
            tell(f"the kept compiled kernels cannot be used; delete {folder}")
    _ready.add(key)


def cache_folder(kernel: Any) -> str | None:
    """The folder in which a kernel is kept once compiled; None if it is not."""
    folder: str | None = kernel._cache.cache_path
    return folder


def _announcement(kernel: Any, like: Any) -> str:
    stored = {"uint16": "float16", "int16": "bfloat16"}.get(str(like.dtype), str(like.dtype))
    where = kernel.py_func.__module__.rpartition(".")[2]
    name = kernel.py_func.__name__
    return f"compiling the CPU kernel {name} for {where} {stored} maps (once; kept in {cache_folder(kernel)})"
