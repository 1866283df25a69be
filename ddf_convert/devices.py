"""The device that a command works on, by the name that the user gives."""

from __future__ import annotations

import torch

from ddf_convert.errors import UsageError


def choose(name: str | None, index: int | None = None, use: str = "measured") -> torch.device:
    """The device of this name; without one, the GPU if torch finds one, else the CPU.

    Args:
        name: "cpu", "cuda" or "cuda:N"; None is whatever there is.
        index: Of the GPU, where the name does not say; None is torch's current one.
        use: What it is for, in the words of an error.

    Raises:
        UsageError: The name means nothing, or no such device is here.
    """
    asked = ("cuda" if torch.cuda.is_available() else "cpu") if name is None else name
    try:
        device = torch.device(asked)
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
        raise UsageError(f"--device {name or asked}: the last GPU here is cuda:{torch.cuda.device_count() - 1}")
    return torch.device("cuda", chosen)
