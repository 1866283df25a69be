"""The same bits every time: repeated, beside a busy stream, in threads, in a CUDA graph, compiled, on another GPU."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddf_convert import ops
from ddf_convert.bench.measure import DTYPES, LAYOUTS
from gpu.run import Run, check, skip

REPEATS = 20
DRY_DTYPES = ("float32", "bfloat16")
SHAPES = ((4, 64, 30, 34), (8, 256, 56, 56))  # one tile of the channel filter's gradient, and many


def determinism(run: Run, record: dict[str, Any]) -> None:
    """Runs all checks."""
    dtypes = DRY_DTYPES if run.dry else tuple(DTYPES)
    for shape in SHAPES[:1] if run.dry else SHAPES:
        for dtype, layout in itertools.product(dtypes, LAYOUTS):
            run.need(5, f"repeats from {shape}, {dtype}, {layout} on")
            _repeats(run, record, shape, dtype, layout)
    if not run.without_gpu(record, "repeats beside a busy stream"):
        _busy(run, record)
    run.save()
    run.need(10, "threads, streams, CUDA graph, torch.compile, second GPU")
    _threads(run, record)
    for what, function in (
        ("two streams", _streams),
        ("CUDA graph", _graph),
        ("a second GPU", _second_gpu),
    ):
        if not run.without_gpu(record, what):
            function(run, record)
    run.save()
    run.need(30, "torch.compile")
    _compiled(run, record)


def make_tensors(device: torch.device, shape: Sequence[int], dtype: str, layout: str, seed: int = 0) -> list[Tensor]:
    """Returns input, channel filter and spatial filter; equal for equal seeds, on any device."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    shapes = ((batch, channels, height, width), (batch, channels, 3, 3), (batch, 9, height, width))
    tensors = [torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for shape in shapes]
    for place in (0, 2):
        tensors[place] = tensors[place].contiguous(memory_format=LAYOUTS[layout])
    return [tensor.requires_grad_() for tensor in tensors]


def results(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the output and the three gradients."""
    output = ops.ddf(*tensors, padding=1)
    return [output.detach(), *torch.autograd.grad(output, tensors, output.detach())]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    """Returns whether all tensors are equal, bit for bit."""
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """Returns a stream that starts after the current one's work."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _repeats(run: Run, record: dict[str, Any], shape: Sequence[int], dtype: str, layout: str) -> None:
    tensors = make_tensors(run.device, shape, dtype, layout)
    first = results(tensors)
    words = f"{REPEATS} repeats, {'x'.join(map(str, shape))}, {dtype}, {layout}"
    check(record, words, all(equal(first, results(tensors)) for _ in range(REPEATS)))


def _busy(run: Run, record: dict[str, Any]) -> None:
    """Repeats beside matrix products on another stream, which change the order of the operator's blocks."""
    sets = [make_tensors(run.device, SHAPES[1], dtype, layout) for dtype, layout in itertools.product(DTYPES, LAYOUTS)]
    expected = [results(tensors) for tensors in sets]
    factor = torch.randn(2048, 2048, device=run.device)
    busy = new_stream(run.device)
    right = True
    for _ in range(REPEATS):
        with torch.cuda.stream(busy):
            for _ in range(4):
                factor = (factor @ factor).clamp_(-1, 1)
        right = all(equal(one, results(tensors)) for one, tensors in zip(expected, sets, strict=True)) and right
    torch.cuda.current_stream(run.device).wait_stream(busy)
    check(record, f"{REPEATS} repeats beside a busy stream, every dtype and layout", right)


def _threads(run: Run, record: dict[str, Any], count: int = 4) -> None:
    """Calls from several threads, each with its own tensors and, on a GPU, its own stream."""
    sets = [make_tensors(run.device, (2, 32, 14 + seed, 18), "float32", "contiguous", seed) for seed in range(count)]
    expected = [results(tensors) for tensors in sets]
    right = [False] * count

    def work(place: int) -> None:
        with torch.cuda.stream(None if run.dry else new_stream(run.device)):  # None changes nothing
            right[place] = all(equal(expected[place], results(sets[place])) for _ in range(10))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(record, f"{count} threads at once", all(right))


def _streams(run: Run, record: dict[str, Any]) -> None:
    sets = [make_tensors(run.device, (4, 64, 30 + seed, 34), "bfloat16", "channels_last", seed) for seed in range(2)]
    expected = [results(tensors) for tensors in sets]
    streams = [new_stream(run.device) for _ in sets]
    found: list[list[list[Tensor]]] = [[], []]
    for _ in range(REPEATS):
        for place, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[place].append(results(sets[place]))
    torch.cuda.synchronize(run.device)
    right = all(equal(expected[place], one) for place in range(2) for one in found[place])
    check(record, "two streams at once", right)


def _graph(run: Run, record: dict[str, Any]) -> None:
    """Captures a graph, and compares its replays on other contents with eager calls."""
    for dtype, layout in (("float32", "contiguous"), ("bfloat16", "channels_last")):
        static = make_tensors(run.device, (4, 64, 30, 34), dtype, layout)
        side = new_stream(run.device)
        with torch.cuda.stream(side):
            results(static)  # what is compiled at first use cannot be captured
        torch.cuda.current_stream(run.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(static)
        right = True
        for seed in (1, 2):
            fresh = make_tensors(run.device, (4, 64, 30, 34), dtype, layout, seed)
            with torch.no_grad():
                for target, source in zip(static, fresh, strict=True):
                    target.copy_(source)
            graph.replay()
            right = equal(results(fresh), captured) and right
        check(record, f"CUDA graph, {dtype}, {layout}", right)


def _second_gpu(run: Run, record: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        skip(record, "a second GPU", "there is one")
        return
    other = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    here, there = (
        results(make_tensors(device, (4, 64, 30, 34), "float32", "contiguous")) for device in (run.device, other)
    )
    same_place = all(tensor.device == other for tensor in there)
    close = all(
        torch.allclose(one.cpu(), two.cpu(), rtol=1e-4, atol=1e-4) for one, two in zip(here, there, strict=True)
    )
    check(record, "a second GPU, while the first is the current one", same_place and close)


def _compiled(run: Run, record: dict[str, Any]) -> None:
    """Compares one compiled graph with eager calls. On the CPU without inductor, which would need a C++ compiler."""

    def function(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return ops.ddf(input * 2, channel, spatial, padding=1).relu()

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if run.dry else "inductor")
    tensors = make_tensors(run.device, (2, 32, 14, 18), "float32", "contiguous")
    outcomes = []
    for version in (function, compiled):
        output = version(*tensors)
        outcomes.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    close = all(torch.allclose(one, other, rtol=1e-4, atol=1e-3) for one, other in zip(*outcomes, strict=True))
    check(record, "torch.compile(fullgraph=True), forward and backward", close)
