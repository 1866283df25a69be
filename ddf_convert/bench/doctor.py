"""What runs on this machine, and why not what does not."""

from __future__ import annotations

import functools
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from ddf_convert.version import __version__

_CLOSE = 1e-5  # of the largest result: float32 rounds to 6e-8
_ANY_CAPABILITY = (9, 0)  # what the compiler is tried with where there is no GPU
# Packages that some commands alone want: who, and the extra that has it.
_EXTRAS = {
    "matplotlib": ("plots and pictures need", "plot"),
    "tensorboard": ("finetune's events for TensorBoard need", "train"),
    "h5py": ("reading NYU Depth V2 needs", "depth"),
    "onnxscript": ("ONNX files need", "export"),
}


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
    for name, check in _checks():
        try:
            yield check()
        except Exception as error:
            yield Check(name, State.PROBLEM, f"{type(error).__name__}: {error}")


def _checks() -> Iterator[tuple[str, Callable[[], Check]]]:
    """Those that run something, by name."""
    yield "CPU threads", _threads
    yield "CPU kernels", _cpu_kernels
    yield "CPU kernel cache", _cpu_cache
    yield "timm registry", _registry
    yield "CUDA", _cuda
    yield "numba-cuda", _numba_cuda
    if _version("numba-cuda") is not None:
        yield "CUDA compiler", _cuda_compiler
        yield "CUDA kernel cache", _cuda_cache
    for index in range(_gpus()):
        yield f"cuda:{index}", functools.partial(_gpu, index)
    for package, (user, extra) in _EXTRAS.items():
        yield package, functools.partial(_optional, package, f"{user} it: pip install 'ddf-convert[{extra}]'")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, State.PROBLEM, f"not installed: pip install {name}")
    return Check(name, State.OK, version)


def _optional(name: str, why: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, State.NOTE, f"not installed; {why}")
    return Check(name, State.OK, version)


def _threads() -> Check:
    import torch

    return Check("CPU threads", State.OK, f"torch uses {torch.get_num_threads()} of {os.cpu_count()}")


def _cpu_kernels() -> Check:
    from ddf_convert.cpu import dispatch as cpu

    reason = cpu.unusable()
    if reason is not None:
        return Check("CPU kernels", State.NOTE, f"tensors take the slower PyTorch reference: {reason}")
    return _small_case("CPU kernels", "cpu")


def _small_case(name: str, device: str) -> Check:
    """Runs the operator forward and backward, kernels compiled where need be, and compares with the reference."""
    import torch

    from ddf_convert import ops, reference

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator).to(device).requires_grad_()

    tensors = (random(2, 8, 9, 11), random(2, 8, 3, 3), random(2, 9, 5, 6))

    def timed() -> tuple[float, list[Any]]:
        start = time.perf_counter()
        output = ops.ddf(*tensors, stride=2, padding=1)
        results = [output, *torch.autograd.grad(output.square().sum(), tensors)]
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, results

    first, results = timed()
    again = min(timed()[0] for _ in range(3))
    input, channel, spatial = exact = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    output = reference.forward(input, channel, spatial, reference.Geometry(stride=2, padding=1))
    expected = [output, *torch.autograd.grad(output.square().sum(), exact)]
    error = max(
        ((result.cpu().double() - right).abs().max() / right.abs().max()).item()
        for result, right in zip(results, expected, strict=True)
    )
    if not error < _CLOSE:
        return Check(name, State.PROBLEM, f"wrong results: off from the reference by {error:.1e}; please report it")
    return Check(
        name,
        State.OK,
        f"forward and backward agree with the reference to {error:.0e}; {first:.2f} s at first use, then"
        f" {1000 * again:.2f} ms",
    )


def _cpu_cache() -> Check:
    from ddf_convert.cpu import kernels_nchw
    from ddf_convert.cpu.jit_cache import cache_folder, unusable

    if unusable() is not None:
        return Check("CPU kernel cache", State.NOTE, "not used: nothing is compiled")
    return _cache("CPU kernel cache", cache_folder(kernels_nchw.forward))


def _cache(name: str, folder: Path | None) -> Check:
    """Whether compiled kernels can be kept in a folder, which need not exist yet."""
    if folder is None:
        where = "set NUMBA_CACHE_DIR to a folder that can be written to"
        return Check(name, State.NOTE, f"none, so every process compiles its kernels: {where}")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Check(name, State.NOTE, f"{folder} is not writable: set NUMBA_CACHE_DIR to a folder that is")
    return Check(name, State.OK, str(folder))


def _registry() -> Check:
    import timm

    import ddf_convert  # noqa: F401  (registers its models)

    names = timm.list_models("ddf_*")
    if not names:
        return Check("timm registry", State.PROBLEM, "the DDF-ResNets are not registered; reinstall ddf-convert")
    return Check("timm registry", State.OK, f"{len(names)} DDF models, {len(timm.list_models())} in all")


# --- NVIDIA GPUs: what torch sees, what compiles the kernels, and whether they run ------------------------------------


def _cuda() -> Check:
    """Torch and the driver."""
    import torch

    if torch.version.cuda is None:
        return Check("CUDA", State.NOTE, "this torch is not built for NVIDIA GPUs")
    torchs = f"torch is built for CUDA {torch.version.cuda}"
    with warnings.catch_warnings(record=True) as said:  # torch's own reason, such as a driver that is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    driver = _driver()
    if not available:
        reasons = [str(warning.message).splitlines()[0] for warning in said] or ["no GPU that torch can use"]
        return Check("CUDA", State.NOTE, f"{reasons[0]}; {torchs}, {driver}")
    count = torch.cuda.device_count()
    return Check("CUDA", State.OK, f"{count} GPU{'s' if count > 1 else ''}; {torchs}, {driver}")


def _driver() -> str:
    """The newest CUDA that the driver knows, in words: PTX of a newer one it refuses."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return "the driver was not asked (cuda-bindings is not installed)"
    try:
        status, version = driver.cuDriverGetVersion()
    except Exception:  # of several kinds, where there is no driver to load
        return "no NVIDIA driver is installed"
    return f"the driver answers {status}" if status else f"the driver for {version // 1000}.{version % 1000 // 10}"


def _gpus() -> int:
    """How many there are for torch; 0 also where torch fails, which the check of CUDA says."""
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:
        return 0


def _extra() -> str:
    """How to install what compiles the CUDA kernels, for torch's CUDA."""
    import torch

    return f"pip install 'ddf-convert[cuda{(torch.version.cuda or '13').partition('.')[0]}]'"


def _numba_cuda() -> Check:
    import torch

    for_whom = "only NVIDIA GPUs need it" if torch.version.cuda is None else f"the CUDA kernels need it: {_extra()}"
    return _optional("numba-cuda", for_whom)


def _cuda_compiler() -> Check:
    """Whether kernels can be compiled, which takes no GPU."""
    import torch

    from ddf_convert.cuda import kernel_spec
    from ddf_convert.cuda.codegen import ptx

    name, has_gpu = "CUDA compiler", _gpus() > 0
    capability = torch.cuda.get_device_capability(0) if has_gpu else _ANY_CAPABILITY
    start = time.perf_counter()
    try:
        ptx.compile_ptx(kernel_spec.FilterNormSpec("float32", add=False, gradient=False), capability)
    except Exception as error:
        if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0":
            mend = "NUMBA_ENABLE_CUDASIM is set, so Numba simulates CUDA: unset it"
        else:
            lines = str(error).strip().splitlines() or [""]
            mend = f"it fails ({type(error).__name__}: {lines[0]}); {_extra()}"
        return Check(name, State.PROBLEM if has_gpu else State.NOTE, mend)
    took = time.perf_counter() - start
    target = f"sm_{''.join(map(str, capability))}"
    untried = "" if has_gpu else "; there is no GPU here to run it on"
    return Check(name, State.OK, f"a kernel compiled for {target} in {took:.1f} s{untried}")


def _cuda_cache() -> Check:
    from ddf_convert.cuda.codegen.ptx import cache_folder

    return _cache("CUDA kernel cache", cache_folder())


def _gpu(index: int) -> Check:
    """One GPU: the kernels, if they can run there, against the reference."""
    import torch

    from ddf_convert import cuda

    device = torch.device("cuda", index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    gpu = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    reason = cuda.unusable(device)
    if reason is not None:  # without numba-cuda that is as it should be
        state = State.NOTE if _version("numba-cuda") is None else State.PROBLEM
        return Check(str(device), state, f"{gpu}: tensors take the slower PyTorch reference: {reason}")
    found = _small_case(str(device), str(device))
    return Check(found.name, found.state, f"{gpu}: {found.detail}")
