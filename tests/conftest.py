"""Shared by all tests."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist share the cores: together they use each once. Processes that tests start use as many
    # threads as the tests do: torch's sums, and so their last bits, depend on it.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Compilers make millions of objects that live on: to look at those again and again is a tenth of their time.
    gc.set_threshold(50_000)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Compiles the CPU kernels, if that is still to be done, before workers of pytest-xdist do it, each for itself."""
    if getattr(session.config.option, "numprocesses", None) and not session.config.option.collectonly:
        with ProcessPoolExecutor(2) as pool:
            for layout in (torch.contiguous_format, torch.channels_last):
                pool.submit(_compile_cpu_kernels, layout)  # of what goes wrong here the tests will tell


def _compile_cpu_kernels(layout: torch.memory_format) -> None:
    from ddf_convert import ops

    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        shapes = (1, 4, 5, 5), (1, 4, 3, 3), (1, 9, 5, 5)
        made = [torch.ones(shape, dtype=dtype).to(memory_format=layout).requires_grad_() for shape in shapes]
        ops.ddf(*made, padding=1).sum().backward()


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes are timed for a moment only: for tests that ask whether they are, and not how long they take."""
    from ddf_convert.cost import timing

    timed = timing.median_ms

    def briefly(call: Callable[[], object], device: torch.device, seconds: float, **options: Any) -> float:
        return timed(call, device, min(seconds, 1e-3), **options)

    monkeypatch.setattr(timing, "median_ms", briefly)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(without_gpu)
