"""How long a call takes: the device's time as a median over many calls, and what a call costs the host.

On a GPU, short calls would wait for the host that launches them, and would find their inputs in the L2 cache, which
the layers of a network do not. So calls are queued behind a kernel that only waits, until the host is ahead, and they
go through copies of their inputs that together exceed the cache.
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
_CACHES = 4  # the copies' size, in L2 caches
_MOST_COPIES = 1024
_WARM_UPS = 3
_FEWEST_BATCHES = 5
_BATCH_SECONDS = 2e-3
_QUEUE_SECONDS = 3e-3  # of host time: the queue of a stream holds about a thousand launches
_MOST_CALLS = 200
_CALLS_IN_A_ROW = 3  # at least, where a program's pace is wanted: its host prepares the next call during this one


def copies_needed(tensors: Iterable[Tensor], device: torch.device) -> int:
    """How many copies of a call's inputs exceed a GPU's L2 cache well; 1 on the CPU, which is timed as it is."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(1, min(_MOST_COPIES, math.ceil(_CACHES * cache / size)))


def in_turn(function: Callable[..., object], arguments: Sequence[Sequence[object]]) -> Callable[[], object]:
    """A call without arguments that goes through these, one after another.

    Results are kept for one round: freed at once, they would all lie in the same place, and stay in the cache.
    """
    turns = itertools.cycle(arguments)
    results: deque[object] = deque(maxlen=len(arguments) if len(arguments) > 1 else 0)

    def call() -> object:
        result = function(*next(turns))
        results.append(result)
        return result

    return call


def median_ms(call: Callable[[], object], device: torch.device, seconds: float, hide_host: bool = True) -> float:
    """The median time of a call on its device, in milliseconds.

    Args:
        call: What to time; on a GPU it queues work on the current stream.
        device: Where it runs.
        seconds: To spend on measuring, at least.
        hide_host: On a GPU, let the host get ahead first. Without it a call takes what a program sees.
    """
    if device.type != "cuda":
        from torch.utils.benchmark import Timer  # looks for compilers when it is imported

        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=seconds).median) * 1e3
    with torch.cuda.device(device):
        return _median_cuda_ms(call, seconds, hide_host)


def host_us(call: Callable[[], object], device: torch.device, seconds: float, calls: int = 5) -> float | None:
    """What a call costs the host, in microseconds, as a median; None on the CPU, where it is not apart from the work.

    Args:
        call: What to time.
        device: Where it runs.
        seconds: To spend on measuring, at least.
        calls: How many are queued at a time: together they must launch fewer than a thousand kernels or so, or the
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
    calls = min(_BATCH_SECONDS * 1e3 / max(estimate, 1e-4), _QUEUE_SECONDS / host if host else _MOST_CALLS, _MOST_CALLS)
    calls = max(1 if hide_host else _CALLS_IN_A_ROW, int(calls))
    return statistics.median(_repeated(lambda: _batch_ms(call, calls, host), seconds))


def _repeated(measure: Callable[[], float], seconds: float) -> list[float]:
    """As many measurements as fit the time, and a few at least."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < _FEWEST_BATCHES or time.perf_counter() < end:
        found.append(measure())
    return found


def _host_seconds(call: Callable[[], object], calls: int) -> float:
    """Of one call, when nothing is queued before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _batch_ms(call: Callable[[], object], calls: int, host: float) -> float:
    """The GPU's time of one call, of so many in a row, whose launches cost the host ``host`` seconds each."""
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
    """The median time of one forward pass in evaluation mode, in milliseconds, as a program sees it.

    It runs where the module's tensors are, in their dtype and layout, without gradients and autocast. A copy is what
    runs, with the module's own weights: nothing in the module changes, and no random state does. The first pass, in
    which kernels may be compiled, belongs to no figure.

    Args:
        module: Any module; one on the meta device runs on the CPU, with random weights.
        *inputs: Positional arguments of its forward; tensors are brought to where it runs.
        seconds: To spend on measuring, at least.
        kwargs: Keyword arguments of its forward, likewise.

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
    """Where a module runs: at its first parameter or buffer; on the CPU if it has none."""
    tensors = (tensor for found in (module.parameters(), module.buffers()) for tensor in found)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
