"""Kernels for channels_last maps, (B, H, W, C) in memory: vectors run along the channels of a pixel.

A kernel works on tiles of rows and blocks of channels of one head. It copies a tile into zero-padded scratch and filters
it pixel by pixel; the channel filters of the block are blocked (see taps.py) and stay in the cache.

Tensors come as addresses; ``like`` is a scalar that says how their elements are stored (see storage.py). Spatial filters
are channels_last too, (B, Ho, Wo, G*K*K) in memory; channel filters are (B, C, K, K).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ddf_convert.cpu.geometry import ceil_div, tap_phases
from ddf_convert.cpu.simd import data, keep, lanes, pointer
from ddf_convert.cpu.storage import choose, clear, direct, read, scratch, write
from ddf_convert.cpu.taps import filter_gradients, filter_rows


@njit
def _load_pixels(tile, source, image, height, width, channels, first_channel, count, room, top, left, rows, columns):
    """Copies ``count`` channels of a rectangle of pixels; zeros outside the image. Pixels stand ``room`` apart."""
    for row in range(rows):
        y = top + row
        for column in range(columns):
            x = left + column
            at = (row * columns + column) * room
            if 0 <= y < height and 0 <= x < width:
                read(tile + at, source + (((image * height + y) * width + x) * channels + first_channel), 1, count)
            else:
                clear(tile + at, count)


@njit
def _block_channels(blocked, filters, source, taps, count, order, start, stop):
    """Blocks the taps ``order[start:stop]`` of the channel filters of ``count`` channels."""
    lane = lanes(filters[0])
    inner = stop - start
    for channel in range(count):
        read(filters, source + channel * taps, 1, taps)
        for place in range(inner):
            blocked[(channel // lane * inner + place) * lane + channel % lane] = filters[order[start + place]]


@njit(nogil=True, cache=True)
def forward(
    first, last, output_at, input_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add,
    tile_rows, chunk, like,
):  # fmt: skip
    """Items first to last of B * G * chunks * tiles, a chunk being some channels of a head."""
    output, source = pointer(output_at, like), pointer(input_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    rows_read = (tile_rows - 1) * stride + (size - 1) * dilation + 1
    columns_read = (out_width - 1) * stride + (size - 1) * dilation + 1
    order_, offsets_ = np.arange(taps), np.zeros(taps, np.int64)
    order, offsets = data(order_), data(offsets_)
    for tap in range(taps):
        offsets[tap] = (tap // size * columns_read + tap % size) * dilation * chunk
    tile_size = rows_read * columns_read * chunk
    memory = scratch(tile_size + chunk * (taps + 1) + taps, like)
    tile = data(memory)
    blocked = tile + tile_size
    line = blocked + chunk * taps
    weights = line + chunk
    lane = lanes(line[0])

    tiles = (out_height + tile_rows - 1) // tile_rows
    per_head = channels // heads
    chunks = (per_head + chunk - 1) // chunk
    for item in range(first, last):
        top = item % tiles * tile_rows
        group = item // tiles
        start = group % chunks * chunk
        image, head = group // chunks // heads, group // chunks % heads
        rows = min(tile_rows, out_height - top)
        count = min(chunk, per_head - start)
        channel = head * per_head + start
        vectors = ceil_div(count, lane)
        straight = direct(output, line) and count == vectors * lane
        _block_channels(blocked, weights, channel_filter + (image * channels + channel) * taps, taps, count, order, 0, taps)
        _load_pixels(
            tile, source, image, height, width, channels, channel, count, chunk,
            top * stride - padding, -padding, (rows - 1) * stride + (size - 1) * dilation + 1, columns_read,
        )  # fmt: skip
        for row in range(rows):
            for x in range(out_width):
                pixel = (image * out_height + top + row) * out_width + x
                read(weights, spatial_filter + (pixel * heads + head) * taps, 1, taps)
                base = tile + (row * columns_read + x) * stride * chunk
                target = output + (pixel * channels + channel)
                filter_rows(
                    choose(straight, target, line), 0, chunk, blocked, base, 0, weights, offsets, taps, 1, vectors, chunk, add
                )  # fmt: skip
                if not straight:
                    write(target, 1, line, count)
    for array in (order_, offsets_):
        keep(array)
    keep(memory)


@njit(nogil=True, cache=True)
def grad_input(
    first, last, grad_input_at, grad_output_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add,
    tile_rows, chunk, like,
):  # fmt: skip
    """Items first to last of B * G * chunks * tiles; a tile is of rows of the phases of the padded input."""
    target, source = pointer(grad_input_at, like), pointer(grad_output_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    reach = (size - 1) * dilation // stride
    zero = padding // stride  # the first row, and column, of each phase that holds the input
    phase_rows = (height + padding - 1) // stride + 1 - zero
    phase_columns = (width + padding - 1) // stride + 1 - zero
    columns = phase_columns + reach
    order_, starts_, down, right = tap_phases(size, stride, dilation)
    offsets_ = np.zeros(taps, np.int64)
    order, starts, offsets = data(order_), data(starts_), data(offsets_)
    for place in range(taps):
        offsets[place] = ((reach - down[place]) * columns + reach - right[place]) * chunk
    tile_size = (tile_rows + reach) * columns * chunk
    memory = scratch(tile_size + chunk * (taps + 1) + taps + 1, like)
    tile = data(memory)
    blocked = tile + tile_size
    line = blocked + chunk * taps
    weights = line + chunk
    lane = lanes(line[0])

    tiles = (phase_rows + tile_rows - 1) // tile_rows
    per_head = channels // heads
    chunks = (per_head + chunk - 1) // chunk
    for item in range(first, last):
        top = zero + item % tiles * tile_rows
        group = item // tiles
        start = group % chunks * chunk
        image, head = group // chunks // heads, group // chunks % heads
        rows = min(tile_rows, zero + phase_rows - top)
        count = min(chunk, per_head - start)
        channel = head * per_head + start
        vectors = ceil_div(count, lane)
        straight = direct(target, line) and count == vectors * lane
        filters_at = (image * channels + channel) * taps
        for phase in range(stride * stride):
            _block_channels(
                blocked + starts[phase] * chunk, weights, channel_filter + filters_at, taps, count, order, starts[phase], starts[phase + 1]
            )
        _load_pixels(
            tile, source, image, out_height, out_width, channels, channel, count, chunk,
            top - reach, zero - reach, rows + reach, columns,
        )  # fmt: skip
        for row in range(rows):
            for column in range(phase_columns):
                for phase in range(stride * stride):
                    v = (top + row) * stride + phase // stride - padding
                    u = (zero + column) * stride + phase % stride - padding
                    if v < 0 or v >= height or u < 0 or u >= width:
                        continue
                    begin = starts[phase]
                    inner = starts[phase + 1] - begin
                    for place in range(inner):
                        y = top + row - down[begin + place]
                        x = zero + column - right[begin + place]
                        weights[place] = 0
                        if 0 <= y < out_height and 0 <= x < out_width:
                            pixel = (image * out_height + y) * out_width + x
                            read(weights + place, spatial_filter + ((pixel * heads + head) * taps + order[begin + place]), 1, 1)
                    base = tile + (row * columns + column) * chunk
                    gradient = target + (((image * height + v) * width + u) * channels + channel)
                    if inner == 0:
                        clear(line, count)
                    filter_rows(
                        choose(straight, gradient, line), 0, chunk, blocked + begin * chunk, base, 0,
                        weights, offsets + begin, inner, 1, vectors, chunk, add,
                    )  # fmt: skip
                    if inner == 0 or not straight:
                        write(gradient, 1, line, count)
    for array in (order_, starts_, offsets_):
        keep(array)
    keep(memory)


@njit(nogil=True, cache=True)
def grad_filters(
    first, last, grad_channel_at, grad_spatial_at, grad_output_at, input_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add,
    tile_rows, chunk, batch, sums_like, like,
):  # fmt: skip
    """Items first to last of B * G * tiles.

    The gradient of the channel filter is a sum over tiles: each tile writes its part, (tiles, B, C, K, K) at
    ``grad_channel_at``, stored like ``sums_like``. That of the spatial filter is whole.
    """
    parts, grad_spatial = pointer(grad_channel_at, sums_like), pointer(grad_spatial_at, like)
    grad_output, source = pointer(grad_output_at, like), pointer(input_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    rows_read = (tile_rows - 1) * stride + (size - 1) * dilation + 1
    columns_read = (out_width - 1) * stride + (size - 1) * dilation + 1
    order_, offsets_ = np.arange(taps), np.zeros(taps, np.int64)
    order, offsets = data(order_), data(offsets_)
    for tap in range(taps):
        offsets[tap] = (tap // size * columns_read + tap % size) * dilation * chunk
    tile_size = rows_read * columns_read * chunk
    grad_weights_size = tile_rows * out_width * taps
    memory = scratch(tile_size + chunk * (2 * taps + 1) + taps + grad_weights_size, like)
    tile = data(memory)
    blocked = tile + tile_size
    grad_blocked = blocked + chunk * taps
    line = grad_blocked + chunk * taps
    weights = line + chunk
    grad_weights = weights + taps
    lane = lanes(line[0])

    tiles = (out_height + tile_rows - 1) // tile_rows
    per_head = channels // heads
    for item in range(first, last):
        top = item % tiles * tile_rows
        image, head = item // tiles // heads, item // tiles % heads
        rows = min(tile_rows, out_height - top)
        clear(grad_weights, grad_weights_size)
        for start in range(0, per_head, chunk):
            count = min(chunk, per_head - start)
            channel = head * per_head + start
            filters_at = (image * channels + channel) * taps
            _block_channels(blocked, weights, channel_filter + filters_at, taps, count, order, 0, taps)
            clear(grad_blocked, chunk * taps)
            clear(line, chunk)
            _load_pixels(
                tile, source, image, height, width, channels, channel, count, chunk,
                top * stride - padding, -padding, (rows - 1) * stride + (size - 1) * dilation + 1, columns_read,
            )  # fmt: skip
            for row in range(rows):
                for x in range(out_width):
                    pixel = (image * out_height + top + row) * out_width + x
                    read(weights, spatial_filter + (pixel * heads + head) * taps, 1, taps)
                    read(line, grad_output + (pixel * channels + channel), 1, count)
                    filter_gradients(
                        grad_weights + (row * out_width + x) * taps, grad_blocked, blocked,
                        tile + (row * columns_read + x) * stride * chunk, 0, line,
                        weights, offsets, taps, 1, ceil_div(count, lane), chunk, add,
                    )  # fmt: skip
            part = (item % tiles * batch * channels + image * channels + channel) * taps
            for index in range(count):
                for tap in range(taps):
                    at = (index // lane * taps + tap) * lane + index % lane
                    parts[part + index * taps + tap] = grad_blocked[at]
        for row in range(rows):
            for x in range(out_width):
                pixel = (image * out_height + top + row) * out_width + x
                write(grad_spatial + (pixel * heads + head) * taps, 1, grad_weights + (row * out_width + x) * taps, taps)
    for array in (order_, offsets_):
        keep(array)
    keep(memory)
