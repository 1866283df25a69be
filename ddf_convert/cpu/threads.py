"""Runs kernels on as many threads as PyTorch uses.

Numba's own parallel loops cannot be entered from two Python threads at once, nor after a fork. Kernels here release the
GIL instead, and plain Python threads call them.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ddf_convert.cpu.compile import prepare

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


def run(kernel: Callable[..., None], items: int, work: int, *arguments: object) -> None:
    """Calls ``kernel(first, last, *arguments)`` on parts of range(items), one part a thread.

    Args:
        kernel: Writes its items' results; releases the GIL.
        items: How many independent items there are.
        work: Multiply-accumulates in all; little work stays on the calling thread.
        *arguments: For the kernel.
    """
    prepare(kernel, arguments)
    parts = max(1, min(torch.get_num_threads(), items, work // _LEAST_WORK))
    bounds = [items * part // parts for part in range(parts + 1)]
    if parts > 1:
        pool = _threads(parts - 1)
        rest = [pool.submit(kernel, first, last, *arguments) for first, last in itertools.pairwise(bounds[1:])]
        kernel(bounds[0], bounds[1], *arguments)
        for future in rest:
            future.result()
    else:
        kernel(0, items, *arguments)


# Waking a thread costs about as much as this many multiply-accumulates.
_LEAST_WORK = 200_000


def _threads(count: int) -> ThreadPoolExecutor:
    """A pool of at least ``count`` threads. Callers share it: their parts queue, and none waits for another's."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            # The smaller pool, if another thread still uses it, finishes its work and ends.
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="ddf_convert"), count
        return _pool


def _forget() -> None:
    """A forked process has none of its parent's threads, and perhaps a lock that one of them held."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
