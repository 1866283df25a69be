"""What must not happen while a case runs: a write outside of where it may write, no end, too much memory."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fuzz_parts.spoil import ESCAPED

# Audit events that change files, and the places of the paths among their arguments.
_WRITING = {
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.symlink": (1,), "os.link": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "os.utime": (0,), "shutil.rmtree": (0,), "shutil.copyfile": (1,),
    "shutil.move": (0, 1), "os.mknod": (0,),
}  # fmt: skip
_FORBIDDEN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect")
_UNPICKLING = "pickle.find_class"
_CACHE_MODULES = ("numba", "copyreg", "builtins", "llvmlite", "ddf_convert", "numpy")  # of Numba's own cache
_TIMERS = ((signal.ITIMER_PROF, signal.SIGPROF, 1), (signal.ITIMER_REAL, signal.SIGALRM, 10))
_ADDRESSES = 8  # times as much address space as memory: reserving costs nothing


class Guard:
    """Notes, by Python's audit events, what a case does that it must not.

    Args:
        caches: Folders that the package and its libraries may keep things in.
    """

    def __init__(self, caches: tuple[Path, ...]) -> None:
        self.found: list[str] = []
        self._caches = tuple(str(folder.resolve()) for folder in caches)
        self._allowed: tuple[str, ...] | None = None
        sys.addaudithook(self._note)

    @contextmanager
    def watching(self, writable: Path, seconds: float, memory: int = 2**32) -> Iterator[list[str]]:
        """A context whose writes may go to one folder alone.

        Args:
            writable: The folder.
            seconds: Of processor time, since the machine may be busy; and a tenth of those of the clock.
            memory: Bytes that may come on top of what the process has (on Linux).

        Raises:
            TooLong: In the body, when the time is over.
        """
        self.found = []
        self._allowed = (str(writable.resolve()), "/dev/", "/proc/", *self._caches)
        limits = resource.getrlimit(resource.RLIMIT_AS)
        with suppress(OSError):  # the peak is counted from here on, where Linux lets us
            Path("/proc/self/clear_refs").write_text("5")
        before = _memory("VmHWM")
        if sys.platform == "linux":
            resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + _ADDRESSES * memory, limits[1]))
        for timer, number, limit in _TIMERS:
            signal.signal(number, _too_long)
            signal.setitimer(timer, limit * seconds)
        try:
            yield self.found
        finally:
            for timer, *_ in _TIMERS:
                signal.setitimer(timer, 0)
            self._allowed = None
            resource.setrlimit(resource.RLIMIT_AS, limits)
            grown = _memory("VmHWM") - before
            if grown > memory:
                self.found.append(f"took {grown / 2**20:.0f} MiB")

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        if event in _FORBIDDEN or (event == _UNPICKLING and not str(arguments[0]).startswith(_CACHE_MODULES)):
            self.found.append(f"{event} {arguments!r:.200}")
        paths: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3)
            paths = (path,) if writes or ESCAPED in str(path) else ()
        elif event in _WRITING:
            paths = tuple(arguments[place] for place in _WRITING[event])
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._may_write(os.fsdecode(path)):
                self.found.append(f"{event} {os.fsdecode(path)}")

    def _may_write(self, path: str) -> bool:
        assert self._allowed is not None
        full = os.path.realpath(path)
        return any(full == root.rstrip("/") or full.startswith(root.rstrip("/") + "/") for root in self._allowed)


class TooLong(BaseException):
    """A case that does not end; no ``except Exception`` may take it for an error of its own."""


def _too_long(number: int, frame: Any) -> None:
    raise TooLong


def _memory(which: str) -> int:
    """Bytes, from Linux's record of this process; 0 elsewhere."""
    with suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) * 1024
    return 0
