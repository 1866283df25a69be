"""The DDF operator in plain PyTorch: the specification, and the fallback on any device.

Every kernel of the package is compared with these functions. They loop over the taps and work on shifted views, so
nothing of size ``C * K * K * H * W`` is stored. They use standard operators only, so they can be exported.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, equation 1 (``mul``) and the authors' second
variant (``add``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
) -> Tensor:
    """Applies the combined filter at every pixel of every channel.

    Args:
        input: (B, C, H, W).
        channel_filter: (B, C, K, K).
        spatial_filter: (B, G*K*K, Ho, Wo); channel r belongs to head r // (C / G).
        stride: Step between output pixels, in input pixels.
        padding: Zeros around the input, in pixels.
        dilation: Distance between taps, in pixels.
        combine: "mul" or "add": how the two filters make one.

    Returns:
        (B, C, Ho, Wo), dtype of ``input``. Half types accumulate in float32.
    """
    padded = F.pad(_widen(input), (padding, padding, padding, padding))
    channel, spatial = _widen(channel_filter), _widen(spatial_filter)
    height, width = spatial_filter.shape[-2:]
    heads = spatial_filter.shape[1] // channel_filter.shape[-1] ** 2
    output = padded.new_zeros(*input.shape[:2], height, width)
    for tap, rows, columns in _taps(channel_filter.shape[-1], height, width, stride, dilation):
        weight = _combined(channel, spatial, tap, combine)
        output = output + (weight * _by_head(padded[:, :, rows, columns], heads)).flatten(1, 2)
    return output.to(input.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`forward` with respect to its three tensors.

    Args:
        grad_output: (B, C, Ho, Wo), the gradient of the output.
        input: As in :func:`forward`.
        channel_filter: As in :func:`forward`.
        spatial_filter: As in :func:`forward`.
        stride: As in :func:`forward`.
        padding: As in :func:`forward`.
        dilation: As in :func:`forward`.
        combine: As in :func:`forward`.
        needs: Which of (input, channel_filter, spatial_filter) want a gradient.

    Returns:
        The three gradients, each shaped and typed as its tensor; None where not wanted.
    """
    padded = F.pad(_widen(input), (padding, padding, padding, padding))
    channel, spatial, grad = _widen(channel_filter), _widen(spatial_filter), _widen(grad_output)
    height, width = grad_output.shape[-2:]
    grad_padded = torch.zeros_like(padded)
    grad_channel = torch.zeros_like(channel)
    grad_spatial = torch.zeros_like(spatial)
    size = channel_filter.shape[-1]
    taps = size * size
    heads = spatial_filter.shape[1] // taps
    for tap, rows, columns in _taps(size, height, width, stride, dilation):
        weight = _combined(channel, spatial, tap, combine)
        if needs[0]:
            grad_padded[:, :, rows, columns] += (weight * _by_head(grad, heads)).flatten(1, 2)
        grad_weight = _by_head(padded[:, :, rows, columns] * grad, heads)
        if needs[1]:
            per_pixel = grad_weight * _spatial_tap(spatial, tap, taps) if combine == "mul" else grad_weight
            grad_channel[:, :, tap // size, tap % size] = per_pixel.sum((-2, -1)).flatten(1)
        if needs[2]:
            per_channel = grad_weight
            if combine == "mul":
                per_channel = grad_weight * _by_head(_channel_tap(channel, tap), heads)
            grad_spatial[:, tap::taps] = per_channel.sum(2)
    bottom, right = padding + input.shape[-2], padding + input.shape[-1]
    return (
        grad_padded[:, :, padding:bottom, padding:right].to(input.dtype) if needs[0] else None,
        grad_channel.to(channel_filter.dtype) if needs[1] else None,
        grad_spatial.to(spatial_filter.dtype) if needs[2] else None,
    )


def _widen(tensor: Tensor) -> Tensor:
    """Half types accumulate in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _taps(size: int, height: int, width: int, stride: int, dilation: int) -> Iterator[tuple[int, slice, slice]]:
    """Yields each tap's index and the rows and columns of the padded input that it reads."""
    for tap in range(size * size):
        top, left = tap // size * dilation, tap % size * dilation
        rows = slice(top, top + (height - 1) * stride + 1, stride)
        columns = slice(left, left + (width - 1) * stride + 1, stride)
        yield tap, rows, columns


def _channel_tap(channel: Tensor, tap: int) -> Tensor:
    """(B, C, 1, 1): one tap of the channel filter."""
    return channel.flatten(2)[:, :, tap, None, None]


def _spatial_tap(spatial: Tensor, tap: int, taps: int) -> Tensor:
    """(B, G, 1, Ho, Wo): one tap of every head's spatial filter."""
    return spatial[:, tap::taps].unsqueeze(2)


def _combined(channel: Tensor, spatial: Tensor, tap: int, combine: str) -> Tensor:
    """(B, G, C/G, Ho, Wo): one tap of the combined filter."""
    size = channel.shape[-1]
    per_pixel = _spatial_tap(spatial, tap, size * size)
    per_channel = _by_head(_channel_tap(channel, tap), per_pixel.shape[1])
    return per_channel * per_pixel if combine == "mul" else per_channel + per_pixel


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """(B, C, H, W) -> (B, G, C/G, H, W)."""
    return cast(Tensor, tensor.unflatten(1, (heads, tensor.shape[1] // heads)))
