"""Devices by name, and the machine in words for readers of measurements."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ddf_convert.errors import UsageError


def choose(name: str | None, index: int | None = None, use: str = "measured") -> torch.device:
    """Returns the device of this name; without one, the GPU if torch finds one, else the CPU.

    Args:
        name: "cpu", "cuda" or "cuda:N"; None for whatever there is.
        index: The GPU's index where the name has none; None for torch's current one.
        use: What the device is for, in the words of an error.

    Raises:
        UsageError: The name means nothing, or there is no such device.
    """
    requested = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise UsageError(f"--device {name}: no such device; give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device {name}: only cpu and cuda are {use}")
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: torch finds no NVIDIA GPU here; give cpu")
    own = torch.cuda.current_device() if index is None else index
    chosen = own if device.index is None else device.index
    if chosen >= torch.cuda.device_count():
        raise UsageError(f"--device {name or requested}: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", chosen)


def describe(device: torch.device) -> dict[str, Any]:
    """Returns facts about the machine: processor, versions, and the GPU if that is the device."""
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
            "numba_cuda": package_version("numba-cuda"),
            "triton": package_version("triton"),
        }
    return machine


def describe_short(machine: dict[str, Any]) -> str:
    """Puts the facts of :func:`describe` in one line."""
    if machine["device"] == "cuda":
        return f"{machine['gpu']} ({machine['sm']}), torch {machine['torch']}, cuDNN {machine['cudnn']}"
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return f"{machine['processor']}, {threads}, torch {machine['torch']}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def package_version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is missing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
