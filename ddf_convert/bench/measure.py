"""The figures of one function of tensors: forward, forward + backward, memory, and what a call costs the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.bench.device import DTYPES, LAYOUTS
from ddf_convert.bench.memory import peak_mib
from ddf_convert.cost.timing import host_us, in_turn, median_ms
from ddf_convert.errors import first_line

Figures = dict[str, Any]
"""``forward_ms``, ``forward_backward_ms``, ``peak_mib``, ``host_us`` (None where unknown); or ``error`` alone."""


def random_leaf(shape: Sequence[int], dtype: str, layout: str, device: torch.device) -> Tensor:
    """Normal numbers that want a gradient; dtype and layout by name."""
    tensor = torch.empty(shape, dtype=DTYPES[dtype], device=device, memory_format=LAYOUTS[layout])
    return tensor.normal_().requires_grad_()


def placed(module: nn.Module, dtype: str, layout: str, device: torch.device) -> nn.Module:
    """The module itself, in a dtype and layout by name, on a device."""
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "memory_format": LAYOUTS[layout], "device": device}
    return module.to(**options)


def figures(
    function: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]], device: torch.device, seconds: float
) -> Figures:
    """Measures a function, or a module with its parameters, on copies of its inputs that are taken in turn.

    Args:
        function: Of tensors; one output.
        inputs: One or more sets of arguments, alike in shape; those that require gradients get them.
        device: Where it all is.
        seconds: To spend on each time, at least.
    """
    parameters: list[Tensor] = list(function.parameters()) if isinstance(function, nn.Module) else []

    def forward(*tensors: Tensor) -> Tensor:
        with torch.no_grad():
            return function(*tensors)

    grads = [torch.randn_like(forward(*tensors)) for tensors in inputs]

    def both(grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        return torch.autograd.grad(function(*tensors), wanted + parameters, grad)

    with_grads = [(grad, *tensors) for grad, tensors in zip(grads, inputs, strict=True)]
    both(*with_grads[0])  # what is compiled or looked for at first use belongs to no figure
    return {
        "forward_ms": median_ms(in_turn(forward, inputs), device, seconds),
        "forward_backward_ms": median_ms(in_turn(both, with_grads), device, seconds),
        "peak_mib": peak_mib(lambda: both(*with_grads[0]), device),
        "host_us": host_us(in_turn(forward, inputs), device, seconds / 2),
    }


def figures_or_error(
    function: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]], device: torch.device, seconds: float
) -> Figures:
    """As :func:`figures`, but what does not fit the memory, or is missing in torch, is an ``error`` and no exception.

    Raises:
        RuntimeError: The GPU is left unusable, so that nothing after it could be measured.
    """
    try:
        return figures(function, inputs, device, seconds)
    except torch.OutOfMemoryError:
        error = "out of memory"
    except Exception as caught:
        error = f"{type(caught).__name__}: {first_line(caught)}"
    if device.type == "cuda":  # here, where the failed call's tensors are free again
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    return {"error": error}
