"""Kernels for channels_last maps, (B, H, W, C) in memory: vectors run along the channels of a pixel.

A kernel filters pixel by pixel, some channels of one head at a time, whose channel filters are blocked (see
inner_loops.py) and stay in the cache. Taps outside the map read a line of zeros. float32 and float64 maps are read in
place if the channels fill whole vectors; otherwise, and for half types, rows are first copied into scratch. Tensors
come as addresses; the type of the scalar ``like`` says how elements are stored (see dtypes.py). Spatial filters are
channels_last too, (B, Ho, Wo, G*K*K) in memory; channel filters are (B, C, K, K).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ddf_convert.cpu.dtypes import clear, is_direct, output_or_line, read, scratch, write
from ddf_convert.cpu.inner_loops import ceil_div, filter_gradients, filter_rows, fine_pixel, tap_lists, tap_table
from ddf_convert.cpu.jit_cache import kernel
from ddf_convert.cpu.simd import data, distance, keep_alive, lanes, pointer, prefetch

AHEAD = 8  # pixels to prefetch: the hardware follows none of the many streams of a window well


@njit
def _rows(
    tile, source, image, height, width, factor, filter, channels, channel, count, chunk, first_row, last_row
):  # fmt: skip
    """Returns some channels of the rows first_row to last_row of a map, in the type that the kernels calculate in.

    In a map that is upscaled by ``factor`` these are the pixels of one filter, a map of ``height`` x ``width``. The
    results are a pointer to the first channel of pixel (0, 0), from which only those rows may be read, and the elements
    from a row to the next and from a pixel to the next.
    """
    origin = source + (fine_pixel(image, 0, 0, height, width, factor, filter) * channels + channel)
    step = factor * channels
    if is_direct(source, tile) and count % lanes(tile[0]) == 0:  # vectors must not reach past the channels
        return output_or_line(True, origin, tile), factor * width * step, step
    first_row, last_row = max(0, first_row), min(height, last_row)
    for row in range(first_row, last_row):
        for column in range(width):
            place = ((row - first_row) * width + column) * chunk
            read(tile + place, origin + (row * factor * width + column) * step, 1, count)
    return output_or_line(False, origin, tile + -first_row * width * chunk), width * chunk, chunk


@njit
def _block_channels(blocked, filters, source, taps, count, order, start, stop):
    """Blocks the taps ``order[start:stop]`` of the channel filters of ``count`` channels."""
    lane = lanes(filters[0])
    inner = stop - start
    for channel in range(count):
        read(filters, source + channel * taps, 1, taps)
        for place in range(inner):
            blocked[(channel // lane * inner + place) * lane + channel % lane] = filters[order[start + place]]


@njit
def _window(offsets, inside, zeros, top, left, height, width, size, dilation):
    """Returns where the taps of a window read, relative to its first pixel: ``inside[tap]``, or else ``zeros``."""
    last = (size - 1) * dilation
    if 0 <= top < height - last and 0 <= left < width - last:
        return inside
    for i in range(size):
        row = top + i * dilation
        for j in range(size):
            column = left + j * dilation
            within = 0 <= row < height and 0 <= column < width
            offsets[i * size + j] = inside[i * size + j] if within else zeros
    return offsets


@kernel
def forward(
    first, last, output_at, input_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add, factor,
    tile_rows, chunk, like,
):  # fmt: skip
    """Items first to last of B * G * chunks * tiles * s*s, a chunk being some channels of a head."""
    output, source = pointer(output_at, like), pointer(input_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    extent = (size - 1) * dilation + 1
    table = np.arange(3 * taps)  # the taps in order, and room for two lists of offsets
    order = data(table)
    inside = order + taps
    offsets = inside + taps
    memory = scratch(((tile_rows - 1) * stride + extent) * width * chunk + chunk * (taps + 2) + taps, like)
    nothing = data(memory)  # a line of zeros
    blocked = nothing + chunk
    line = blocked + chunk * taps
    weights = line + chunk
    tile = weights + taps
    lane = lanes(line[0])

    tiles = ceil_div(out_height, tile_rows)
    per_head = channels // heads
    chunks = ceil_div(per_head, chunk)
    filters = factor * factor
    for item in range(first, last):
        filter = item % filters
        top = item // filters % tiles * tile_rows
        group = item // filters // tiles
        start = group % chunks * chunk
        image, head = group // chunks // heads, group // chunks % heads
        rows = min(tile_rows, out_height - top)
        count = min(chunk, per_head - start)
        channel = head * per_head + start
        vectors = ceil_div(count, lane)
        straight = is_direct(output, line) and count == vectors * lane
        channel_filters = channel_filter + ((image * filters + filter) * channels + channel) * taps
        _block_channels(blocked, weights, channel_filters, taps, count, order, 0, taps)
        above = top * stride - padding
        features, row_step, step = _rows(
            tile, source, image, height, width, 1, 0, channels, channel, count, chunk,
            above, above + (rows - 1) * stride + extent,
        )  # fmt: skip
        for tap in range(taps):
            inside[tap] = (tap // size * row_step + tap % size * step) * dilation
        for row in range(top, top + rows):
            for column in range(out_width):
                pixel = (image * out_height + row) * out_width + column
                read(weights, spatial_filter + ((pixel * filters + filter) * heads + head) * taps, 1, taps)
                y, x = row * stride - padding, column * stride - padding
                window = features + (y * row_step + x * step)
                places = _window(offsets, inside, distance(window, nothing), y, x, height, width, size, dilation)
                fine = fine_pixel(image, row, column, out_height, out_width, factor, filter)
                target = output + (fine * channels + channel)
                prefetch(window + ((extent - 1) * row_step + AHEAD * step), count)
                prefetch(target + factor * channels, count)
                filter_rows(
                    output_or_line(straight, target, line), 0, chunk, blocked, window, 0,
                    weights, places, taps, 1, vectors, chunk, add,
                )  # fmt: skip
                if not straight:
                    write(target, 1, line, count)
    keep_alive(table)
    keep_alive(memory)


@kernel
def grad_input(
    first, last, grad_input_at, grad_output_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add, factor,
    tile_rows, chunk, like,
):  # fmt: skip
    """Items first to last of B * G * chunks * tiles * s*s; a tile is of rows of the phases of the padded input.

    The gradient is (B, s*s, C, H, W): one for each filter of a pixel.
    """
    target, source = pointer(grad_input_at, like), pointer(grad_output_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    reach = (size - 1) * dilation // stride
    zero = padding // stride  # the first row, and column, of each phase that holds the input
    phase_rows = (height + padding - 1) // stride + 1 - zero
    phase_columns = (width + padding - 1) // stride + 1 - zero
    table = tap_table(size, stride, dilation)
    order, starts, down, right, offsets = tap_lists(data(table), size, stride)
    memory = scratch((tile_rows + reach) * out_width * chunk + chunk * (taps + 2) + taps, like)
    nothing = data(memory)  # a line of zeros
    blocked = nothing + chunk
    line = blocked + chunk * taps
    weights = line + chunk
    tile = weights + taps
    lane = lanes(line[0])

    tiles = ceil_div(phase_rows, tile_rows)
    per_head = channels // heads
    chunks = ceil_div(per_head, chunk)
    filters = factor * factor
    for item in range(first, last):
        filter = item % filters
        top = zero + item // filters % tiles * tile_rows
        group = item // filters // tiles
        start = group % chunks * chunk
        image, head = group // chunks // heads, group // chunks % heads
        rows = min(tile_rows, zero + phase_rows - top)
        count = min(chunk, per_head - start)
        channel = head * per_head + start
        vectors = ceil_div(count, lane)
        straight = is_direct(target, line) and count == vectors * lane
        filter_image = image * filters + filter
        for phase in range(stride * stride):
            _block_channels(
                blocked + starts[phase] * chunk, weights, channel_filter + (filter_image * channels + channel) * taps,
                taps, count, order, starts[phase], starts[phase + 1],
            )  # fmt: skip
        features, row_step, step = _rows(
            tile, source, image, out_height, out_width, factor, filter, channels, channel, count, chunk,
            top - reach, top + rows,
        )  # fmt: skip
        zeros = distance(features, nothing)
        for row in range(top, top + rows):
            for column in range(zero, zero + phase_columns):
                for phase in range(stride * stride):
                    v = row * stride + phase // stride - padding
                    u = column * stride + phase % stride - padding
                    if v < 0 or v >= height or u < 0 or u >= width:
                        continue
                    begin, inner = starts[phase], starts[phase + 1] - starts[phase]
                    for place in range(inner):
                        y, x = row - down[begin + place], column - right[begin + place]
                        if 0 <= y < out_height and 0 <= x < out_width:
                            pixel = (image * out_height + y) * out_width + x
                            spatial = ((pixel * filters + filter) * heads + head) * taps
                            read(weights + place, spatial_filter + (spatial + order[begin + place]), 1, 1)
                            offsets[place] = y * row_step + x * step
                        else:
                            weights[place] = 0
                            offsets[place] = zeros
                    gradient = target + (((filter_image * height + v) * width + u) * channels + channel)
                    prefetch(features + (row * row_step + (column + AHEAD) * step), count)
                    prefetch(gradient + channels, count)
                    if inner == 0:
                        clear(line, count)
                    filter_rows(
                        output_or_line(straight, gradient, line), 0, chunk, blocked + begin * chunk, features, 0,
                        weights, offsets, inner, 1, vectors, chunk, add,
                    )  # fmt: skip
                    if inner == 0 or not straight:
                        write(gradient, 1, line, count)
    keep_alive(table)
    keep_alive(memory)


@kernel
def grad_filters(
    first, last, grad_channel_at, grad_spatial_at, grad_output_at, input_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add, factor,
    tile_rows, chunk, batch, sums_like, like,
):  # fmt: skip
    """Items first to last of B * s*s * G * tiles.

    The gradient of the channel filter is a sum over tiles: each tile writes its part, (tiles, B, s*s*C, K, K) at
    ``grad_channel_at``, stored like ``sums_like``. That of the spatial filter is whole.
    """
    parts, grad_spatial = pointer(grad_channel_at, sums_like), pointer(grad_spatial_at, like)
    grad_output, source = pointer(grad_output_at, like), pointer(input_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    extent = (size - 1) * dilation + 1
    table = np.arange(3 * taps)  # the taps in order, and room for two lists of offsets
    order = data(table)
    inside = order + taps
    offsets = inside + taps
    grad_weights_size = tile_rows * out_width * taps
    tile_size = ((tile_rows - 1) * stride + extent) * width * chunk
    memory = scratch(tile_size + grad_weights_size + chunk * (2 * taps + 2) + taps, like)
    nothing = data(memory)  # a line of zeros
    blocked = nothing + chunk
    grad_blocked = blocked + chunk * taps
    line = grad_blocked + chunk * taps
    weights = line + chunk
    grad_weights = weights + taps
    tile = grad_weights + grad_weights_size
    lane = lanes(line[0])

    tiles = ceil_div(out_height, tile_rows)
    per_head = channels // heads
    filters = factor * factor
    for item in range(first, last):
        top = item % tiles * tile_rows
        filter_image, head = item // tiles // heads, item // tiles % heads
        image, filter = filter_image // filters, filter_image % filters
        rows = min(tile_rows, out_height - top)
        clear(grad_weights, grad_weights_size)
        for start in range(0, per_head, chunk):
            count = min(chunk, per_head - start)
            channel = head * per_head + start
            vectors = ceil_div(count, lane)
            channel_filters = channel_filter + (filter_image * channels + channel) * taps
            _block_channels(blocked, weights, channel_filters, taps, count, order, 0, taps)
            clear(grad_blocked, chunk * taps)
            clear(line, chunk)
            above = top * stride - padding
            features, row_step, step = _rows(
                tile, source, image, height, width, 1, 0, channels, channel, count, chunk,
                above, above + (rows - 1) * stride + extent,
            )  # fmt: skip
            for tap in range(taps):
                inside[tap] = (tap // size * row_step + tap % size * step) * dilation
            for row in range(rows):
                for column in range(out_width):
                    pixel = (image * out_height + top + row) * out_width + column
                    read(weights, spatial_filter + ((pixel * filters + filter) * heads + head) * taps, 1, taps)
                    fine = fine_pixel(image, top + row, column, out_height, out_width, factor, filter)
                    read(line, grad_output + (fine * channels + channel), 1, count)
                    y, x = above + row * stride, column * stride - padding
                    window = features + (y * row_step + x * step)
                    places = _window(offsets, inside, distance(window, nothing), y, x, height, width, size, dilation)
                    prefetch(window + ((extent - 1) * row_step + AHEAD * step), count)
                    prefetch(grad_output + ((fine + AHEAD * factor) * channels + channel), count)
                    filter_gradients(
                        grad_weights + (row * out_width + column) * taps, grad_blocked, blocked, window, 0, line,
                        weights, places, taps, 1, vectors, chunk, add,
                    )  # fmt: skip
            part = parts + ((item % tiles * batch * filters + filter_image) * channels + channel) * taps
            for index in range(count):
                for tap in range(taps):
                    part[index * taps + tap] = grad_blocked[(index // lane * taps + tap) * lane + index % lane]
        for row in range(rows):
            for column in range(out_width):
                pixel = (image * out_height + top + row) * out_width + column
                target = grad_spatial + ((pixel * filters + filter) * heads + head) * taps
                write(target, 1, grad_weights + (row * out_width + column) * taps, taps)
    keep_alive(table)
    keep_alive(memory)
