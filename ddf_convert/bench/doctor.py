"""What runs on this machine, and why the rest does not."""

from __future__ import annotations

import functools
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import timm
import torch

from ddf_convert import cuda, ops, reference
from ddf_convert.cpu import dispatch as cpu
from ddf_convert.errors import first_line
from ddf_convert.utils.device import package_version
from ddf_convert.version import __version__

_TOLERANCE = 1e-5  # relative to the largest result: float32 rounds to 6e-8
_DEFAULT_CAPABILITY = (9, 0)  # compiled for where there is no GPU
_REQUIRED = ("torch", "torchvision", "timm", "numba")
# Packages that only some commands need, why, and the extra that installs them.
_EXTRAS = {
    "matplotlib": ("plots and pictures need", "plot"),
    "tensorboard": ("finetune's events for TensorBoard need", "train"),
    "h5py": ("reading NYU Depth V2 needs", "depth"),
    "onnxscript": ("ONNX files need", "export"),
}


class State(StrEnum):
    """The result of a check: fine, absent but not needed, or broken."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Check:
    """One check and its result.

    Attributes:
        name: What was checked.
        state: The result.
        detail: What was found and, for a problem, what to do.
    """

    name: str
    state: State
    detail: str

    def to_dict(self) -> dict[str, str]:
        """Returns the check as plain data."""
        return {key: str(value) for key, value in asdict(self).items()}


Result = tuple[State, str]


def examine() -> Iterator[Check]:
    """Runs all checks, one after another; none of them raises."""
    for name, check in _checks():
        try:
            state, detail = check()
        except Exception as error:
            state, detail = State.PROBLEM, f"{type(error).__name__}: {error}"
        yield Check(name, state, detail)


def _checks() -> Iterator[tuple[str, Callable[[], Result]]]:
    yield "Python", lambda: (State.OK, platform.python_version())
    yield "system", lambda: (State.OK, f"{platform.system()} {platform.release()}, {platform.machine()}")
    yield "ddf_convert", lambda: (State.OK, __version__)
    for package in _REQUIRED:
        yield package, functools.partial(check_required_package, package)
    yield "CPU threads", check_cpu_threads
    yield "CPU kernels", check_cpu_kernels
    yield "CPU kernel cache", check_cpu_kernel_cache
    yield "timm registry", check_timm_registry
    yield "CUDA", check_cuda
    yield "numba-cuda", check_numba_cuda
    if package_version("numba-cuda") is not None:
        yield "CUDA compiler", check_cuda_compiler
        yield "CUDA kernel cache", check_cuda_kernel_cache
    for index in range(_gpu_count()):
        yield f"cuda:{index}", functools.partial(check_gpu, index)
    for package, (user, extra) in _EXTRAS.items():
        why = f"{user} it: pip install 'ddf-convert[{extra}]'"
        yield package, functools.partial(check_optional_package, package, why)


# --- packages ---------------------------------------------------------------------------------------------------------


def check_required_package(name: str) -> Result:
    """Checks that a package is installed."""
    version = package_version(name)
    return (State.OK, version) if version else (State.PROBLEM, f"not installed: pip install {name}")


def check_optional_package(name: str, why: str) -> Result:
    """Checks whether a package is installed."""
    version = package_version(name)
    return (State.OK, version) if version else (State.NOTE, f"not installed; {why}")


def check_timm_registry() -> Result:
    """Checks that timm knows the models of ddf_convert, which importing the package registers."""
    names = timm.list_models("ddf_*")
    if not names:
        return State.PROBLEM, "the DDF-ResNets are not registered; reinstall ddf-convert"
    return State.OK, f"{len(names)} DDF models, {len(timm.list_models())} in all"


# --- kernels ----------------------------------------------------------------------------------------------------------


def check_kernels(device: str) -> Result:
    """Runs the operator forward and backward on a small input, and compares with the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 9, 11), (2, 8, 3, 3), (2, 9, 5, 6))
    tensors = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]

    def run() -> tuple[float, list[torch.Tensor]]:
        start = time.perf_counter()
        output = ops.ddf(*tensors, stride=2, padding=1)
        results = [output, *torch.autograd.grad(output.square().sum(), tensors)]
        if device != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start, results

    first_seconds, results = run()
    seconds = min(run()[0] for _ in range(3))
    exact = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
    input, channel_filter, spatial_filter = exact
    output = reference.forward(input, channel_filter, spatial_filter, reference.Geometry(stride=2, padding=1))
    expected = [output, *torch.autograd.grad(output.square().sum(), exact)]
    error = max(
        ((result.cpu().double() - right).abs().max() / right.abs().max()).item()
        for result, right in zip(results, expected, strict=True)
    )
    if not error < _TOLERANCE:
        return State.PROBLEM, f"wrong results: off from the reference by {error:.1e}; please report it"
    agreement = f"forward and backward agree with the reference to {error:.0e}"
    return State.OK, f"{agreement}; {first_seconds:.2f} s at first use, then {1000 * seconds:.2f} ms"


def check_cpu_threads() -> Result:
    """Counts the threads that torch uses."""
    return State.OK, f"torch uses {torch.get_num_threads()} of {os.cpu_count()}"


def check_cpu_kernels() -> Result:
    """Checks that the CPU kernels are used and right."""
    reason = cpu.unusable()
    if reason is not None:
        return State.NOTE, f"tensors take the slower PyTorch reference: {reason}"
    return check_kernels("cpu")


def check_cpu_kernel_cache() -> Result:
    """Checks that compiled CPU kernels can be kept."""
    from ddf_convert.cpu import kernels_nchw
    from ddf_convert.cpu.jit_cache import cache_folder, unusable

    if unusable() is not None:
        return State.NOTE, "not used: nothing is compiled"
    return _check_cache(cache_folder(kernels_nchw.forward))


def _check_cache(folder: Path | None) -> Result:
    """Checks that a folder, which need not exist yet, can be written to."""
    if folder is None:
        where = "set NUMBA_CACHE_DIR to a folder that can be written to"
        return State.NOTE, f"none, so every process compiles its kernels: {where}"
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return State.NOTE, f"{folder} is not writable: set NUMBA_CACHE_DIR to a folder that is"
    return State.OK, str(folder)


# --- NVIDIA GPUs: what torch sees, what compiles the kernels, and whether they run ------------------------------------


def check_cuda() -> Result:
    """Checks that torch can use a GPU."""
    if torch.version.cuda is None:
        return State.NOTE, "this torch is not built for NVIDIA GPUs"
    with warnings.catch_warnings(record=True) as caught:  # torch's own reason, such as a driver that is too old
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    versions = f"torch is built for CUDA {torch.version.cuda}, {_describe_driver()}"
    if not available:
        reason = str(caught[0].message).splitlines()[0] if caught else "no GPU that torch can use"
        return State.NOTE, f"{reason}; {versions}"
    count = torch.cuda.device_count()
    return State.OK, f"{count} GPU{'s' if count > 1 else ''}; {versions}"


def check_numba_cuda() -> Result:
    """Checks whether the compiler of the CUDA kernels is installed."""
    why = "only NVIDIA GPUs need it" if torch.version.cuda is None else f"the CUDA kernels need it: {_install_extra()}"
    return check_optional_package("numba-cuda", why)


def check_cuda_compiler() -> Result:
    """Checks that a CUDA kernel compiles, which takes no GPU."""
    from ddf_convert.cuda import kernel_spec
    from ddf_convert.cuda.codegen import ptx

    has_gpu = _gpu_count() > 0
    capability = torch.cuda.get_device_capability(0) if has_gpu else _DEFAULT_CAPABILITY
    start = time.perf_counter()
    try:
        ptx.compile_ptx(kernel_spec.FilterNormSpec("float32", add=False, gradient=False), capability)
    except Exception as error:
        if os.environ.get("NUMBA_ENABLE_CUDASIM", "0") != "0":
            detail = "NUMBA_ENABLE_CUDASIM is set, so Numba simulates CUDA: unset it"
        else:
            detail = f"it fails ({type(error).__name__}: {first_line(error)}); {_install_extra()}"
        return State.PROBLEM if has_gpu else State.NOTE, detail
    seconds = time.perf_counter() - start
    target = f"sm_{''.join(map(str, capability))}"
    untried = "" if has_gpu else "; there is no GPU here to run it on"
    return State.OK, f"a kernel compiled for {target} in {seconds:.1f} s{untried}"


def check_cuda_kernel_cache() -> Result:
    """Checks that compiled CUDA kernels can be kept."""
    from ddf_convert.cuda.codegen.ptx import cache_folder

    return _check_cache(cache_folder())


def check_gpu(index: int) -> Result:
    """Checks that the CUDA kernels are used and right on one GPU."""
    device = torch.device("cuda", index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    gpu = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    reason = cuda.unusable(device)
    if reason is not None:
        state = State.NOTE if package_version("numba-cuda") is None else State.PROBLEM
        return state, f"{gpu}: tensors take the slower PyTorch reference: {reason}"
    state, detail = check_kernels(str(device))
    return state, f"{gpu}: {detail}"


def _describe_driver() -> str:
    """Names the newest CUDA that the driver knows: it refuses the PTX of a newer one."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return "the driver was not asked (cuda-bindings is not installed)"
    try:
        status, version = driver.cuDriverGetVersion()
    except Exception:  # of several classes, where there is no driver to load
        return "no NVIDIA driver is installed"
    return f"the driver answers {status}" if status else f"the driver for {version // 1000}.{version % 1000 // 10}"


def _gpu_count() -> int:
    """The number of GPUs for torch; 0 where torch fails, which :func:`check_cuda` reports."""
    try:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:
        return 0


def _install_extra() -> str:
    """The command that installs the compiler of the CUDA kernels, for torch's CUDA."""
    return f"pip install 'ddf-convert[cuda{(torch.version.cuda or '13').partition('.')[0]}]'"
