"""What benchmarks measure with: times, memory, bandwidth, precision."""

from __future__ import annotations

import importlib
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddf_convert.bench import measure
from ddf_convert.cost import timing

CPU = torch.device("cpu")


class Clock:
    """Stands in for torch.cuda: a call costs the host some time, and the GPU, which works behind it, some other."""

    def __init__(self, host: float, gpu: float) -> None:
        self.host, self.gpu = host, gpu
        self.now = self.queue_ends = 0.0  # seconds

    def launch(self) -> None:
        self.now += self.host
        self.queue_ends = max(self.queue_ends, self.now) + self.gpu

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.queue_ends = max(clock.queue_ends, clock.now)

            def synchronize(self) -> None:
                clock.now = max(clock.now, self.at)

            def elapsed_time(self, other: Any) -> float:
                return (other.at - self.at) * 1e3

        def sleep(cycles: int) -> None:
            clock.queue_ends = max(clock.queue_ends, clock.now) + cycles / 2e9

        def synchronize(device: object = None) -> None:
            clock.now = max(clock.now, clock.queue_ends)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "device", lambda device: measure.contextlib.nullcontext())
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))


@pytest.mark.parametrize(("host", "gpu"), [(20e-6, 3e-6), (20e-6, 5e-3), (2e-3, 1e-3)])
def test_the_hosts_time_is_hidden_on_a_gpu(monkeypatch, host, gpu):
    clock = Clock(host, gpu)
    clock.install(monkeypatch)
    where = torch.device("cuda", 0)
    assert timing.median_ms(clock.launch, where, 0.1) == pytest.approx(gpu * 1e3)
    assert timing.host_us(clock.launch, where, 0.1) == pytest.approx(host * 1e6)
    seen = timing.median_ms(clock.launch, where, 0.1, hide_host=False)
    assert max(host, gpu) * 1e3 <= seen * 1.0001
    assert seen <= (host + gpu) * 1e3


def test_inputs_are_used_in_turn_and_exceed_the_cache(monkeypatch):
    tensor = torch.empty(1000)  # 4000 bytes
    assert timing.copies_needed([tensor], CPU) == 1
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=10_000))
    copies = timing.copies_needed([tensor], torch.device("cuda", 0))
    assert copies * 4000 >= 4 * 10_000
    seen: list[int] = []
    call = timing.in_turn(seen.append, [(number,) for number in range(3)])
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_medians_on_the_cpu():
    assert timing.median_ms(lambda: time.sleep(0.003), CPU, 0.03) == pytest.approx(3, rel=0.5)
    assert timing.host_us(lambda: None, CPU, 0.1) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts the pages")
def test_peak_memory_of_a_call():
    with measure.keep_freed_memory():
        torch.ones(2**24).sum()  # what it frees is there to be taken, and must not hide the need of the next
        assert measure.peak_mib(lambda: torch.ones(2**24).sum(), CPU) == pytest.approx(64, rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept():
    resource = importlib.import_module("resource")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(6):
            torch.ones(2**24)
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt) - before

    pages = 2**26 // 4096
    with measure.keep_freed_memory():
        faults()
        assert faults() < 6 * pages / 2  # the heap may find it another place once or twice
    assert measure.peak_mib(lambda: None, CPU) == pytest.approx(0, abs=8)


def test_bytes_that_must_be_moved():
    """Counted tensor by tensor, at stride 2."""
    input, channel, spatial = torch.empty(2, 8, 10, 12), torch.empty(2, 8, 3, 3), torch.empty(2, 9, 5, 6)
    output = torch.empty(2, 8, 5, 6)
    maps, filters, outputs = 4 * 2 * 8 * 120, 4 * (2 * 8 * 9 + 2 * 9 * 30), 4 * 2 * 8 * 30
    forward = maps + filters + outputs
    assert measure.forward_bytes(input, channel, spatial, output) == forward
    grad_input = outputs + filters + maps
    grad_filters = maps + outputs + 2 * filters
    both = measure.forward_backward_bytes(input, channel, spatial, output)
    assert both == forward + grad_input + grad_filters


def test_a_copys_bandwidth(monkeypatch):
    monkeypatch.setattr(measure, "median_ms", lambda call, device, seconds: 2.0)
    assert measure.copy_bandwidth(CPU, 0.01, size=4000) == 8000 / 2e-3


def test_precision_is_restored():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def state() -> tuple[bool, bool, bool]:
        return cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    before = state()
    with measure.convolution_settings(tf32=not before[2]):
        assert state() == (True, not before[2], not before[2])
    assert state() == before
