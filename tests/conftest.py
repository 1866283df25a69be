"""Shared by all tests."""

import os

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    # The workers of pytest-xdist share the cores: together they use each once. Processes that tests start use as many
    # threads as the tests do: torch's sums, and so their last bits, depend on it.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    without_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(without_gpu)
