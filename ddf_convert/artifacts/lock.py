"""A lock on a folder, held by one process at a time.

The operating system locks the file ``.lock`` in the folder, and releases it when the process ends, in whatever way: a
file left behind blocks nothing. The file's content, the holder's name, is only for error messages.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddf_convert.artifacts.atomic import check_writable
from ddf_convert.errors import UsageError
from ddf_convert.utils.logging import warn_once

LOCK = ".lock"
_held: set[int] = set()  # descriptors


class InUseError(UsageError):
    """Another process holds the folder."""


@contextmanager
def locked(path: str | os.PathLike[str], option: str = "-o") -> Iterator[None]:
    """Holds the lock of a folder.

    A folder that does not exist is made, and removed at the end if it is empty. Where the file system has no locks, a
    warning says so once, and no lock is held. If another process holds the lock, InUseError names that process, and the
    ``option`` that chooses another folder.
    """
    folder = Path(path)
    check_writable(folder)
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    file, owner = folder / LOCK, os.getpid()
    descriptor = _acquire(file, folder, option)
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a process that was forked meanwhile
            _release(descriptor, file)
            with suppress(OSError):  # the first one that is not empty ends it
                for parent in made:
                    parent.rmdir()


def _acquire(file: Path, folder: Path, option: str) -> int:
    """Returns a locked descriptor of the file that is at this path."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # another process removed the folder in between
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}") from error
        _held.add(descriptor)
        try:
            _lock(descriptor)
        except BlockingIOError:
            holder = _holder(file)
            _close(descriptor)
            raise InUseError(
                f"{folder} is in use by {holder}: wait for it, or choose another folder ({option})"
            ) from None
        except OSError as error:
            warn_once(f"{folder} cannot be locked ({error.strerror}): let one process at a time write there")
        if _is_same_file(descriptor, file):
            break
        _close(descriptor)  # its last holder removed the file in between
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def _release(descriptor: int, file: Path) -> None:
    """Removes the file while it is still locked, so that no process can lock a file about to go, and closes it."""
    with suppress(OSError):  # Windows does not remove open files; it stays, unlocked
        if _is_same_file(descriptor, file):
            file.unlink()
    _close(descriptor)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _is_same_file(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    try:
        content = json.loads(file.read_bytes())
        return f"process {content['process']} on {content['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # locked bytes cannot be read: lock one behind the content
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _close_in_child() -> None:
    """Closes the descriptors in a forked process: the locks are its parent's, and must end with that."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_in_child)
