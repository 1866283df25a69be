"""The device that is measured: chosen by name, described in words, set to the precision that is asked for."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddf_convert.errors import UsageError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def choose(name: str | None) -> torch.device:
    """The device of this name; without one, the GPU if torch finds one, else the CPU.

    Raises:
        UsageError: The name means nothing, or no such device is here.
    """
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device {name}: only cpu and cuda are measured")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no NVIDIA GPU here; give cpu")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", index)


def describe(device: torch.device) -> dict[str, Any]:
    """The machine in words: processor, versions, and the GPU if that is what is measured."""
    machine: dict[str, Any] = {
        "device": device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": metadata.version("numba"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "sm": f"sm_{properties.major}{properties.minor}",
            "gpu_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20, 1),
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "numba_cuda": _version("numba-cuda"),
            "triton": _version("triton"),
        }
    return machine


def called(machine: dict[str, Any]) -> str:
    """One line for a person, from :func:`describe`."""
    if machine["device"] == "cuda":
        return f"{machine['gpu']} ({machine['sm']}), torch {machine['torch']}, cuDNN {machine['cudnn']}"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['processor']}, {threads}, torch {machine['torch']}"


@contextlib.contextmanager
def convolution_settings(tf32: bool) -> Iterator[None]:
    """Float32 products are TF32 or not, and cuDNN looks for its fastest algorithm; at the end all is as it was."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    with warnings.catch_warnings():  # torch has newer names for TF32, which torch.compile does not get on with
        warnings.simplefilter("ignore")
        before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, tf32, tf32
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0].strip() if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
