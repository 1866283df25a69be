"""What the CPU kernels promise beside their results: threads, forks, memory, the cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddf_convert import cpu, ops, reference
from ddf_convert.cpu import threads


def example(channels: int = 256, side: int = 28, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, channels, side, side), (2, channels, 3, 3), (2, 9, side, side))
    first, second, third = (torch.randn(shape, generator=draw) for shape in shapes)
    return first, second, third


def expected(made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return reference.forward(*made, 1, 1, 1, "mul")


@pytest.fixture
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_follows_torch_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []

    def count(size: int) -> ThreadPoolExecutor:
        parts.append(size + 1)
        return pool(size)

    pool = threads._threads
    monkeypatch.setattr(threads, "_threads", count)
    made = example()
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        torch.testing.assert_close(ops.ddf(*made, padding=1), expected(made))
    assert parts == [2, 3]  # one thread needs no pool
    tiny = example(channels=2, side=4)
    ops.ddf(*tiny, padding=1)
    assert parts == [2, 3]  # nor does little work


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_results_repeat_on_any_number_of_threads(layout: torch.memory_format) -> None:
    input, channel, spatial = example()
    made = (input.to(memory_format=layout), channel, spatial.to(memory_format=layout))
    results = []
    for number in (1, 2, 2, 5):
        torch.set_num_threads(number)
        output = ops.ddf(*made, padding=1)
        results.append((output, *torch.ops.ddf_convert.ddf_backward(output, *made, 1, 1, 1, "mul", [True] * 3)))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("two_threads")
def test_eight_threads_at_once() -> None:
    cases = [example(seed=seed) for seed in range(8)]

    def work(case: tuple[Tensor, Tensor, Tensor]) -> bool:
        made = [tensor.clone().requires_grad_() for tensor in case]
        for _ in range(20):
            output = ops.ddf(*made, padding=1)
            gradients = torch.autograd.grad(output, made, output.detach())
        wanted = reference.backward(output.detach(), *case, 1, 1, 1, "mul", (True,) * 3)
        return torch.allclose(output, expected(case), atol=1e-4) and all(
            torch.allclose(ours, theirs, atol=1e-3, rtol=1e-4)
            for ours, theirs in zip(gradients, wanted, strict=True)
            if theirs is not None
        )

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, cases)) == [True] * 8


class Filtered(Dataset[Tensor]):
    """Calls the operator in the worker."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)  # DataLoader sets 1; the pool of a forked process must work too
        return ops.ddf(*example(seed=index), padding=1)


@pytest.mark.usefixtures("two_threads")
def test_forked_data_loader_workers() -> None:
    ops.ddf(*example(), padding=1)  # the parent has a pool, whose threads its forks do not have
    loader = DataLoader(Filtered(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=120)
    for index, output in enumerate(loader):
        torch.testing.assert_close(output, expected(example(seed=index)))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_stores_no_windows(layout: str) -> None:
    """The unfolded input of this example has 9 * 32 MiB; forward and backward may take a fraction of that."""
    code = f"""
        import torch
        from ddf_convert import ops

        def example(side):
            made = [torch.ones(1, 128, side, side), torch.ones(1, 128, 3, 3), torch.ones(1, 9, side, side)]
            made = [made[0].to(memory_format=torch.{layout}), made[1], made[2].to(memory_format=torch.{layout})]
            return [tensor.requires_grad_() for tensor in made]

        def memory(name):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) // 1024

        ops.ddf(*example(8), padding=1).sum().backward()
        made = example(256)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before = memory("VmRSS")
        output = ops.ddf(*made, padding=1)
        forward = memory("VmHWM") - before
        output.backward(torch.ones_like(output))
        print(forward, memory("VmHWM") - before)
    """
    result = python(code)
    assert result.returncode == 0, result.stderr
    forward, both = map(int, result.stdout.split())
    assert 32 <= forward < 48  # the output, and scratch
    assert both < 160  # the output, its gradient, the input's and the filters' gradients, and scratch


@pytest.mark.long
def test_cache_follows_all_sources_and_survives_damage(tmp_path: Path) -> None:
    code = """
        import torch
        from ddf_convert import cpu, ops, reference
        shapes = (1, 4, 5, 5), (1, 4, 3, 3), (1, 9, 5, 5)
        made = [torch.randn(shape).half() for shape in shapes]  # the kernels for halves compile fastest
        wanted = reference.forward(*(tensor.float() for tensor in made), 1, 1, 1, "mul").half()
        output = ops.ddf(*(tensor.to(memory_format=torch.channels_last) for tensor in made), padding=1)
        torch.testing.assert_close(output, wanted)
        kernel = cpu.channels_last.forward
        print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
    """

    def run() -> tuple[str, str]:
        result = python(code, NUMBA_CACHE_DIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        return result.stdout.strip(), result.stderr

    assert run()[0] == "0 1"
    assert run()[0] == "1 0"
    kept = sorted(tmp_path.rglob("*forward*.nb*"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:40])
    hits, complaint = run()
    assert hits.startswith("0")
    assert "the kept compiled kernels cannot be used; delete" in complaint
    assert str(tmp_path) in complaint


def test_cache_key_holds_every_source_file() -> None:
    """Numba looks at the kernel's own file alone; a change in a file that it calls must count as well."""
    from ddf_convert.cpu.compile import _hash_sources, _KernelCache

    cache = cpu.contiguous.forward._cache
    assert isinstance(cache, _KernelCache)
    assert _hash_sources() in cache._index_key((), cpu.contiguous.forward.targetctx.codegen())


def test_works_without_a_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code = """
        import torch
        from numba.core.caching import CacheImpl
        CacheImpl._locator_classes = []  # none of the places that Numba tries can be written to
        from ddf_convert import ops
        made = [torch.ones(1, count, 3, 3, dtype=torch.half) for count in (2, 2, 9)]  # for halves it compiles fastest
        print(ops.ddf(made[0].to(memory_format=torch.channels_last), *made[1:], padding=1)[0, 0, 1, 1])
    """
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "tensor(9., dtype=torch.float16)" in result.stdout
    assert "set NUMBA_CACHE_DIR" in result.stderr
