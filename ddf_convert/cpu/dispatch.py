"""Numba CPU kernels of the DDF operator: from tensors to addresses, tiles and threads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddf_convert.cpu import kernels_nchw, kernels_nhwc
from ddf_convert.cpu.jit_cache import unusable, usable
from ddf_convert.cpu.thread_pool import run
from ddf_convert.reference.checks import output_shape

__all__ = ["backward", "forward", "unusable", "usable"]

# A scalar that tells the kernels how elements are stored, and the dtype in which they calculate (see storage.py).
_STORED_AS = {
    torch.float32: (np.float32(0), torch.float32),
    torch.float64: (np.float64(0), torch.float64),
    torch.float16: (np.uint16(0), torch.float32),
    torch.bfloat16: (np.int16(0), torch.float32),
}

# Sizes of tiles, measured best on x86 with 32 KiB of L1 and 512 KiB of L2 cache a core.
_PIXELS_PER_TILE = 512  # contiguous: so many pixels' spatial filters stay in L1
_CHANNELS_PER_ITEM = 32
_BLOCK_LANES = 16  # a block of channels is a multiple of any vector's lanes
_WINDOW_BYTES = 400 * 1024  # channels_last: what the rows under a window may take of L2
_LEAST_ITEMS = 8  # to share among threads


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    layout: torch.memory_format,
    upscale_factor: int = 1,
) -> Tensor:
    """See :func:`ddf_convert.ops.ddf`; the arguments have been checked. The output has ``layout``."""
    shape = output_shape(input, spatial_filter, upscale_factor)
    output = torch.empty(shape, dtype=input.dtype, memory_format=layout)
    if output.numel() == 0:
        return output
    input = input.contiguous(memory_format=layout)
    channel_filter = channel_filter.contiguous()
    spatial_filter = spatial_filter.contiguous(memory_format=layout)
    call = _Call(input, channel_filter, spatial_filter, stride, padding, dilation, combine, layout, upscale_factor)
    height, width = spatial_filter.shape[-2:]
    tile_rows, chunk = call.tiling(height, width, span=(call.size - 1) * dilation, step=stride)
    run(
        call.kernels.forward,
        call.items(height, tile_rows, chunk),
        call.work,
        *_addresses(output, input, channel_filter, spatial_filter),
        *call.geometry,
        tile_rows,
        chunk,
        call.like,
    )
    return output


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
    grads = [input.new_empty(0) for _ in range(3)]
    grad_output = grad_output.contiguous(memory_format=layout)
    input = input.contiguous(memory_format=layout)
    channel_filter = channel_filter.contiguous()
    spatial_filter = spatial_filter.contiguous(memory_format=layout)
    call = _Call(input, channel_filter, spatial_filter, stride, padding, dilation, combine, layout, upscale_factor)
    if needs[0]:
        grads[0] = _grad_input(call, grad_output, input, channel_filter, spatial_filter)
    if needs[1] or needs[2]:
        grad_channel, grad_spatial = _grad_filters(call, grad_output, input, channel_filter, spatial_filter)
        if needs[1]:
            grads[1] = grad_channel
        if needs[2]:
            grads[2] = grad_spatial
    return grads[0], grads[1], grads[2]


def _grad_input(
    call: _Call, grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor
) -> Tensor:
    batch, channels, height, width = input.shape
    # A gradient for each filter of a pixel, added up below.
    gradient = torch.empty(
        (batch * call.filters, channels, height, width), dtype=input.dtype, memory_format=call.layout
    )
    if gradient.numel() == 0:
        return torch.empty_like(input, memory_format=call.layout)
    # The kernel tiles the rows, and the columns, of one phase of the padded input (see geometry.py).
    rows, columns = (
        (size + call.padding - 1) // call.stride + 1 - call.padding // call.stride for size in input.shape[-2:]
    )
    reach = (call.size - 1) * call.dilation // call.stride
    tile_rows, chunk = call.tiling(rows, columns, span=reach, step=1)
    run(
        call.kernels.grad_input,
        call.items(rows, tile_rows, chunk),
        call.work,
        *_addresses(gradient, grad_output, channel_filter, spatial_filter),
        *call.geometry,
        tile_rows,
        chunk,
        call.like,
    )
    if call.filters == 1:
        return gradient
    total = torch.empty_like(input, memory_format=call.layout)
    return torch.sum(gradient.unflatten(0, (batch, call.filters)), 1, out=total)


def _grad_filters(
    call: _Call, grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor
) -> tuple[Tensor, Tensor]:
    grad_spatial = torch.empty_like(spatial_filter, memory_format=call.layout)
    if grad_output.numel() == 0:
        return torch.zeros_like(channel_filter), grad_spatial.zero_()
    height, width = spatial_filter.shape[-2:]
    tile_rows, chunk = call.tiling(height, width, span=(call.size - 1) * call.dilation, step=call.stride)
    # Items cannot be split by channel here, over which the spatial filter's gradient is summed: small tiles instead.
    images = call.batch * call.filters * call.heads
    tile_rows = min(tile_rows, max(1, height * images // _LEAST_ITEMS))
    tiles = -(-height // tile_rows)
    parts = torch.empty((tiles, *channel_filter.shape), dtype=call.sums)
    run(
        call.kernels.grad_filters,
        images * tiles,
        2 * call.work,
        *_addresses(parts, grad_spatial, grad_output, input, channel_filter, spatial_filter),
        *call.geometry,
        tile_rows,
        *((chunk,) if call.kernels is kernels_nhwc else ()),
        call.batch,
        _STORED_AS[call.sums][0],
        call.like,
    )
    # The tiles depend on the shapes alone, and so does the order of this sum: results repeat on any number of threads.
    return parts.sum(0).to(channel_filter.dtype), grad_spatial


class _Call:
    """What all kernels of one call are told."""

    def __init__(
        self,
        input: Tensor,
        channel_filter: Tensor,
        spatial_filter: Tensor,
        stride: int,
        padding: int,
        dilation: int,
        combine: str,
        layout: torch.memory_format,
        upscale_factor: int,
    ) -> None:
        self.batch, self.channels, height, width = input.shape
        out_height, out_width = spatial_filter.shape[-2:]
        self.size = channel_filter.shape[-1]
        self.filters = upscale_factor**2
        self.heads = spatial_filter.shape[1] // (self.filters * self.size**2)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.layout = layout
        self.kernels: ModuleType = kernels_nhwc if layout == torch.channels_last else kernels_nchw
        self.like, self.sums = _STORED_AS[input.dtype]
        self.work = self.batch * self.filters * self.channels * out_height * out_width * self.size**2
        self.geometry: tuple[Any, ...] = (
            *(self.channels, height, width, out_height, out_width, self.heads),
            *(self.size, stride, padding, dilation, combine == "add", upscale_factor),
        )

    def tiling(self, rows: int, columns: int, span: int, step: int) -> tuple[int, int]:
        """Rows of a tile, and channels of an item, for maps of this size.

        Args:
            rows: Rows to tile.
            columns: Pixels of a row.
            span: Rows that a tile reads beyond its own.
            step: Rows that it reads for each of its own.
        """
        per_head = self.channels // self.heads
        if self.kernels is kernels_nchw:
            return min(rows, max(8, _PIXELS_PER_TILE // (columns + span))), min(per_head, _CHANNELS_PER_ITEM)
        chunk = min(256, -(-per_head // _BLOCK_LANES) * _BLOCK_LANES)
        while chunk > 64 and (step + span) * columns * chunk * 4 > _WINDOW_BYTES:
            chunk = max(64, chunk // 2 // _BLOCK_LANES * _BLOCK_LANES)
        return min(rows, 8), chunk

    def items(self, rows: int, tile_rows: int, chunk: int) -> int:
        """Independent items: tiles of each head's chunks of channels."""
        images = self.batch * self.filters * self.heads
        return images * -(-rows // tile_rows) * -(-(self.channels // self.heads) // chunk)


def _addresses(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)
