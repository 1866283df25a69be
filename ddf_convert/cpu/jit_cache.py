"""Compiles kernels at first use and caches them on disk; a slow compilation is announced."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numba import config, njit
from numba.core import caching

from ddf_convert.errors import may_pass
from ddf_convert.utils.logging import warn_if_slow, warn_once

_DISABLED = bool(vars(config)["DISABLE_JIT"])  # when the kernels were decorated
_ready: set[tuple[Any, type]] = set()


def unusable() -> str | None:
    """Returns why the kernels cannot run in this process, and the fix; None if they can."""
    return "NUMBA_DISABLE_JIT is set, so Numba compiles nothing: unset it" if _DISABLED else None


def usable() -> bool:
    """Whether the kernels can run in this process; warns once if they cannot."""
    reason = unusable()
    if reason is not None:
        warn_once(f"CPU tensors take the slower PyTorch reference: {reason}")
    return reason is None


# --- the cache on disk: damaged files are made again; errors of the folder are only warned of -------------------------

_UserWideLocator: Any = getattr(caching, "UserWideCacheLocator", None) or vars(caching)["_UserWideCacheLocator"]


class _HomeLocator(_UserWideLocator):  # type: ignore[misc]
    """Numba's locator, which would make a folder named ``~`` in the working directory of a user without a home."""

    @classmethod
    def from_function(cls, function: Any, file: str) -> Any:
        if not os.path.isabs(cls(function, file).get_cache_path()):
            return None
        return super().from_function(function, file)


class _KernelCacheImpl(caching.CompileResultCacheImpl):
    """Numba's choice of folders, with :class:`_HomeLocator`."""

    _locator_classes = [  # noqa: RUF012  (as Numba has it)
        _HomeLocator if locator is _UserWideLocator else locator
        for locator in caching.CompileResultCacheImpl._locator_classes
    ]


class _SealedFiles(caching.IndexDataCacheFile):
    """Numba's cache files with a hash at the end: damaged machine code must not run."""

    @contextlib.contextmanager
    def _open_for_write(self, path: str) -> Iterator[io.BytesIO]:
        with super()._open_for_write(path) as file:
            buffer = io.BytesIO()
            yield buffer
            content = buffer.getvalue()
            file.write(content + hashlib.sha256(content).digest())

    def _load_index(self) -> Any:
        self._check(self._index_path)
        return super()._load_index()  # type: ignore[no-untyped-call]

    def _load_data(self, name: str) -> Any:
        self._check(self._data_path(name))  # type: ignore[no-untyped-call]
        return super()._load_data(name)  # type: ignore[no-untyped-call]

    def _check(self, path: str) -> None:
        if os.path.exists(path):
            content = Path(path).read_bytes()
            size = len(content) - hashlib.sha256().digest_size
            if size < 0 or hashlib.sha256(content[:size]).digest() != content[size:]:
                raise ValueError(f"{path} is damaged")


def _hash_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _KernelCache(caching.FunctionCache):
    """Numba's disk cache, also keyed by all sources of the kernels: Numba itself looks only at the kernel's own file.

    No error of the cache stops a kernel.
    """

    _impl_class = _KernelCacheImpl
    _sources = _hash_sources()

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        files = self._cache_file
        self._cache_file = _SealedFiles(  # type: ignore[no-untyped-call]
            self.cache_path, self._impl.filename_base, files._source_stamp
        )

    def _index_key(self, *arguments: Any) -> tuple[Any, ...]:
        return (*super()._index_key(*arguments), self._sources)  # type: ignore[no-untyped-call]

    def load_overload(self, *arguments: Any) -> Any:
        try:
            return super().load_overload(*arguments)  # type: ignore[no-untyped-call]
        except Exception as error:
            if not may_pass(error):  # damaged: start again
                with contextlib.suppress(OSError):
                    self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, *arguments: Any) -> None:
        try:
            super().save_overload(*arguments)  # type: ignore[no-untyped-call]
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            warn_once(
                f"cannot keep compiled CPU kernels in {self.cache_path} ({reason});"
                " set NUMBA_CACHE_DIR to a folder that can be written to"
            )


def cache_folder(kernel: Any) -> Path | None:
    """Returns the folder in which a compiled kernel is cached; None, with one warning, if there is none."""
    if isinstance(kernel._cache, caching.NullCache):
        try:
            kernel._cache = _KernelCache(kernel.py_func)
        except (RuntimeError, OSError):  # the next kernel looks again
            warn_once(
                "no folder to keep compiled CPU kernels in: every process compiles them, which takes seconds each;"
                " set NUMBA_CACHE_DIR to a folder that can be written to"
            )
    folder = kernel._cache.cache_path
    return Path(folder) if folder else None


# --- kernels ----------------------------------------------------------------------------------------------------------


def kernel(function: Callable[..., None]) -> Any:
    """Decorates a function ``(first, last, ..., like)``: compiled by Numba at its first call, without the GIL."""
    return njit(nogil=True)(function)


def prepare(kernel: Any, arguments: tuple[Any, ...]) -> None:
    """Compiles a kernel for these arguments, or loads it from the disk, if this process has not done so yet.

    The types of the arguments are always the same, except for that of the last one, ``like``.
    """
    key = (kernel, type(arguments[-1]))
    if key in _ready:
        return
    folder = cache_folder(kernel)
    # Without a folder there has been one warning, which is enough.
    announced = warn_if_slow(_announcement(kernel, arguments[-1], folder)) if folder else contextlib.nullcontext()
    with announced:
        kernel(0, 0, *arguments)
    _ready.add(key)


def _announcement(kernel: Any, like: Any, folder: Path) -> str:
    stored = {"uint16": "float16", "int16": "bfloat16"}.get(str(like.dtype), str(like.dtype))
    where = kernel.py_func.__module__.rpartition(".")[2]
    name = kernel.py_func.__name__
    return f"compiling the CPU kernel {name} for {where} {stored} maps (once; kept in {folder})"
