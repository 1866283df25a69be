"""DDF and FilterNorm in plain PyTorch: the specification, and the fallback on any device.

Every kernel of the package is compared with these functions. DDF loops over the taps and works on shifted views, so
nothing of size ``C * K * K * H * W`` is stored. They use standard operators only, so they can be exported.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, equation 1 (``mul``), the authors' second variant
(``add``), and section 3.2 (FilterNorm).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.reference.checks import memory_format

EPSILON = 1e-10  # the authors' constant, added to the standard deviation
LEAST_SQUARE = 1e-36  # the least sum of squares: lost in the epsilon, it keeps the derivatives of its root finite


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    upscale_factor: int = 1,
) -> Tensor:
    """Applies the combined filter at every pixel of every channel.

    With an ``upscale_factor`` s of more than 1 there are s*s filters for each, whose results are shuffled into a map s
    times as high and wide (DDF-Up); filter ``dy * s + dx`` makes the pixels (s*y + dy, s*x + dx).

    Args:
        input: (B, C, H, W).
        channel_filter: (B, s*s*C, K, K), all channels of the first filter, then those of the next.
        spatial_filter: (B, s*s*G*K*K, Ho, Wo), likewise; channel r belongs to head r // (C / G).
        stride: Step between output pixels, in input pixels.
        padding: Zeros around the input, in pixels.
        dilation: Distance between taps, in pixels.
        combine: "mul" or "add": how the two filters make one.
        upscale_factor: s.

    Returns:
        (B, C, s*Ho, s*Wo), dtype of ``input``. Half types accumulate in float32.
    """
    size = channel_filter.shape[-1]
    heads = spatial_filter.shape[1] // size**2
    padded = F.pad(_widen(input), (padding, padding, padding, padding)).repeat(1, upscale_factor**2, 1, 1)
    # Views all of them, whose sizes need no arithmetic: symbolic ones stay what they are when this is exported.
    windows = _windows(_by_head(padded, heads), size, stride, dilation)
    per_channel = _by_head(_widen(channel_filter), heads).flatten(3)[..., None, None].unbind(3)  # (B, G, C/G, 1, 1)
    per_pixel = _by_tap(spatial_filter, size**2)[:, :, None].unbind(3)  # (B, G, 1, Ho, Wo)
    output = torch.zeros_like(windows[..., 0, 0])
    for tap, (one, other) in enumerate(zip(per_channel, per_pixel, strict=True)):
        weight = one * other if combine == "mul" else one + other
        output = output + weight * windows[..., tap // size, tap % size]
    output = output.flatten(1, 2)
    return shuffle(output, upscale_factor).to(input.dtype)


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
    upscale_factor: int = 1,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of :func:`forward` with respect to its three tensors.

    Args:
        grad_output: (B, C, s*Ho, s*Wo), the gradient of the output.
        input: As in :func:`forward`.
        channel_filter: As in :func:`forward`.
        spatial_filter: As in :func:`forward`.
        stride: As in :func:`forward`.
        padding: As in :func:`forward`.
        dilation: As in :func:`forward`.
        combine: As in :func:`forward`.
        needs: Which of (input, channel_filter, spatial_filter) want a gradient.
        upscale_factor: As in :func:`forward`.

    Returns:
        The three gradients, each shaped and typed as its tensor; None where not wanted.
    """
    padded = F.pad(_widen(input), (padding, padding, padding, padding))
    padded = padded.repeat(1, upscale_factor**2, 1, 1)
    grad = unshuffle(_widen(grad_output), upscale_factor)
    channel, spatial = _widen(channel_filter), _widen(spatial_filter)
    height, width = grad.shape[-2:]
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
    grad_input = (
        grad_padded[:, :, padding:bottom, padding:right].unflatten(1, (upscale_factor**2, input.shape[1])).sum(1)
    )
    return (
        grad_input.to(input.dtype) if needs[0] else None,
        grad_channel.to(channel_filter.dtype) if needs[1] else None,
        grad_spatial.to(spatial_filter.dtype) if needs[2] else None,
    )


def shuffle(maps: Tensor, factor: int) -> Tensor:
    """(B, s*s*C, H, W), all channels of one map after the other's -> (B, C, s*H, s*W), in the layout that it has.

    ``torch.pixel_shuffle`` expects the maps of one channel side by side.
    """
    if factor == 1:
        return maps
    split = maps.unflatten(1, (factor, factor, maps.shape[1] // factor**2))  # (B, s, s, C, H, W)
    if memory_format(maps) == torch.channels_last:
        return cast(Tensor, split.permute(0, 4, 1, 5, 2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2))
    return cast(Tensor, split.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3))


def unshuffle(map: Tensor, factor: int) -> Tensor:
    """Undoes :func:`shuffle`."""
    if factor == 1:
        return map
    height, width = (size // factor for size in map.shape[2:])
    split = map.unflatten(3, (width, factor)).unflatten(2, (height, factor))  # (B, C, H, s, W, s)
    if memory_format(map) == torch.channels_last:
        return cast(Tensor, split.permute(0, 2, 4, 3, 5, 1).flatten(3, 5).permute(0, 3, 1, 2))
    return cast(Tensor, split.permute(0, 3, 5, 1, 2, 4).flatten(1, 3))


def filter_norm(filters: Tensor, taps: int, scale: float) -> Tensor:
    """Standardises every filter over its taps: subtracts the mean, divides by the deviation + 1e-10, times ``scale``.

    Args:
        filters: (B, G*taps, H, W).
        taps: Of one filter, 2 or more.
        scale: The deviation of the result.

    Returns:
        The shape and dtype of ``filters``; float32 for half types, in which the epsilon would be 0.
    """
    centered, square = _centered(_by_tap(filters, taps))
    deviation = (square / (taps - 1)).sqrt()
    return (centered * (scale / (deviation + EPSILON))).flatten(1, 2)


def filter_norm_backward(grad_output: Tensor, filters: Tensor, taps: int, scale: float) -> Tensor:
    """Gradient of :func:`filter_norm` with respect to the filters.

    A deviation of 0 has the derivative 0, as for ``torch.std``: so the gradient is finite.

    Args:
        grad_output: (B, G*taps, H, W), the gradient of the output.
        filters: As in :func:`filter_norm`.
        taps: As in :func:`filter_norm`.
        scale: As in :func:`filter_norm`.

    Returns:
        The shape and dtype of ``filters``; float32 for half types.
    """
    grad = _by_tap(grad_output, taps)
    centered, square = _centered(_by_tap(filters, taps))
    inverse, pull = _slopes(square, taps)
    along = (grad * centered).sum(2, keepdim=True) * pull
    gradient = (grad - grad.mean(2, keepdim=True)).addcmul_(centered, along, value=-1)
    return gradient.mul_(inverse * scale).flatten(1, 2)


def filter_norm_second_backward(
    cotangent: Tensor, grad_output: Tensor, filters: Tensor, taps: int, scale: float
) -> Tensor:
    """Gradient of ``<cotangent, filter_norm_backward(grad_output, filters)>`` with respect to the filters.

    That with respect to ``grad_output`` is ``filter_norm_backward(cotangent, filters)``: FilterNorm's Jacobian is
    symmetric.

    Args:
        cotangent: (B, G*taps, H, W), the gradient of the gradient.
        grad_output: As in :func:`filter_norm_backward`.
        filters: As in :func:`filter_norm`.
        taps: As in :func:`filter_norm`.
        scale: As in :func:`filter_norm`.

    Returns:
        The shape and dtype of ``filters``; float32 for half types.
    """
    grad, other = _by_tap(grad_output, taps), _by_tap(cotangent, taps)
    centered, square = _centered(_by_tap(filters, taps))
    inverse, pull = _slopes(square, taps)
    # With g and v for the two without their means, d for the centered filter: the scalar to differentiate is
    # scale * inverse * (<v, g> - pull * <v, d> * <d, g>), where inverse and pull depend on d through its length alone.
    grad, other = grad - grad.mean(2, keepdim=True), other - other.mean(2, keepdim=True)
    grad_along = (grad * centered).sum(2, keepdim=True)
    other_along = (other * centered).sum(2, keepdim=True)
    along = grad_along * other_along * (2 * pull + 1 / square) - (grad * other).sum(2, keepdim=True)
    gradient = centered * along - grad * other_along - other * grad_along
    return (gradient * (scale * inverse * pull)).flatten(1, 2)


def _by_tap(filters: Tensor, taps: int) -> Tensor:
    """(B, G*taps, H, W) -> (B, G, taps, H, W), wide enough to calculate in."""
    return cast(Tensor, _widen(filters).unflatten(1, (filters.shape[1] // taps, taps)))


def _centered(filters: Tensor) -> tuple[Tensor, Tensor]:
    """The filters without their mean, and the sum of its squares, (B, G, 1, H, W)."""
    # Taps that are all equal become 0 here, exactly. A mean alone would be off by its rounding, and dividing by the
    # deviation would make that as large as a filter.
    shifted = filters - filters[:, :, :1]
    centered = shifted - shifted.mean(2, keepdim=True)
    # torch.std, which makes one pass over the taps, takes many times as long on a CPU.
    return centered, (centered * centered).sum(2, keepdim=True).clamp_min(LEAST_SQUARE)


def _slopes(square: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """What derivatives are made of: with deviation s, 1 / (s + epsilon) and 1 / ((s + epsilon) * s * (taps - 1))."""
    deviation = (square / (taps - 1)).sqrt()
    inverse = 1 / (deviation + EPSILON)
    return inverse, inverse * deviation / square


def _widen(tensor: Tensor) -> Tensor:
    """Half types accumulate in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _windows(padded: Tensor, size: int, stride: int, dilation: int) -> Tensor:
    """(..., H, W) -> (..., Ho, Wo, K, K): what every tap of every output's window reads; a view."""
    span = dilation * (size - 1) + 1
    return padded.unfold(-2, span, stride).unfold(-2, span, stride)[..., ::dilation, ::dilation]


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
