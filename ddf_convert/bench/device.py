"""How the device is set while it is measured: dtypes, memory formats, precision."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


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
