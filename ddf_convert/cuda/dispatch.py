"""From tensors to launches: allocates what comes out, and says which tensors a kernel works on."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ddf_convert.arguments import DTYPES
from ddf_convert.cuda import grid
from ddf_convert.cuda.grid import Geometry, Launch
from ddf_convert.cuda.variants import Variant
from ddf_convert.reference import shuffle, unshuffle

_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
_WIDEST = 16  # bytes of the widest load


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    layout: torch.memory_format,
    norm_scale: float | None = None,
    upscale_factor: int = 1,
) -> Tensor:
    """See :func:`ddf_convert.ops.ddf`; the arguments have been checked. The output has ``layout``.

    Args:
        input: As there.
        channel_filter: As there.
        spatial_filter: As there.
        stride: As there.
        padding: As there.
        dilation: As there.
        combine: As there.
        layout: Of the output: that of the input.
        norm_scale: Apply FilterNorm with this scale to the spatial filter first; None: take it as it is.
        upscale_factor: As there.
    """
    shape = (*channel_filter.shape[:2], *spatial_filter.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if output.numel() == 0:
        return shuffle(output, upscale_factor).contiguous(memory_format=layout)
    filters = _dense(channel_filter, spatial_filter, layout)
    input = input.contiguous(memory_format=layout)
    geometry = _geometry(input, *filters, stride, padding, dilation, combine, layout)
    if geometry.is_fast:
        launch = grid.window(geometry, gradient=False, normalise=norm_scale is not None)
        _start(launch, output, input, *filters, 1.0 if norm_scale is None else norm_scale)
        return shuffle(output, upscale_factor)
    if norm_scale is not None:
        filters = filters[0], filter_norm(filters[1], geometry.size**2, norm_scale, layout)
    _start(grid.plain(geometry, "forward", output.numel()), output, input, *filters)
    return shuffle(output, upscale_factor)


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
    layout: torch.memory_format,
    upscale_factor: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (input, channel_filter, spatial_filter); those not needed have no elements.

    The arguments have been checked. The gradients of the maps have ``layout``.
    """
    channel_filter, spatial_filter = _dense(channel_filter, spatial_filter, layout)
    tensors = (
        unshuffle(grad_output, upscale_factor).contiguous(memory_format=layout),
        input.contiguous(memory_format=layout),
        channel_filter,
        spatial_filter,
    )
    geometry = _geometry(*tensors[1:], stride, padding, dilation, combine, layout, tensors[0])
    made: list[Tensor | None] = [None, None, None]
    if needs[0]:
        made[0] = _grad_input(geometry, *tensors, layout)
    if needs[1] or needs[2]:
        if grad_output.numel() == 0:
            made[1:] = torch.zeros_like(channel_filter), torch.zeros_like(spatial_filter, memory_format=layout)
        elif geometry.is_fast:
            made[1:] = _grad_filters(geometry, *tensors)
        else:
            made[1:] = _grad_filters_plain(geometry, *tensors, layout, needs)
    grad_input, grad_channel, grad_spatial = (
        input.new_empty(0) if gradient is None or not needed else gradient
        for gradient, needed in zip(made, needs, strict=True)
    )
    return grad_input, grad_channel, grad_spatial


def filter_norm(filters: Tensor, taps: int, scale: float, layout: torch.memory_format) -> Tensor:
    """FilterNorm over the taps of (B, G*taps, H, W), in float32 (float64 for float64); keeps dtype and layout."""
    filters = filters.contiguous(memory_format=layout)
    result = torch.empty_like(filters, memory_format=layout)
    if result.numel():
        _start(_norm(filters, taps, layout, gradient=False), result, filters, scale)
    return result


def filter_norm_backward(grad: Tensor, filters: Tensor, taps: int, scale: float, layout: torch.memory_format) -> Tensor:
    """The gradient of the filters, given that of :func:`filter_norm`."""
    filters = filters.contiguous(memory_format=layout)
    result = torch.empty_like(filters, memory_format=layout)
    if result.numel():
        grad = grad.contiguous(memory_format=layout)
        _start(_norm(filters, taps, layout, gradient=True), result, grad, filters, scale)
    return result


def _norm(filters: Tensor, taps: int, layout: torch.memory_format, gradient: bool) -> Launch:
    shape = tuple(filters.shape)
    return grid.norm(_DTYPES[filters.dtype], gradient, layout == torch.channels_last, shape, taps)


def _grad_input(
    geometry: Geometry,
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    layout: torch.memory_format,
) -> Tensor:
    gradient = torch.empty_like(input, memory_format=layout)
    if gradient.numel() == 0:
        return gradient
    filters = channel_filter.shape[1] // input.shape[1]
    if filters > 1:  # a gradient for each filter of a pixel, added up below
        shape = (len(input), filters * input.shape[1], *input.shape[2:])
        total, gradient = gradient, torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    tensors = (gradient, grad_output, channel_filter, spatial_filter)
    if geometry.is_fast:
        _start(grid.window(geometry, gradient=True, normalise=False), *tensors, 1.0)
    else:
        _start(grid.plain(geometry, "grad_input", gradient.numel()), *tensors)
    return gradient if filters == 1 else torch.sum(gradient.unflatten(1, (filters, input.shape[1])), 1, out=total)


def _grad_filters(
    geometry: Geometry, grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor
) -> list[Tensor]:
    """Both gradients in one pass: the kernel writes parts, which are added up here."""
    launch, spans, chunks = grid.filter_gradients(geometry)
    sums = torch.float64 if input.dtype == torch.float64 else torch.float32
    channel_parts = input.new_empty((spans, *channel_filter.shape), dtype=sums)
    batch, taps, height, width = spatial_filter.shape
    shape = (height, width, taps) if geometry.channels_last else (taps, height, width)
    spatial_parts = input.new_empty((chunks, batch, *shape), dtype=sums)
    _start(launch, channel_parts, spatial_parts, grad_output, input, channel_filter, spatial_filter)
    grad_channel, grad_spatial = (
        (parts[0] if len(parts) == 1 else parts.sum(0)).to(input.dtype) for parts in (channel_parts, spatial_parts)
    )
    return [grad_channel, grad_spatial.permute(0, 3, 1, 2) if geometry.channels_last else grad_spatial]


def _grad_filters_plain(
    geometry: Geometry,
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    layout: torch.memory_format,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """The gradients that are needed; the other tensors are not to be looked at."""
    grad_channel = torch.empty_like(channel_filter)
    grad_spatial = torch.empty_like(spatial_filter, memory_format=layout)
    if needs[1]:
        launch = grid.plain(geometry, "grad_channel", grad_channel.numel())
        _start(launch, grad_channel, grad_output, input, spatial_filter)
    if needs[2]:
        launch = grid.plain(geometry, "grad_spatial", grad_spatial.numel())
        _start(launch, grad_spatial, grad_output, input, channel_filter)
    return [grad_channel, grad_spatial]


def _dense(channel_filter: Tensor, spatial_filter: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """The filters as the kernels read them."""
    return channel_filter.contiguous(), spatial_filter.contiguous(memory_format=layout)


def _geometry(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    layout: torch.memory_format,
    *others: Tensor,
) -> Geometry:
    """``others`` are further maps that the kernels read."""
    addresses = input.data_ptr() | spatial_filter.data_ptr()
    for other in others:
        addresses |= other.data_ptr()
    size = channel_filter.shape[-1]
    batch, source_channels, height, width = input.shape
    _, filter_channels, out_height, out_width = spatial_filter.shape
    return Geometry(
        _DTYPES[input.dtype],
        combine == "add",
        layout == torch.channels_last,
        addresses % _WIDEST == 0,
        batch,
        channel_filter.shape[1],
        source_channels,
        filter_channels // (size * size),
        height,
        width,
        out_height,
        out_width,
        size,
        stride,
        padding,
        dilation,
        multiprocessors(input.device),
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the simulator, which has none, a few."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _start(launch: Launch, *arguments: Any) -> None:
    """Starts a kernel; its device is that of the first argument."""
    device: torch.device = arguments[0].device
    _run(launch.variant, device, launch.blocks, (*arguments, *launch.numbers))


def _run(variant: Variant, device: torch.device, blocks: int, arguments: tuple[Any, ...]) -> None:
    if device.type == "cuda":
        from ddf_convert.cuda import launch

        launch.run(variant, device.index, blocks, arguments)
    else:
        from ddf_convert.cuda import simulated

        simulated.simulate(variant, blocks, arguments)
