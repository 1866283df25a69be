"""Memory: the peak of a call, and what glibc does with memory that is freed."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Parameters of glibc's mallopt, and what it uses when nobody asks.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_USUAL_TRIM_THRESHOLD, _USUAL_MMAP_MAX = 128 * 1024, 65536


@contextlib.contextmanager
def kept_when_freed() -> Iterator[None]:
    """Freed memory stays with glibc instead of going back to the system.

    Given back, a large output costs a page fault for every 4 KiB of the next one: most of the time of a column at
    112x112, or none of it, as chance has it. Training under jemalloc or tcmalloc sees the same as here. Nothing
    happens where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, _USUAL_MMAP_MAX)
        mallopt(_TRIM_THRESHOLD, _USUAL_TRIM_THRESHOLD)


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call adds at its peak to what was there before; None where that cannot be seen.

    On a GPU it is what torch's allocator gave out; on the CPU, of Linux only, what the process holds.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what is free goes back, or the call would take it and seem to need nothing
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:  # some containers forbid it
        return None
    held = _kib("VmRSS")
    call()
    return (_kib("VmHWM") - held) / 1024


def _kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
