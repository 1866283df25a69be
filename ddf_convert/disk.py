"""What every writer of files shares: temporary names, locks on them, flushing, and what went wrong in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_TEMPORARY = re.compile(r"\.saving-[0-9a-f]{32}")
_STALE = 24 * 3600  # seconds after which a temporary file is nobody's, where locks say nothing
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Of a device that takes no more, whoever may write to it.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM}


@contextmanager
def temporary(beside: Path, folder: bool = False) -> Iterator[Path]:
    """A context with a new file, or folder, that is gone at its end, unless it was moved away.

    It is locked meanwhile: where a process was killed the lock is free, and :func:`remove_leftovers` knows.

    Args:
        beside: Folder that it is made in.
        folder: Whether to make a folder.

    Raises:
        OSError: It cannot be made.
    """
    path, lock = _locked(beside, folder)
    try:
        yield path
    finally:
        remove(path)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left of :func:`temporary`. What others still write, or cannot be removed, stays."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _remove_leftover(folder / name)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: It could not be written, for instance because the disk is full.
    """
    import safetensors.torch

    try:
        safetensors.torch.save_file(dict(tensors), file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # the system's errors come in its words
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error


def why(error: BaseException) -> str:
    """An error in the words of the operating system, if it has any."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def is_full(error: OSError) -> bool:
    """Whether the device takes no more, so that another name would not help."""
    return error.errno in _FULL


def _locked(beside: Path, folder: bool) -> tuple[Path, int | None]:
    while True:
        path = beside / f".saving-{uuid.uuid4().hex}"
        if folder:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(BlockingIOError, FileNotFoundError):  # taken for a leftover between its making and its lock
            lock = _lock(path)
            if lock is None or os.path.lexists(path):
                return path, lock
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None where the file system, or the system, has none.

    Raises:
        BlockingIOError: Another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftover(path: Path) -> None:
    lock = _lock(path)
    if lock is None and time.time() - path.stat().st_mtime < _STALE:
        return
    try:
        remove(path)
    finally:
        if lock is not None:
            os.close(lock)
