"""How long one forward pass takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddf_convert.copies import real_copy
from ddf_convert.errors import DDFError
from ddf_convert.timing import median_ms


def forward_ms(module: nn.Module, *inputs: Any, seconds: float = 0.2, kwargs: dict[str, Any] | None = None) -> float:
    """The median time of one forward pass in evaluation mode, in milliseconds, as a program sees it.

    It runs where the module's tensors are, in their dtype and layout, without gradients and autocast. A copy is what
    runs, with the module's own weights: nothing in the module changes, and no random state does. The first pass, in
    which kernels may be compiled, belongs to no figure.

    Args:
        module: Any module; one on the meta device runs on the CPU, with random weights.
        *inputs: Positional arguments of its forward; tensors are brought to where it runs.
        seconds: To spend on measuring, at least.
        kwargs: Keyword arguments of its forward, likewise.

    Raises:
        UsageError: The module cannot be copied.
        DDFError: Its forward pass fails.
    """
    copied = real_copy(module, inputs, kwargs)
    device = device_of(copied.module)
    with copied.running(), torch.inference_mode():
        try:
            copied.run()
        except Exception as error:  # the user's code: anything can come out of it
            raise DDFError(f"{type(module).__name__} does not run on {device}: {error}") from error
        return median_ms(copied.run, device, seconds, hide_host=False)


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs: at its first parameter or buffer; on the CPU if it has none."""
    tensors = (tensor for found in (module.parameters(), module.buffers()) for tensor in found)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
