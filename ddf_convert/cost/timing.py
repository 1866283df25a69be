"""Timing of calls: the device's time as a median over many calls, and the host's time for launching one.

On a GPU, short calls would wait for the host that launches them, and find their inputs in the L2 cache, as layers of a
network do not. So calls are queued behind a kernel that only waits, and cycle through copies of their inputs that
exceed the cache.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.errors import DDFError
from ddf_convert.utils.fake_copy import real_copy

_CYCLES_PER_SECOND = 2e9  # no less than a GPU's clock: a slower one waits longer, which does no harm
_CACHES = 4  # size of the copies, in L2 caches
_MAX_COPIES = 1024
_WARM_UPS = 3
_MIN_BATCHES = 5
_BATCH_SECONDS = 2e-3
_QUEUE_SECONDS = 3e-3  # host time: the queue of a stream holds about a thousand launches
_MAX_CALLS = 200
_MIN_CALLS_IN_A_ROW = 3  # where a program's pace is wanted: its host prepares the next call during this one


def copies_needed(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Returns how many copies of a call's inputs exceed a GPU's L2 cache well; 1 on the CPU."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(1, min(_MAX_COPIES, math.ceil(_CACHES * cache / size)))


def in_turn(function: Callable[..., object], arguments: Sequence[Sequence[object]]) -> Callable[[], object]:
    """Returns a call without arguments that cycles through these.

    Results are kept for one round: freed at once, they would all be in the same memory, and stay in the cache.
    """
    turns = itertools.cycle(arguments)
    results: deque[object] = deque(maxlen=len(arguments) if len(arguments) > 1 else 0)

    def call() -> object:
        result = function(*next(turns))
        results.append(result)
        return result

    return call


def median_ms(call: Callable[[], object], device: torch.device, seconds: float, hide_host: bool = True) -> float:
    """Returns the median time of a call on its device, in milliseconds.

    Args:
        call: What to time; on a GPU it queues work on the current stream.
        device: Where it runs.
        seconds: How long to measure, at least.
        hide_host: On a GPU, let the host get ahead first. Without it, the time is what a program sees.
    """
    if device.type != "cuda":
        from torch.utils.benchmark import Timer  # looks for compilers when it is imported

        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=seconds).median) * 1e3
    with torch.cuda.device(device):
        return _median_cuda_ms(call, seconds, hide_host)


def host_us(call: Callable[[], object], device: torch.device, seconds: float, calls: int = 5) -> float | None:
    """Returns the host's median time for launching a call, in microseconds; None on the CPU, which has no queue.

    Args:
        call: What to time.
        device: Where it runs.
        seconds: How long to measure, at least.
        calls: How many are queued at a time. Together they must launch fewer than about a thousand kernels, or the
            host waits for the queue.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        for _ in range(_WARM_UPS):
            call()
        return statistics.median(_repeated(lambda: _host_seconds(call, calls), seconds)) * 1e6


def _median_cuda_ms(call: Callable[[], object], seconds: float, hide_host: bool) -> float:
    for _ in range(_WARM_UPS):
        call()
    host = min(_host_seconds(call, 2) for _ in range(3)) if hide_host else 0.0
    estimate = _batch_ms(call, 2, host)
    calls = min(_BATCH_SECONDS * 1e3 / max(estimate, 1e-4), _QUEUE_SECONDS / host if host else _MAX_CALLS, _MAX_CALLS)
    calls = max(1 if hide_host else _MIN_CALLS_IN_A_ROW, int(calls))
    return statistics.median(_repeated(lambda: _batch_ms(call, calls, host), seconds))


def _repeated(measure: Callable[[], float], seconds: float) -> list[float]:
    """As many measurements as fit the time, and a few at least."""
    measured: list[float] = []
    end = time.perf_counter() + seconds
    while len(measured) < _MIN_BATCHES or time.perf_counter() < end:
        measured.append(measure())
    return measured


def _host_seconds(call: Callable[[], object], calls: int) -> float:
    """The host's time for one call, when nothing is queued before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _batch_ms(call: Callable[[], object], calls: int, host: float) -> float:
    """The GPU's time for one of so many calls in a row, each of which takes the host ``host`` seconds to launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if host:
        torch.cuda._sleep(int((1.5 * calls * host + 50e-6) * _CYCLES_PER_SECOND))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / calls


def forward_ms(module: nn.Module, *inputs: Any, seconds: float = 0.2, kwargs: dict[str, Any] | None = None) -> float:
    """Returns the median time of one forward pass in evaluation mode, in milliseconds, as a program sees it.

    A copy runs, with the module's own weights, device, dtype and layout, without gradients and autocast. The first
    pass, in which kernels may be compiled, is not timed.

    Args:
        module: Any module; one on the meta device runs on the CPU, with random weights.
        *inputs: Positional arguments of its forward; tensors are moved to its device.
        seconds: How long to measure, at least.
        kwargs: Keyword arguments of its forward, which are moved too.

    Raises:
        UsageError: The module cannot be copied.
        DDFError: Its forward pass fails.
    """
    copied = real_copy(module, inputs, kwargs)
    device = device_of(copied.module)
    with copied.running(), torch.inference_mode():
        try:
            copied.run()
        except Exception as error:  # the user's code: anything can come out of it
            raise DDFError(f"{type(module).__name__} does not run on {device}: {error}") from error
        return median_ms(copied.run, device, seconds, hide_host=False)


def device_of(module: nn.Module) -> torch.device:
    """Returns the device of a module's first parameter or buffer; the CPU if it has none."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
