"""Kernels for contiguous (B, C, H, W) maps: vectors run along the pixels of a row.

A kernel works on tiles of rows. It copies a tile of a plane into zero-padded scratch, where every tap finds a pixel,
and filters it row by row. The spatial filters of a tile are blocked (see inner_loops.py) once for all channels of a
head. Tensors come as addresses; the type of the scalar ``like`` says how elements are stored (see dtypes.py).
"""

from __future__ import annotations

from numba import njit

from ddf_convert.cpu.dtypes import clear, is_direct, output_or_line, read, scratch, write
from ddf_convert.cpu.inner_loops import (
    ceil_div,
    filter_gradients,
    filter_rows,
    fine_pixel,
    pass_count,
    tap_lists,
    tap_table,
    valid_range,
)
from ddf_convert.cpu.jit_cache import kernel
from ddf_convert.cpu.simd import data, keep_alive, lanes, pointer, prefetch

SLACK = 16  # elements that a vector may reach past a row; none has more lanes


@njit
def _load_tile(tile, source, height, width, top, stride, padding, rows, columns, starts, phase_size):
    """Copies the rows of a plane that an output tile starting at row ``top`` reads into the phases of ``tile``.

    Pixels outside the plane are not written: the tile has been cleared, and they are the same for all channels.
    """
    for phase in range(stride * stride):
        if starts[phase] == starts[phase + 1]:
            continue  # no tap reads it
        left = phase % stride - padding
        low, high = valid_range(left, stride, width, columns)
        above = top * stride + phase // stride - padding
        first_row, last_row = valid_range(above, stride, height, rows)
        line = tile + (phase * phase_size + low)
        origin = source + (above * width + left + low * stride)
        for row in range(first_row, last_row):
            read(line + row * columns, origin + row * stride * width, stride, high - low)


@njit
def _place_taps(offsets, starts, down, right, stride, phase_size, columns):
    """Sets where each tap reads in a tile of :func:`_load_tile`, relative to its output pixel."""
    for phase in range(stride * stride):
        for place in range(starts[phase], starts[phase + 1]):
            offsets[place] = phase * phase_size + down[place] * columns + right[place]


@njit
def _block(blocked, line, row, width, vectors, last, taps, place):
    """Blocks a row of one tap's filters, given in ``line``."""
    lane = lanes(line[0])
    for vector in range(vectors):
        within = min(vector * lane, last)
        block = blocked + ((row * vectors + vector) * taps + place) * lane
        for k in range(min(lane, width - within)):
            block[k] = line[within + k]


@njit
def _write_blocked(target, step, line, low, high, vectors, last):
    """target[x * step] = the element x of a row given as whole vectors, the last of which starts at ``last``."""
    lane = lanes(line[0])
    shared = (vectors - 1) * lane  # elements before the last vector's own
    middle = max(low, min(high, shared))
    write(target + low * step, step, line + low, middle - low)
    write(target + middle * step, step, line + (middle + shared - last), high - middle)


@njit
def _block_spatial(blocked, line, source, taps, width, plane, rows, vectors, last, order):
    """Blocks ``rows`` rows of the spatial filters of one head; ``source`` is the first row of its first tap."""
    for place in range(taps):
        for row in range(rows):
            read(line, source + order[place] * plane + row * width, 1, width)
            _block(blocked, line, row, width, vectors, last, taps, place)


@njit
def _reorder(weights, line, source, order, taps):
    """weights[place] = source[order[place]], by way of ``line``."""
    read(line, source, 1, taps)
    for place in range(taps):
        weights[place] = line[order[place]]


@kernel
def forward(
    first, last, output_at, input_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add, factor,
    tile_rows, chunk, like,
):  # fmt: skip
    """Items first to last of B * G * tiles * s*s * chunks, a chunk being some channels of a head."""
    output, source = pointer(output_at, like), pointer(input_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    extent = (size - 1) * dilation
    reach = extent // stride
    columns = out_width + reach
    phase_size = (tile_rows + reach) * columns
    table = tap_table(size, stride, dilation)
    order, starts, down, right, offsets = tap_lists(data(table), size, stride)
    _place_taps(offsets, starts, down, right, stride, phase_size, columns)

    lane = lanes(scratch(1, like)[0])
    vectors = ceil_div(out_width, lane)
    last_vector = max(0, out_width - lane)
    tile_size = stride * stride * phase_size + SLACK
    line_size = tile_rows * vectors * lane
    memory = scratch(tile_size + line_size * (taps + 1) + out_width + 2 * taps, like)
    tile = data(memory)
    blocked = tile + tile_size
    line = blocked + line_size * taps
    spatial_line = line + line_size
    weights = spatial_line + out_width
    read_weights = weights + taps

    tiles = ceil_div(out_height, tile_rows)
    per_head = channels // heads
    chunks = ceil_div(per_head, chunk)
    filters = factor * factor
    straight = factor == 1 and is_direct(output, line) and out_width >= lane and pass_count(taps) == 1
    pitch, line_last = (out_width, last_vector) if straight else (vectors * lane, vectors * lane)
    blocked_for = -1
    for item in range(first, last):
        group = item // chunks  # the filters of a tile one after the other: what they read and write stays in the cache
        filter = group % filters
        top = group // filters % tiles * tile_rows
        image_head = group // filters // tiles
        filter_head = (image_head // heads * filters + filter) * heads + image_head % heads
        rows = min(tile_rows, out_height - top)
        if group != blocked_for:
            _block_spatial(
                blocked, spatial_line, spatial_filter + (filter_head * taps * out_height + top) * out_width,
                taps, out_width, out_height * out_width,
                rows, vectors, last_vector, order,
            )  # fmt: skip
            clear(tile, tile_size)
            blocked_for = group
        start = item % chunks * chunk
        for index in range(start, min(start + chunk, per_head)):
            at = image_head * per_head + index  # image * channels + channel
            _reorder(weights, read_weights, channel_filter + (filter_head * per_head + index) * taps, order, taps)
            plane = source + at * height * width
            _load_tile(tile, plane, height, width, top, stride, padding, rows + reach, columns, starts, phase_size)
            target = output + fine_pixel(at, top, 0, out_height, out_width, factor, filter)
            next_plane = plane + (height + top * stride - padding) * width
            prefetch(next_plane, (rows * stride + extent) * width)
            prefetch(target, rows * out_width)
            filter_rows(
                output_or_line(straight, target, line), pitch, line_last, blocked, tile, columns,
                weights, offsets, taps, rows, vectors, last_vector, add,
            )  # fmt: skip
            if not straight:
                for row in range(rows):
                    begin = target + row * filters * out_width
                    _write_blocked(begin, factor, line + row * pitch, 0, out_width, vectors, last_vector)
    keep_alive(table)
    keep_alive(memory)


@kernel
def grad_input(
    first, last, grad_input_at, grad_output_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add, factor,
    tile_rows, chunk, like,
):  # fmt: skip
    """Items first to last of B * G * tiles * s*s * chunks; a tile is of rows of the phases of the padded input.

    The gradient is (B, s*s, C, H, W): one for each filter of a pixel.
    """
    target, source = pointer(grad_input_at, like), pointer(grad_output_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    reach = (size - 1) * dilation // stride
    zero = padding // stride  # the first row, and column, of each phase that holds the input
    phase_rows = (height + padding - 1) // stride + 1 - zero
    phase_columns = (width + padding - 1) // stride + 1 - zero
    columns = phase_columns + reach
    table = tap_table(size, stride, dilation)
    order, starts, down, right, offsets = tap_lists(data(table), size, stride)
    for place in range(taps):
        offsets[place] = (reach - down[place]) * columns + reach - right[place]

    lane = lanes(scratch(1, like)[0])
    vectors = ceil_div(phase_columns, lane)
    last_vector = max(0, phase_columns - lane)
    tile_size = (tile_rows + reach) * columns + SLACK
    line_size = tile_rows * vectors * lane
    memory = scratch(tile_size + line_size * (taps + 1) + phase_columns + 2 * taps, like)
    tile = data(memory)
    blocked = tile + tile_size
    line = blocked + line_size * taps
    spatial_line = line + line_size
    weights = spatial_line + phase_columns
    read_weights = weights + taps

    tiles = ceil_div(phase_rows, tile_rows)
    per_head = channels // heads
    chunks = ceil_div(per_head, chunk)
    filters = factor * factor
    straight = is_direct(target, line) and stride == 1 and width >= lane and pass_count(taps) == 1
    pitch, line_last = (width, last_vector) if straight else (vectors * lane, vectors * lane)
    blocked_for = -1
    for item in range(first, last):
        group = item // chunks
        filter = group % filters
        top = zero + group // filters % tiles * tile_rows
        image_head = group // filters // tiles
        filter_head = (image_head // heads * filters + filter) * heads + image_head % heads
        rows = min(tile_rows, zero + phase_rows - top)
        if group != blocked_for:
            # Each tap's spatial filters, moved to the input pixels that the tap reads; zero where there are none.
            clear(blocked, line_size * taps)
            for phase in range(stride * stride):
                begin, inner = starts[phase], starts[phase + 1] - starts[phase]
                for place in range(begin, begin + inner):
                    left = zero - right[place]
                    low, high = valid_range(left, 1, out_width, phase_columns)
                    clear(spatial_line, phase_columns)
                    first_row, last_row = valid_range(top - down[place], 1, out_height, rows)
                    for row in range(first_row, last_row):
                        y = (filter_head * taps + order[place]) * out_height + top - down[place] + row
                        read(spatial_line + low, spatial_filter + (y * out_width + left + low), 1, high - low)
                        _block(
                            blocked + begin * line_size, spatial_line, row, phase_columns, vectors, last_vector,
                            inner, place - begin,
                        )  # fmt: skip
            clear(tile, tile_size)
            blocked_for = group
        start = item % chunks * chunk
        for index in range(start, min(start + chunk, per_head)):
            at = filter_head * per_head + index
            _reorder(weights, read_weights, channel_filter + at * taps, order, taps)
            low, high = valid_range(zero - reach, 1, out_width, columns)
            first_row, last_row = valid_range(top - reach, 1, out_height, rows + reach)
            plane = image_head * per_head + index
            origin = source + fine_pixel(
                plane, top - reach, zero - reach + low, out_height, out_width, factor, filter
            )  # fmt: skip
            for row in range(first_row, last_row):
                read(tile + (row * columns + low), origin + row * filters * out_width, factor, high - low)
            prefetch(origin + filters * out_height * out_width, (rows + reach) * out_width)  # the next plane
            for phase in range(stride * stride):
                begin, inner = starts[phase], starts[phase + 1] - starts[phase]
                left = zero * stride + phase % stride - padding
                above = top * stride + phase // stride - padding
                low, high = valid_range(left, stride, width, phase_columns)
                first_row, last_row = valid_range(above, stride, height, rows)
                origin_out = target + ((at * height + above) * width + left)
                if inner == 0:
                    clear(line, line_size)
                filter_rows(
                    output_or_line(straight, origin_out, line), pitch, line_last, blocked + begin * line_size, tile,
                    columns, weights + begin, offsets + begin, inner, rows, vectors, last_vector, add,
                )  # fmt: skip
                if inner == 0 or not straight:
                    for row in range(first_row, last_row):
                        _write_blocked(
                            origin_out + row * stride * width, stride, line + row * pitch, low, high,
                            vectors, last_vector,
                        )  # fmt: skip
    keep_alive(table)
    keep_alive(memory)


@kernel
def grad_filters(
    first, last, grad_channel_at, grad_spatial_at, grad_output_at, input_at, channel_at, spatial_at,
    channels, height, width, out_height, out_width, heads, size, stride, padding, dilation, add, factor,
    tile_rows, batch, sums_like, like,
):  # fmt: skip
    """Items first to last of B * s*s * G * tiles.

    The gradient of the channel filter is a sum over tiles: each tile writes its part, (tiles, B, s*s*C, K, K) at
    ``grad_channel_at``, stored like ``sums_like``. That of the spatial filter is whole.
    """
    parts, grad_spatial = pointer(grad_channel_at, sums_like), pointer(grad_spatial_at, like)
    grad_output, source = pointer(grad_output_at, like), pointer(input_at, like)
    channel_filter, spatial_filter = pointer(channel_at, like), pointer(spatial_at, like)
    taps = size * size
    extent = (size - 1) * dilation
    reach = extent // stride
    columns = out_width + reach
    phase_size = (tile_rows + reach) * columns
    table = tap_table(size, stride, dilation)
    order, starts, down, right, offsets = tap_lists(data(table), size, stride)
    _place_taps(offsets, starts, down, right, stride, phase_size, columns)

    lane = lanes(scratch(1, like)[0])
    vectors = ceil_div(out_width, lane)
    last_vector = max(0, out_width - lane)
    repeated = (vectors - 1) * lane - last_vector  # lanes of a row's last vector that the one before has too
    pitch = vectors * lane
    tile_size = stride * stride * phase_size + SLACK
    line_size = tile_rows * pitch
    memory = scratch(tile_size + line_size * (2 * taps + 1) + out_width + 3 * taps, like)
    tile = data(memory)
    blocked = tile + tile_size
    grad_blocked = blocked + line_size * taps
    line = grad_blocked + line_size * taps
    spatial_line = line + line_size
    weights = spatial_line + out_width
    grad_weights = weights + taps
    read_weights = grad_weights + taps

    tiles = ceil_div(out_height, tile_rows)
    per_head = channels // heads
    filters = factor * factor
    for item in range(first, last):
        top = item % tiles * tile_rows
        filter_head = item // tiles
        filter = filter_head // heads % filters
        image_head = filter_head // heads // filters * heads + filter_head % heads
        rows = min(tile_rows, out_height - top)
        filters_at = (filter_head * taps * out_height + top) * out_width
        _block_spatial(
            blocked, spatial_line, spatial_filter + filters_at, taps, out_width, out_height * out_width,
            rows, vectors, last_vector, order,
        )  # fmt: skip
        clear(tile, tile_size)
        clear(grad_blocked, line_size * taps)
        for index in range(per_head):
            at = filter_head * per_head + index
            _reorder(weights, read_weights, channel_filter + at * taps, order, taps)
            clear(grad_weights, taps)
            here = image_head * per_head + index
            plane = source + here * height * width
            _load_tile(tile, plane, height, width, top, stride, padding, rows + reach, columns, starts, phase_size)
            origin = grad_output + fine_pixel(here, top, 0, out_height, out_width, factor, filter)
            for row in range(rows):
                # All but the last vector's own elements, then that vector, its repeated lanes zero.
                begin = line + row * pitch
                own = out_width - (vectors - 1) * lane
                origin_row = origin + row * filters * out_width
                read(begin, origin_row, factor, out_width - own)
                read(begin + (pitch - lane + repeated), origin_row + (out_width - own) * factor, factor, own)
            next_plane = plane + (height + top * stride - padding) * width
            prefetch(next_plane, (rows * stride + extent) * width)
            prefetch(origin + filters * out_height * out_width, rows * out_width)
            filter_gradients(
                grad_weights, grad_blocked, blocked, tile, columns, line,
                weights, offsets, taps, rows, vectors, last_vector, add,
            )  # fmt: skip
            part = parts + (item % tiles * batch * filters * channels + at) * taps
            for place in range(taps):
                part[order[place]] = grad_weights[place]
        for place in range(taps):
            target = grad_spatial + (filters_at + order[place] * out_height * out_width)
            for row in range(rows):
                for x in range(out_width):
                    vector = min(x // lane, vectors - 1)
                    within = x - vector * lane + (repeated if vector == vectors - 1 else 0)
                    spatial_line[x] = grad_blocked[((row * vectors + vector) * taps + place) * lane + within]
                write(target + row * out_width, 1, spatial_line, out_width)
    keep_alive(table)
    keep_alive(memory)
