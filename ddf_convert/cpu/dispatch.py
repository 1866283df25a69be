"""Numba kernels of the DDF operator on the CPU: from tensors to addresses, tiles and threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddf_convert import reference
from ddf_convert.cpu import kernels_nchw, kernels_nhwc
from ddf_convert.cpu.jit_cache import unusable, usable
from ddf_convert.cpu.thread_pool import run
from ddf_convert.reference.checks import Geometry, memory_format, output_shape

__all__ = ["backward", "forward", "unusable", "usable"]

# For each dtype, a scalar whose type says how elements are stored (see dtypes.py), and the dtype of sums.
_STORED_AS = {
    torch.float32: (np.float32(0), torch.float32),
    torch.float64: (np.float64(0), torch.float64),
    torch.float16: (np.uint16(0), torch.float32),
    torch.bfloat16: (np.int16(0), torch.float32),
}

# Sizes of tiles, measured best on x86 with 32 KiB of L1 and 512 KiB of L2 cache a core.
_PIXELS_PER_TILE = 512  # contiguous: the spatial filters of as many pixels stay in L1
_CHANNELS_PER_ITEM = 32
_BLOCK_LANES = 16  # a block of channels is a multiple of any vector's lanes
_WINDOW_BYTES = 400 * 1024  # channels_last: what the rows under a window may take of L2
_LEAST_ITEMS = 8  # to share among threads


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    norm_scale: float | None = None,
) -> Tensor:
    """Computes :func:`ddf_convert.ops.ddf` of arguments that have been checked."""
    if norm_scale is not None:
        taps = channel_filter.shape[-1] ** 2
        spatial_filter = reference.filter_norm(spatial_filter, taps, norm_scale).to(input.dtype)
    call = _Call(input, channel_filter, spatial_filter, geometry)
    shape = output_shape(input, spatial_filter, geometry.upscale_factor)
    output = torch.empty(shape, dtype=input.dtype, memory_format=call.layout)
    if output.numel():
        tile_rows, chunk = call.tiling(*call.out_size, span=(call.size - 1) * geometry.dilation, step=geometry.stride)
        call.run(
            call.kernels.forward,
            call.items(call.out_size[0], tile_rows, chunk),
            (output, call.input, call.channel_filter, call.spatial_filter),
            tile_rows,
            chunk,
        )
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients by (input, channel_filter, spatial_filter), None where not needed."""
    call = _Call(input, channel_filter, spatial_filter, geometry)
    grad_output = grad_output.contiguous(memory_format=call.layout)
    grad_input = _grad_input(call, grad_output) if needs[0] else None
    grad_channel = grad_spatial = None
    if needs[1] or needs[2]:
        grad_channel, grad_spatial = _grad_filters(call, grad_output)
    return grad_input, grad_channel if needs[1] else None, grad_spatial if needs[2] else None


def _grad_input(call: _Call, grad_output: Tensor) -> Tensor:
    batch, channels, height, width = call.input.shape
    # A gradient for each filter of a pixel, added up below.
    shape = (batch * call.filters, channels, height, width)
    gradient = torch.empty(shape, dtype=call.input.dtype, memory_format=call.layout)
    if gradient.numel() == 0:
        return torch.empty_like(call.input, memory_format=call.layout)
    # The kernel tiles the rows, and the columns, of one phase of the padded input (see inner_loops.py).
    stride, padding, dilation, *_ = call.geometry
    rows, columns = ((size + padding - 1) // stride + 1 - padding // stride for size in (height, width))
    tile_rows, chunk = call.tiling(rows, columns, span=(call.size - 1) * dilation // stride, step=1)
    call.run(
        call.kernels.grad_input,
        call.items(rows, tile_rows, chunk),
        (gradient, grad_output, call.channel_filter, call.spatial_filter),
        tile_rows,
        chunk,
    )
    if call.filters == 1:
        return gradient
    total = torch.empty_like(call.input, memory_format=call.layout)
    return torch.sum(gradient.unflatten(0, (batch, call.filters)), 1, out=total)


def _grad_filters(call: _Call, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    grad_spatial = torch.empty_like(call.spatial_filter, memory_format=call.layout)
    if grad_output.numel() == 0:
        return torch.zeros_like(call.channel_filter), grad_spatial.zero_()
    span, step = (call.size - 1) * call.geometry.dilation, call.geometry.stride
    tile_rows, chunk = call.tiling(*call.out_size, span=span, step=step)
    # Items cannot be split by channel, over which the spatial filter's gradient is summed: small tiles instead.
    height, images = call.out_size[0], call.batch * call.filters * call.heads
    tile_rows = min(tile_rows, max(1, height * images // _LEAST_ITEMS))
    tiles = -(-height // tile_rows)
    parts = torch.empty((tiles, *call.channel_filter.shape), dtype=call.sums)
    call.run(
        call.kernels.grad_filters,
        images * tiles,
        (parts, grad_spatial, grad_output, call.input, call.channel_filter, call.spatial_filter),
        tile_rows,
        *((chunk,) if call.kernels is kernels_nhwc else ()),
        call.batch,
        _STORED_AS[call.sums][0],
        work=2 * call.work,
    )
    # The tiles, and so the order of this sum, depend on the shapes alone: results repeat on any number of threads.
    return parts.sum(0).to(call.channel_filter.dtype), grad_spatial


class _Call:
    """One call of the operator: its tensors as the kernels read them, and the numbers that all kernels take."""

    def __init__(self, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, geometry: Geometry) -> None:
        self.geometry = geometry
        self.layout = memory_format(input)
        self.input = input.contiguous(memory_format=self.layout)
        self.channel_filter = channel_filter.contiguous()
        self.spatial_filter = spatial_filter.contiguous(memory_format=self.layout)
        self.kernels: Any = kernels_nhwc if self.layout == torch.channels_last else kernels_nchw
        self.like, self.sums = _STORED_AS[input.dtype]
        self.batch, self.channels, height, width = input.shape
        self.out_size: tuple[int, int] = spatial_filter.shape[2:]  # type: ignore[assignment]
        self.size = channel_filter.shape[-1]
        self.filters = geometry.upscale_factor**2
        self.heads = spatial_filter.shape[1] // (self.filters * self.size**2)
        stride, padding, dilation, combine, factor = geometry
        self.work = self.batch * self.filters * self.channels * self.out_size[0] * self.out_size[1] * self.size**2
        self.numbers: tuple[Any, ...] = (
            *(self.channels, height, width, *self.out_size, self.heads),
            *(self.size, stride, padding, dilation, combine == "add", factor),
        )

    def run(self, kernel: Any, items: int, tensors: tuple[Tensor, ...], *numbers: Any, work: int | None = None) -> None:
        """Runs a kernel on all items; ``work`` is in multiply-accumulates, by default those of one pass."""
        addresses = (tensor.data_ptr() for tensor in tensors)
        run(kernel, items, self.work if work is None else work, *addresses, *self.numbers, *numbers, self.like)

    def tiling(self, rows: int, columns: int, span: int, step: int) -> tuple[int, int]:
        """Returns the rows of a tile and the channels of an item, for maps of ``rows`` x ``columns``.

        A tile reads ``step`` rows for each of its own, and ``span`` more.
        """
        per_head = self.channels // self.heads
        if self.kernels is kernels_nchw:
            return min(rows, max(8, _PIXELS_PER_TILE // (columns + span))), min(per_head, _CHANNELS_PER_ITEM)
        chunk = min(256, -(-per_head // _BLOCK_LANES) * _BLOCK_LANES)
        while chunk > 64 and (step + span) * columns * chunk * 4 > _WINDOW_BYTES:
            chunk = max(64, chunk // 2 // _BLOCK_LANES * _BLOCK_LANES)
        return min(rows, 8), chunk

    def items(self, rows: int, tile_rows: int, chunk: int) -> int:
        """Returns the number of independent items: tiles of each head's chunks of channels."""
        images = self.batch * self.filters * self.heads
        return images * -(-rows // tile_rows) * -(-(self.channels // self.heads) // chunk)
