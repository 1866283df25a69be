"""DDF and FilterNorm in plain PyTorch: the specification of the kernels, and the fallback on any device.

DDF loops over the taps and works on shifted views, so nothing of size ``C * K * K * H * W`` is stored. All operators
are standard ones, so they can be exported.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, equation 1 (``mul``), the authors' second variant
(``add``), and section 3.2 (FilterNorm).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.reference.checks import Geometry, memory_format

EPSILON = 1e-10  # the authors' constant, added to the standard deviation
LEAST_SQUARE = 1e-36  # the least sum of squares: lost in the epsilon, it keeps the derivatives of its root finite


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    norm_scale: float | None = None,
) -> Tensor:
    """Applies the combined filter at every pixel of every channel; see :func:`ddf_convert.ops.ddf`.

    Returns:
        (B, C, s*Ho, s*Wo), dtype of ``input``. Half types are normalized and accumulate in float32.
    """
    size = channel_filter.shape[-1]
    if norm_scale is not None:
        spatial_filter = filter_norm(spatial_filter, size**2, norm_scale)
    heads = spatial_filter.shape[1] // size**2
    windows = _windows(_by_head(_padded(input, geometry), heads), size, geometry)
    per_channel = _channel_taps(channel_filter, heads)
    per_pixel = _spatial_taps(spatial_filter, size**2)
    output = torch.zeros_like(windows[..., 0, 0])
    for tap, (one, other) in enumerate(zip(per_channel, per_pixel, strict=True)):
        weight = one * other if geometry.combine == "mul" else one + other
        output = output + weight * windows[..., tap // size, tap % size]
    output = output.flatten(1, 2)
    return shuffle(output, geometry.upscale_factor).to(input.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of :func:`forward` by (input, channel_filter, spatial_filter), None where not needed."""
    size = channel_filter.shape[-1]
    taps = size**2
    heads = spatial_filter.shape[1] // taps
    padded = _padded(input, geometry)
    windows = _windows(_by_head(padded, heads), size, geometry)
    per_channel = _channel_taps(channel_filter, heads)
    per_pixel = _spatial_taps(spatial_filter, taps)
    grad = _by_head(unshuffle(_widen(grad_output), geometry.upscale_factor), heads)
    grad_padded = torch.zeros_like(padded)
    grad_windows = _windows(_by_head(grad_padded, heads), size, geometry)
    grad_channel = torch.zeros_like(_widen(channel_filter))
    grad_spatial = torch.zeros_like(_widen(spatial_filter))
    is_product = geometry.combine == "mul"
    for tap, (one, other) in enumerate(zip(per_channel, per_pixel, strict=True)):
        row, column = tap // size, tap % size
        if needs[0]:
            weight = one * other if is_product else one + other
            grad_windows[..., row, column] += weight * grad
        grad_weight = windows[..., row, column] * grad
        if needs[1]:
            terms = grad_weight * other if is_product else grad_weight
            grad_channel[:, :, row, column] = terms.sum((-2, -1)).flatten(1)
        if needs[2]:
            terms = grad_weight * one if is_product else grad_weight
            grad_spatial[:, tap::taps] = terms.sum(2)
    channels, padding = input.shape[1], geometry.padding
    bottom, right = padding + input.shape[-2], padding + input.shape[-1]
    grad_input = grad_padded[:, :, padding:bottom, padding:right].unflatten(1, (geometry.upscale_factor**2, channels))
    return (
        grad_input.sum(1).to(input.dtype) if needs[0] else None,
        grad_channel.to(channel_filter.dtype) if needs[1] else None,
        grad_spatial.to(spatial_filter.dtype) if needs[2] else None,
    )


def shuffle(maps: Tensor, factor: int) -> Tensor:
    """(B, s*s*C, H, W) -> (B, C, s*H, s*W) in the same layout; all channels of one map come before those of the next.

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
    """Standardizes every filter over its taps; see :func:`ddf_convert.ops.filter_norm`.

    Returns:
        The shape and dtype of ``filters``; float32 for half types, in which the epsilon would be 0.
    """
    centered, square = _centered(_by_tap(filters, taps))
    deviation = (square / (taps - 1)).sqrt()
    return (centered * (scale / (deviation + EPSILON))).flatten(1, 2)


def filter_norm_backward(grad_output: Tensor, filters: Tensor, taps: int, scale: float) -> Tensor:
    """Returns the gradient of :func:`filter_norm` by the filters, in its dtype.

    A deviation of 0 has the derivative 0, as for ``torch.std``, so the gradient is finite.
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
    """Returns the gradient of ``<cotangent, filter_norm_backward(grad_output, filters)>`` by the filters.

    The gradient by ``grad_output`` is ``filter_norm_backward(cotangent, filters)``: FilterNorm's Jacobian is symmetric.
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
    """(B, G*taps, H, W) -> (B, G, taps, H, W), half types in float32."""
    return cast(Tensor, _widen(filters).unflatten(1, (filters.shape[1] // taps, taps)))


def _centered(filters: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the filters minus their mean, and the sum of the squares of that, (B, G, 1, H, W)."""
    # Taps that are all equal become 0 here, exactly. A mean alone would be off by its rounding, and dividing by the
    # deviation would make that as large as a filter.
    shifted = filters - filters[:, :, :1]
    centered = shifted - shifted.mean(2, keepdim=True)
    # torch.std, which makes one pass over the taps, takes many times as long on a CPU.
    return centered, (centered * centered).sum(2, keepdim=True).clamp_min(LEAST_SQUARE)


def _slopes(square: Tensor, taps: int) -> tuple[Tensor, Tensor]:
    """Returns 1 / (s + epsilon) and 1 / ((s + epsilon) * s * (taps - 1)), with s the deviation."""
    deviation = (square / (taps - 1)).sqrt()
    inverse = 1 / (deviation + EPSILON)
    return inverse, inverse * deviation / square


def _widen(tensor: Tensor) -> Tensor:
    """Returns half types as float32, in which they accumulate."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _padded(input: Tensor, geometry: Geometry) -> Tensor:
    """Returns the input with its border of zeros, once for each filter of a pixel: (B, s*s*C, H + 2P, W + 2P)."""
    return F.pad(_widen(input), (geometry.padding,) * 4).repeat(1, geometry.upscale_factor**2, 1, 1)


def _windows(padded: Tensor, size: int, geometry: Geometry) -> Tensor:
    """Returns a view (..., Ho, Wo, K, K) of (..., H, W): the pixel that each tap of each output reads."""
    # Views need no arithmetic with sizes: symbolic ones stay as they are in an export.
    span = geometry.dilation * (size - 1) + 1
    view = padded.unfold(-2, span, geometry.stride).unfold(-2, span, geometry.stride)
    return view[..., :: geometry.dilation, :: geometry.dilation]


def _channel_taps(channel_filter: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Returns the taps of the channel filters, (B, G, C/G, 1, 1) each."""
    return _by_head(_widen(channel_filter), heads).flatten(3)[..., None, None].unbind(3)


def _spatial_taps(spatial_filter: Tensor, taps: int) -> tuple[Tensor, ...]:
    """Returns the taps of the spatial filters, (B, G, 1, Ho, Wo) each."""
    return _by_tap(spatial_filter, taps)[:, :, None].unbind(3)


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    """(B, C, H, W) -> (B, G, C/G, H, W)."""
    return cast(Tensor, tensor.unflatten(1, (heads, tensor.shape[1] // heads)))
