"""Shared by all tests."""

import os
from collections.abc import Callable
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


@pytest.fixture
def quick_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes are timed for a moment only: for tests that ask whether they are, and not how long they take."""
    from ddf_convert import latency

    timed = latency.median_ms

    def briefly(call: Callable[[], object], device: torch.device, seconds: float, **options: Any) -> float:
        return timed(call, device, min(seconds, 1e-3), **options)

    monkeypatch.setattr(latency, "median_ms", briefly)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(without_gpu)
