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


# Under this many multiply-accumulates (about 100 microseconds of them) a chunk is not worth handing out.
_LEAST_WORK = 1_000_000
_CHUNKS_PER_THREAD = 4


def run(kernel: Callable[..., None], items: int, work: int, *arguments: object) -> None:
    """Calls ``kernel(first, last, *arguments)`` on chunks of range(items), on several threads.

    The calling thread starts at once, and the others take what is left when they have woken up. Waking up can last as
    long as a small call, which is then done without them.

    Args:
        kernel: Writes its items' results; releases the GIL.
        items: How many independent items there are.
        work: Multiply-accumulates in all; little work stays on the calling thread.
        *arguments: For the kernel.
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
        # Also when interrupted: no helper may write once the caller has given the tensors up.
        chunks.clear()
        for future in futures:
            if not future.cancel():
                future.result()


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
