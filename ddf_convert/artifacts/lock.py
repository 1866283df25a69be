"""A folder that one process writes at a time.

The lock is that of the operating system on the file ``.lock`` in the folder. It ends with the process, however that
ends, so that a file left behind blocks nothing. What the file says, who holds it, is for people.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
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
    """A context in which no other process enters this context for the same folder.

    A folder that does not exist is made, and removed at the end if nothing else was put there. Where the file system
    has no locks a warning says so, once, and the context is entered.

    Args:
        path: The folder.
        option: The option that names it, for the error.

    Raises:
        InUseError: Another process holds it; the message names that process.
        ArtifactError: The folder cannot be written.
    """
    folder = Path(path)
    check_writable(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    file, owner = folder / LOCK, os.getpid()
    descriptor = _acquired(file, folder, option)
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not in a process that was forked meanwhile
            _release(descriptor, file)
            with suppress(OSError):  # the first one that is not empty
                for each in made:
                    each.rmdir()


def _acquired(file: Path, folder: Path, option: str) -> int:
    """A descriptor of the file that stands at its path, locked."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # whoever made the folder removed it in between
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
        if _is_at(descriptor, file):
            break
        _close(descriptor)  # whoever held it removed it in between
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def _release(descriptor: int, file: Path) -> None:
    """Removes the file while it is still locked: nobody can lock what is about to go."""
    with suppress(OSError):  # Windows removes no open file; it stays, unlocked
        if _is_at(descriptor, file):
            file.unlink()
    _close(descriptor)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
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


def _system_lock() -> Callable[[int], None]:
    """What locks a descriptor, and raises ``BlockingIOError`` if another has locked it."""
    if sys.platform == "win32":
        import msvcrt

        def lock(descriptor: int) -> None:
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a lock keeps others from reading, too: not what the file says
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except PermissionError as error:
                raise BlockingIOError from error
            finally:
                os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        def lock(descriptor: int) -> None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    return lock


_lock = _system_lock()


def _let_go() -> None:
    """In a process that was forked: the lock is its parent's, and must end with it."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_let_go)
