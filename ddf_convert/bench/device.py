"""The device that is measured: chosen by name, set to the precision that is asked for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

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
