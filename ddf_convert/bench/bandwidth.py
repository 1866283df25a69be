"""The wall of a memory-bound operator: the bandwidth of a copy, and the bytes that the operator cannot do without."""

from __future__ import annotations

import torch
from torch import Tensor

from ddf_convert.cost.timing import median_ms

_COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes: far beyond any cache


def copy_bandwidth(device: torch.device, seconds: float, size: int | None = None) -> float:
    """Bytes a second, read and written together, of ``copy_`` between two tensors on a device.

    Args:
        device: Where.
        seconds: To spend on it, at least.
        size: Bytes of each tensor; far beyond the caches if None, and on a GPU at most an eighth of what is free.
    """
    if size is None:
        size = _COPIED[device.type]
        if device.type == "cuda":
            size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / (median_ms(lambda: target.copy_(source), device, seconds) / 1e3)


def forward_bytes(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, output: Tensor) -> int:
    """Each tensor of the operator read or written once."""
    return sum(_size(tensor) for tensor in (input, channel_filter, spatial_filter, output))


def forward_backward_bytes(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, output: Tensor) -> int:
    """What forward, the gradient of the input and the gradients of the filters each read and write, added up.

    A gradient is as large as its tensor. The input's gradient reads the output's gradient and both filters; those of
    the filters read the input, the output's gradient and both filters.
    """
    maps, filters = _size(input), _size(channel_filter) + _size(spatial_filter)
    grad_input = _size(output) + filters + maps
    grad_filters = maps + _size(output) + filters + filters
    return forward_bytes(input, channel_filter, spatial_filter, output) + grad_input + grad_filters


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
