"""Whether the CUDA kernels can run on a device, and what to do where they cannot."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ddf_convert.errors import may_pass
from ddf_convert.notices import tell_once

_OLDEST = (7, 5)  # compute capability that the compiler of CUDA 13 still makes code for, and that is tested
_MEND = "pip install 'numba-cuda[cu{major}]'"
_found: dict[torch.device, str | None] = {}  # of each device that was examined, once it is settled


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this CUDA tensor; says why not, once for each reason, in a warning.

    Args:
        tensor: On any CUDA device.
    """
    device = tensor.device
    if device not in _found and torch.cuda.is_current_stream_capturing():
        return True  # no time to try: where the kernel then cannot be loaded, the error says what to do
    reason = unusable(device)
    if reason is None:
        return True
    if device in _found:
        tell_once(f"CUDA tensors take the slower PyTorch reference: {reason}")
    else:  # the reason holds numbers that change from call to call
        tell_once(f"CUDA tensors take the slower PyTorch reference for now: {reason}", key=f"for now {device}")
    return False


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, and the mend; None if they can.

    It is found out once in a process: the smallest of the kernels is compiled (or read from the disk), loaded and run,
    and its result looked at. A failure that may pass (memory or the disk is full) is not remembered: the next call
    tries again.

    Args:
        device: A CUDA device with its index.
    """
    if device not in _found:
        try:
            _found[device] = _examine(device)
        except Exception as error:
            reason = f"a kernel could not be run on {device} ({_first_line(error)})"
            if may_pass(error):
                return f"{reason}; the next call tries again"
            _found[device] = f"{reason}; {_advice(error)}"
    return _found[device]


def _examine(device: torch.device) -> str | None:
    """What is missing or not supported; raises what a kernel raises that is tried."""
    reason = _missing() or _unsupported(device)
    if reason is None:
        _try(device)
    return reason


def _missing() -> str | None:
    """What is not there."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA; the kernels are for NVIDIA GPUs"
    mend = _MEND.format(major=torch.version.cuda.partition(".")[0])
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed: {mend}"
    try:
        from cuda.bindings import driver  # noqa: F401
        from numba.core import config
    except ImportError as error:
        return f"numba-cuda is not complete ({error}): {mend}"
    if getattr(config, "ENABLE_CUDASIM", 0):
        return "NUMBA_ENABLE_CUDASIM is set, so Numba simulates CUDA: unset it"
    return None


def _unsupported(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))},"
            f" and the kernels need {'.'.join(map(str, _OLDEST))} or newer"
        )
    return None


def _try(device: torch.device) -> None:
    from ddf_convert.cuda import dispatch

    filters = torch.arange(9.0, device=device).view(1, 9, 1, 1)
    made = dispatch.filter_norm(filters, 9, 1.0, torch.contiguous_format)
    expected = (filters - 4) / filters.std()
    if not torch.allclose(made, expected, atol=1e-5):
        raise RuntimeError("it gave a wrong result; please report it")


def _advice(error: Exception) -> str:
    text = str(error)
    if "UNSUPPORTED_PTX" in text:
        return (
            "the driver is older than the compiler: update it, or install the numba-cuda of its CUDA version"
            f" ({_MEND.format(major=12)} for drivers of CUDA 12)"
        )
    return "ddf-convert doctor says more"


def _first_line(error: Exception) -> str:
    text: Any = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
