"""What runs on this machine, and why not what does not."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from ddf_convert.version import __version__


class State(StrEnum):
    """How a check came out: fine, absent but not needed, or broken."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: What.
        state: How it came out.
        detail: What was found and, for a problem, what to do.
    """

    name: str
    state: State
    detail: str

    def to_dict(self) -> dict[str, str]:
        """As plain data."""
        return {key: str(value) for key, value in asdict(self).items()}


def examine() -> Iterator[Check]:
    """Every check, one after another; none of them raises."""
    yield Check("Python", State.OK, platform.python_version())
    yield Check("system", State.OK, f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield Check("ddf_convert", State.OK, __version__)
    for package in ("torch", "torchvision", "timm", "numba"):
        yield _package(package)
    checks: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("CPU threads", _threads),
        ("CPU kernels", _cpu_kernels),
        ("kernel cache", _kernel_cache),
        ("timm registry", _registry),
        ("CUDA", _cuda),
    )
    for name, check in checks:
        try:
            yield check()
        except Exception as error:
            yield Check(name, State.PROBLEM, f"{type(error).__name__}: {error}")
    yield _optional("numba-cuda", "no CUDA kernel needs it in this version")
    yield _optional("matplotlib", "plots need it: pip install 'ddf-convert[plot]'")


def _package(name: str) -> Check:
    try:
        return Check(name, State.OK, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, State.PROBLEM, f"not installed: pip install {name}")


def _optional(name: str, why: str) -> Check:
    try:
        return Check(name, State.OK, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, State.NOTE, f"not installed; {why}")


def _threads() -> Check:
    import torch

    return Check("CPU threads", State.OK, f"torch uses {torch.get_num_threads()} of {os.cpu_count()}")


def _cpu_kernels() -> Check:
    """Compiles the kernels, or reads them from the cache, and compares a small case with the reference."""
    import torch

    from ddf_convert import ops, reference

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).requires_grad_()

    tensors = (random(2, 8, 9, 11), random(2, 8, 3, 3), random(2, 9, 5, 6))

    def timed() -> tuple[float, list[Any]]:
        start = time.perf_counter()
        output = ops.ddf(*tensors, stride=2, padding=1)
        results = [output, *torch.autograd.grad(output.square().sum(), tensors)]
        return time.perf_counter() - start, results

    first, results = timed()
    again = min(timed()[0] for _ in range(3))
    input, channel, spatial = exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    output = reference.forward(input, channel, spatial, 2, 1, 1, "mul")
    expected = [output, *torch.autograd.grad(output.square().sum(), exact)]
    error = max(
        ((result.double() - right).abs().max() / right.abs().max()).item()
        for result, right in zip(results, expected, strict=True)
    )
    if not error < 1e-5:
        return Check(
            "CPU kernels", State.PROBLEM, f"wrong results: off from the reference by {error:.1e}; please report it"
        )
    return Check(
        "CPU kernels",
        State.OK,
        f"forward and backward agree with the reference to {error:.0e}; {first:.2f} s at first use, then"
        f" {1000 * again:.2f} ms",
    )


def _kernel_cache() -> Check:
    from ddf_convert.cpu import contiguous

    folder = contiguous.forward.stats.cache_path
    if not folder:
        return Check("kernel cache", State.NOTE, "none: kernels are compiled anew in every process")
    existing = next(parent for parent in (Path(folder), *Path(folder).parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Check("kernel cache", State.NOTE, f"{folder} is not writable: set NUMBA_CACHE_DIR to a folder that is")
    return Check("kernel cache", State.OK, str(folder))


def _registry() -> Check:
    import timm

    import ddf_convert  # noqa: F401  (registers its models)

    names = timm.list_models("ddf_*")
    if not names:
        return Check("timm registry", State.PROBLEM, "the DDF-ResNets are not registered; reinstall ddf-convert")
    return Check("timm registry", State.OK, f"{len(names)} DDF models, {len(timm.list_models())} in all")


def _cuda() -> Check:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "no GPU that this torch can use" if built else "this torch is built for the CPU only"
        return Check("CUDA", State.NOTE, why)
    devices = ", ".join(
        f"{torch.cuda.get_device_name(index)} (sm_{''.join(map(str, torch.cuda.get_device_capability(index)))})"
        for index in range(torch.cuda.device_count())
    )
    has_kernels = importlib.util.find_spec("ddf_convert.cuda") is not None
    kernels = "" if has_kernels else "; this version has no CUDA kernels: tensors there take the PyTorch reference"
    return Check("CUDA", State.OK, f"{devices}{kernels}")
