"""Notes what a case must not do: write outside of its folder, start processes, unpickle, run on, take much memory."""

from __future__ import annotations

import getpass
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ddf_convert
from fuzzing.corrupt import ESCAPED

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


class Sandbox:
    """Notes violations, by Python's audit events. What is noted still happens: this protects nothing."""

    def __init__(self) -> None:
        self.violations: list[str] = []
        self._caches = tuple(str(folder.resolve()) for folder in _cache_folders())
        self._allowed: tuple[str, ...] | None = None
        sys.addaudithook(self._note)

    @contextmanager
    def watching(self, writable: Path, seconds: float, memory: int = 2**32) -> Iterator[list[str]]:
        """Watches its body and yields the violations.

        Args:
            writable: The one folder that may be written to.
            seconds: Of processor time; of the clock, ten times as many.
            memory: Bytes that may be added to those of the process (on Linux).

        Raises:
            TooLongError: In the body, when the time is over.
        """
        self.violations = []
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
            yield self.violations
        finally:
            for timer, *_ in _TIMERS:
                signal.setitimer(timer, 0)
            self._allowed = None
            resource.setrlimit(resource.RLIMIT_AS, limits)
            grown = _memory("VmHWM") - before
            if grown > memory:
                self.violations.append(f"took {grown / 2**20:.0f} MiB")

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._allowed is None:
            return
        if event in _FORBIDDEN or (event == _UNPICKLING and not str(arguments[0]).startswith(_CACHE_MODULES)):
            self.violations.append(f"{event} {arguments!r:.200}")
        paths: tuple[Any, ...] = ()
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3)
            paths = (path,) if writes or ESCAPED in str(path) else ()
        elif event in _WRITING:
            paths = tuple(arguments[place] for place in _WRITING[event])
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike) and not self._may_write(os.fsdecode(path)):
                self.violations.append(f"{event} {os.fsdecode(path)}")

    def _may_write(self, path: str) -> bool:
        assert self._allowed is not None
        full = os.path.realpath(path)
        return any(full == root.rstrip("/") or full.startswith(root.rstrip("/") + "/") for root in self._allowed)


class TooLongError(BaseException):
    """A case that does not end; no ``except Exception`` may take it for an error of its own."""


def _too_long(number: int, frame: Any) -> None:
    raise TooLongError


def _cache_folders() -> tuple[Path, ...]:
    """Returns where the package and its libraries may keep what they compiled."""
    package = Path(ddf_convert.__file__).parent  # Numba tries whether it could keep kernels beside their sources
    home = (Path.home() / name for name in (".cache", ".numba", ".config", ".nv", ".triton"))
    compiler = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return (*home, compiler, *(package / part / "__pycache__" for part in ("cpu", "cuda")))


def _memory(which: str) -> int:
    """Returns bytes from Linux's record of this process; 0 elsewhere."""
    with suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) * 1024
    return 0
