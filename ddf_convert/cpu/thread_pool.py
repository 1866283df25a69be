"""Runs kernels on as many threads as PyTorch uses.

Numba's own parallel loops cannot be entered from two Python threads at once, nor after a fork. Kernels here release the
GIL instead, and plain Python threads call them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ddf_convert.cpu.jit_cache import prepare

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_lock = threading.Lock()


# A chunk of fewer multiply-accumulates (about 100 microseconds) is not worth another thread.
_LEAST_WORK = 1_000_000
_CHUNKS_PER_THREAD = 4


def run(kernel: Callable[..., None], items: int, work: int, *arguments: object) -> None:
    """Calls ``kernel(first, last, *arguments)``, which releases the GIL, on chunks of range(items) in several threads.

    The calling thread starts at once, and the others take the chunks that are left when they have woken up. Waking up
    can last as long as a small call, which is then done without them. ``work`` is the number of multiply-accumulates;
    little work stays on the calling thread.
    """
    prepare(kernel, arguments)
    threads = torch.get_num_threads()
    count = max(1, min(items, threads * _CHUNKS_PER_THREAD, work // _LEAST_WORK))
    if threads == 1 or count == 1:
        kernel(0, items, *arguments)
        return
    chunks = deque(itertools.pairwise(items * chunk // count for chunk in range(count + 1)))

    def work_off() -> None:
        with contextlib.suppress(IndexError):
            while True:
                kernel(*chunks.popleft(), *arguments)

    helpers = min(threads, count) - 1
    pool = _threads(helpers)
    futures = [pool.submit(work_off) for _ in range(helpers)]
    try:
        work_off()
    finally:
        # Also after an interrupt: no helper may write once the caller may free the tensors.
        chunks.clear()
        for future in futures:
            if not future.cancel():
                future.result()


def _threads(count: int) -> ThreadPoolExecutor:
    """Returns a pool of at least ``count`` threads, which all callers share."""
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < count:
            # A smaller pool that another thread still uses finishes its work and ends.
            _pool, _pool_size = ThreadPoolExecutor(count, thread_name_prefix="ddf_convert"), count
        return _pool


def _reset() -> None:
    """Resets the pool of a forked process, which has none of its parent's threads and may have a lock they held."""
    global _pool, _pool_size, _lock
    _pool, _pool_size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset)
