"""What the CPU kernels promise beside their results: threads, forks, memory, the cache on disk."""

from __future__ import annotations

import errno
import logging
import os
import random
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numba import config
from numba.core import caching
from support.processes import python
from support.tolerances import near
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddf_convert import ops, reference
from ddf_convert.cpu import kernels_nchw, kernels_nhwc, thread_pool
from ddf_convert.utils import logging as notices


def example(channels: int = 256, side: int = 28, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((2, channels, side, side), (2, channels, 3, 3), (2, 9, side, side))
    first, second, third = (torch.randn(shape, generator=draw) for shape in shapes)
    return first, second, third


def expected(made: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return reference.forward(*made, reference.Geometry(padding=1))


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

    pool = thread_pool._threads
    monkeypatch.setattr(thread_pool, "_threads", count)
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
        results.append((output, *torch.ops.ddf_convert.ddf_backward(output, *made, [True] * 3, 1, 1, 1, "mul")))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_eight_threads_at_once() -> None:
    cases = [example(seed=seed) for seed in range(8)]

    def work(case: tuple[Tensor, Tensor, Tensor]) -> bool:
        made = [tensor.clone().requires_grad_() for tensor in case]
        for _ in range(20):
            output = ops.ddf(*made, padding=1)
            gradients = torch.autograd.grad(output, made, output.detach())
        wanted = reference.backward(output.detach(), *case, reference.Geometry(padding=1), (True,) * 3)
        return torch.allclose(output, expected(case), **near(torch.float32, output)) and all(
            torch.allclose(ours, theirs, **near(torch.float32, theirs, terms=28 * 28))
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


@pytest.mark.slow
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
            file.write("5")  # resets the peak
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
        from ddf_convert import ops
        from ddf_convert import reference
        from ddf_convert.cpu import kernels_nhwc
        shapes = (1, 4, 5, 5), (1, 4, 3, 3), (1, 9, 5, 5)
        made = [torch.randn(shape).half() for shape in shapes]  # the kernels for halves compile fastest
        wanted = reference.forward(*(tensor.float() for tensor in made), reference.Geometry(padding=1)).half()
        output = ops.ddf(*(tensor.to(memory_format=torch.channels_last) for tensor in made), padding=1)
        torch.testing.assert_close(output, wanted)
        kernel = kernels_nhwc.forward
        print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
    """

    def run() -> tuple[str, str]:
        result = python(code, NUMBA_CACHE_DIR=str(tmp_path))
        assert result.returncode == 0, result.stderr
        return result.stdout.strip(), result.stderr

    assert run()[0] == "0 1"
    assert run()[0] == "1 0"
    for kind in ("nbi", "nbc"):
        for path in tmp_path.rglob(f"*forward*.{kind}"):
            path.write_bytes(path.read_bytes()[:40])
        assert run()[0] == "0 1"
        assert run()[0] == "1 0"  # made again, and kept


def test_cache_key_holds_every_source_file() -> None:
    """Numba looks at the kernel's own file alone; a change in a file that it calls must count as well."""
    from ddf_convert.cpu.jit_cache import _hash_sources, _KernelCache, cache_folder

    cache_folder(kernels_nchw.forward)
    cache = kernels_nchw.forward._cache
    assert isinstance(cache, _KernelCache)
    assert _hash_sources() in cache._index_key((), kernels_nchw.forward.targetctx.codegen())


# A small call, in a new process. It compiles the forward kernel for halves, which compiles fastest.
CALL = """
import torch
from ddf_convert import layers, ops
from ddf_convert.cpu import dispatch as cpu
from ddf_convert.cpu import kernels_nchw, kernels_nhwc
made = [torch.ones(1, count, 3, 3, dtype=torch.half) for count in (2, 2, 9)]
made[0] = made[0].to(memory_format=torch.channels_last)
for _ in range(2):
    print(ops.ddf(*made, padding=1)[0, 0, 1, 1].item())
"""


@pytest.mark.slow
def test_works_without_a_folder_to_write_to() -> None:
    code = """
        from numba.core.caching import CacheImpl
        CacheImpl._locator_classes = []  # none of the places that Numba tries can be written to
        from ddf_convert.utils import logging as notices
        notices._TIMEOUT_S = 0.01
    """
    result = python(textwrap.dedent(code) + CALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["9.0", "9.0"]
    (line,) = result.stderr.splitlines()
    assert "no folder to keep compiled CPU kernels in" in line
    assert "set NUMBA_CACHE_DIR" in line


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": os.devnull},
        {"XDG_CACHE_HOME": os.devnull},
        {"HOME": ""},
        {"HOME": "nowhere"},
        {"NUMBA_CACHE_DIR": os.devnull, "HOME": os.devnull},
    ],
    ids=str,
)
def test_says_once_that_a_read_only_installation_without_a_home_keeps_nothing(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And makes no folder where the process happens to work."""
    from ddf_convert.cpu import jit_cache as compiler

    notices._warned.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "CACHE_DIR", environment.get("NUMBA_CACHE_DIR", ""))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(caching.InTreeCacheLocator, "from_function", classmethod(lambda *_: None))
    if environment == {"HOME": ""}:  # of a user whom the system does not know
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    kernels = [compiler.kernel(function.py_func) for function in (kernels_nchw.forward, kernels_nhwc.forward)]
    with caplog.at_level(logging.WARNING, "ddf_convert"):
        assert [compiler.cache_folder(kernel) for kernel in kernels] == [None, None]
    assert len(caplog.records) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel's cache in a folder of its own, and something that it can keep."""
    from ddf_convert.cpu import jit_cache as compiler

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    notices._warned.clear()
    cache = compiler._KernelCache(_plain)
    monkeypatch.setattr(cache._impl, "rebuild", lambda target, data: data)
    monkeypatch.setattr(cache._impl, "reduce", lambda data: data.content)
    monkeypatch.setattr(cache._impl, "check_cachable", lambda data: True)
    return cache


def _plain() -> None:
    """Stands for a kernel."""


TARGET = kernels_nchw.forward.targetctx
KEPT = SimpleNamespace(content=b"machine code" * 50, codegen=TARGET.codegen())


def test_every_damage_of_kept_kernels_is_found(empty_cache: Any, tmp_path: Path) -> None:
    empty_cache.save_overload("first", KEPT)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert [file.suffix for file in files] == [".nbc", ".nbi"]
    draw = random.Random(0)
    for file, whole in [(file, file.read_bytes()) for file in files]:
        damaged = [whole[: draw.randrange(len(whole))] for _ in range(20)]
        for _ in range(100):
            place, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
            damaged.append(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        for content in damaged:
            file.write_bytes(content)
            assert empty_cache.load_overload("first", TARGET) in (None, KEPT.content)
            empty_cache.save_overload("first", KEPT)
            assert empty_cache.load_overload("first", TARGET) == KEPT.content  # kept again


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_a_disk_that_refuses_is_asked_again(
    number: int, empty_cache: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: str) -> None:
        raise OSError(number, os.strerror(number))

    with caplog.at_level(logging.WARNING, "ddf_convert"):
        with monkeypatch.context() as patch:
            patch.setattr(empty_cache._cache_file, "_open_for_write", refuse)
            for name in ("first", "second"):
                empty_cache.save_overload(name, KEPT)
        with monkeypatch.context() as patch:
            patch.setattr(empty_cache._cache_file, "_load_index", lambda: refuse(""))
            assert empty_cache.load_overload("first", TARGET) is None
    (record,) = caplog.records
    assert f"({os.strerror(number)}); set NUMBA_CACHE_DIR" in record.message
    empty_cache.save_overload("first", KEPT)
    assert empty_cache.load_overload("first", TARGET) == KEPT.content


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")], ids=repr)
def test_a_failed_compilation_is_not_remembered(error: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddf_convert.cpu import jit_cache as compiler

    calls: list[int] = []

    class Kernel(SimpleNamespace):
        __hash__ = object.__hash__

        def __call__(self, *arguments: Any) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise error

    kernel = Kernel(py_func=_plain, _cache=caching.NullCache())
    monkeypatch.setattr(compiler, "cache_folder", lambda kernel: None)
    with pytest.raises(error if isinstance(error, type) else OSError):
        compiler.prepare(kernel, (np.float32(0),))
    for _ in range(2):
        compiler.prepare(kernel, (np.float32(0),))
    assert len(calls) == 2


def test_a_folder_is_looked_for_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ddf_convert.cpu import jit_cache as compiler

    kernel = compiler.kernel(kernels_nchw.forward.py_func)
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(compiler._KernelCacheImpl, "_locator_classes", [])
        assert compiler.cache_folder(kernel) is None
    folder = compiler.cache_folder(kernel)
    assert folder is not None
    assert tmp_path in folder.parents


@pytest.mark.slow
def test_disable_jit_takes_the_reference_and_says_so_once() -> None:
    code = """
        layer = layers.DDF2d(2)
        x = torch.randn(1, 2, 3, 3, requires_grad=True)
        layer(x).sum().backward()
        ops.ddf(x, x.new_ones(1, 2, 3, 3), x.new_ones(1, 9, 3, 3), norm_scale=1.0, padding=1)
        print(bool(x.grad.abs().sum() > 0), cpu.unusable() is not None)
        from ddf_convert.bench import doctor
        print([str(check()[0]) for check in (doctor.check_cpu_kernels, doctor.check_cpu_kernel_cache)])
    """
    result = python(CALL + textwrap.dedent(code), NUMBA_DISABLE_JIT="1")
    assert result.returncode == 0, result.stderr
    numbers, *rest = result.stdout.split("True True")
    assert numbers.split() == ["9.0", "9.0"]
    assert rest == ["\n['note', 'note']\n"]
    (line,) = result.stderr.splitlines()
    assert "CPU tensors take the slower PyTorch reference: NUMBA_DISABLE_JIT is set" in line
