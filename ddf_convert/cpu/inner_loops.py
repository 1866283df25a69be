"""The index and vector arithmetic that the CPU kernels of both layouts share.

*Phases*: taps are sorted by their position modulo the stride, so that strided maps are read with unit steps.

*Blocked filters*: one of the two filters varies along the vectors, the other is constant over a call. Along the pixels
of a contiguous row the spatial filter varies; along the channels of a channels_last pixel, the channel filter. All taps
of a vector of the varying filter stand together, ``blocked[(block * taps + tap) * LANES + lane]``, and need one
pointer. ``weights[tap]`` is the constant filter.

*Rows*: a call works on ``rows`` rows of ``vectors`` vectors. Vector v starts at element ``min(v * LANES, last)`` of its
row: with ``last`` = width - LANES the last vector of a row overlaps the one before, and none reaches past the row.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ddf_convert.cpu.simd import data, lanes, load, splat, store, total, zeros


@njit
def ceil_div(value, divisor):
    """Returns value / divisor, rounded up, for any sign of value."""
    return -(-value // divisor)


@njit
def tap_lists(table, size, stride):
    """Returns pointers to the lists of :func:`tap_table`: order, starts, down, right, and room for offsets.

    ``order`` has the K*K taps, those of the first phase first. ``starts`` has s*s + 1 numbers: where the taps of each
    phase begin in ``order``. ``down`` and ``right`` are the rows and columns by which each tap is shifted in its phase.
    """
    taps = size * size
    down = table + taps
    right = down + taps
    offsets = right + taps
    return table, offsets + taps, down, right, offsets


@njit
def tap_table(size, stride, dilation):
    """Lists the taps phase by phase; the caller keeps the array alive while it uses its :func:`tap_lists`."""
    taps = size * size
    table = np.zeros(4 * taps + stride * stride + 1, np.int64)
    order, starts, down, right, _ = tap_lists(data(table), size, stride)
    found = 0
    for phase in range(stride * stride):
        for tap in range(taps):
            row, column = tap // size * dilation, tap % size * dilation
            if row % stride == phase // stride and column % stride == phase % stride:
                order[found] = tap
                down[found] = row // stride
                right[found] = column // stride
                found += 1
        starts[phase + 1] = found
    return table


@njit
def fine_pixel(image, row, column, height, width, factor, filter):
    """Returns the index, among the pixels of all images, of a filter's result in maps upscaled by ``factor``.

    ``height`` and ``width`` are the sizes before upscaling; filter ``dy * factor + dx`` makes the pixels
    (factor * row + dy, factor * column + dx).
    """
    fine_row = (image * height + row) * factor + filter // factor
    return (fine_row * width + column) * factor + filter % factor


@njit
def valid_range(first, step, size, count):
    """Returns the range of k < count for which 0 <= first + k * step < size."""
    low = min(count, max(0, ceil_div(-first, step)))
    return low, max(low, min(count, ceil_div(size - first, step)))


@njit
def filter_rows(out, out_pitch, out_last, blocked, features, pitch, weights, offsets, taps, rows, vectors, last, add):
    """Sums combine(weights[tap], blocked[tap]) * features[offsets[tap]] over the taps, for every element of ``out``.

    Rows of ``out`` are ``out_pitch`` apart, rows of ``features`` ``pitch``. Takes nine taps at a time, then one at a
    time. Vectors of ``out`` may overlap (``out_last`` as ``last``) only if :func:`pass_count` is 1.
    """
    done = 0
    while done + 9 <= taps:
        _filter_nine(
            out, out_pitch, out_last, blocked, features, pitch, weights + done, offsets + done,
            taps, done, rows, vectors, last, add,
        )  # fmt: skip
        done += 9
    while done < taps:
        _filter_one(
            out, out_pitch, out_last, blocked, features, pitch, weights[done], offsets[done],
            taps, done, rows, vectors, last, add,
        )  # fmt: skip
        done += 1


@njit
def pass_count(taps):
    """Returns how often :func:`filter_rows` goes over its output."""
    return taps // 9 + taps % 9


@njit
def _filter_nine(
    out, out_pitch, out_last, blocked, features, pitch, weights, offsets, taps, first, rows, vectors, last, add
):
    width = lanes(weights[0])
    w0, w1, w2 = splat(weights[0]), splat(weights[1]), splat(weights[2])
    w3, w4, w5 = splat(weights[3]), splat(weights[4]), splat(weights[5])
    w6, w7, w8 = splat(weights[6]), splat(weights[7]), splat(weights[8])
    f0, f1, f2 = features + offsets[0], features + offsets[1], features + offsets[2]
    f3, f4, f5 = features + offsets[3], features + offsets[4], features + offsets[5]
    f6, f7, f8 = features + offsets[6], features + offsets[7], features + offsets[8]
    block = blocked + first * width
    for row in range(rows):
        for vector in range(vectors):
            within = min(vector * width, last)
            at = row * pitch + within
            if add:
                value = (w0 + load(block, 0)) * load(f0, at)
                value = value + (w1 + load(block, width)) * load(f1, at)
                value = value + (w2 + load(block, 2 * width)) * load(f2, at)
                value = value + (w3 + load(block, 3 * width)) * load(f3, at)
                value = value + (w4 + load(block, 4 * width)) * load(f4, at)
                value = value + (w5 + load(block, 5 * width)) * load(f5, at)
                value = value + (w6 + load(block, 6 * width)) * load(f6, at)
                value = value + (w7 + load(block, 7 * width)) * load(f7, at)
                value = value + (w8 + load(block, 8 * width)) * load(f8, at)
            else:
                value = (w0 * load(block, 0)) * load(f0, at)
                value = value + (w1 * load(block, width)) * load(f1, at)
                value = value + (w2 * load(block, 2 * width)) * load(f2, at)
                value = value + (w3 * load(block, 3 * width)) * load(f3, at)
                value = value + (w4 * load(block, 4 * width)) * load(f4, at)
                value = value + (w5 * load(block, 5 * width)) * load(f5, at)
                value = value + (w6 * load(block, 6 * width)) * load(f6, at)
                value = value + (w7 * load(block, 7 * width)) * load(f7, at)
                value = value + (w8 * load(block, 8 * width)) * load(f8, at)
            place = row * out_pitch + min(vector * width, out_last)
            if first:
                value = value + load(out, place)
            store(out, place, value)
            block = block + taps * width


@njit
def _filter_one(
    out, out_pitch, out_last, blocked, features, pitch, weight, offset, taps, tap, rows, vectors, last, add
):
    width = lanes(weight)
    constant = splat(weight)
    block = blocked + tap * width
    for row in range(rows):
        for vector in range(vectors):
            within = min(vector * width, last)
            varying = load(block, 0)
            combined = constant + varying if add else constant * varying
            value = combined * load(features, offset + row * pitch + within)
            place = row * out_pitch + min(vector * width, out_last)
            if tap:
                value = value + load(out, place)
            store(out, place, value)
            block = block + taps * width


@njit
def filter_gradients(
    grad_weights, grad_blocked, blocked, features, pitch, grad, weights, offsets, taps, rows, vectors, last, add
):  # fmt: skip
    """Adds to the gradients of both filters, given the gradient of the output of :func:`filter_rows`.

    ``grad`` is blocked as a filter of one tap is, and zero in lanes that are past the row or repeat another vector's.
    Takes three taps at a time, then one at a time.
    """
    done = 0
    while done + 3 <= taps:
        _gradients_of_three(
            grad_weights + done, grad_blocked, blocked, features, pitch, grad, weights + done, offsets + done,
            taps, done, rows, vectors, last, add,
        )  # fmt: skip
        done += 3
    while done < taps:
        _gradients_of_one(
            grad_weights + done, grad_blocked, blocked, features, pitch, grad, weights[done], offsets[done],
            taps, done, rows, vectors, last, add,
        )  # fmt: skip
        done += 1


@njit
def _gradients_of_three(
    grad_weights, grad_blocked, blocked, features, pitch, grad, weights, offsets, taps, first, rows, vectors, last, add
):  # fmt: skip
    width = lanes(weights[0])
    w0, w1, w2 = splat(weights[0]), splat(weights[1]), splat(weights[2])
    f0, f1, f2 = features + offsets[0], features + offsets[1], features + offsets[2]
    g0 = g1 = g2 = zeros(weights[0])
    at = first * width
    place = 0
    for row in range(rows):
        for vector in range(vectors):
            q = row * pitch + min(vector * width, last)
            gradient = load(grad, place)
            d0, d1, d2 = gradient * load(f0, q), gradient * load(f1, q), gradient * load(f2, q)
            if add:
                g0, g1, g2 = g0 + d0, g1 + d1, g2 + d2
            else:
                g0 = g0 + d0 * load(blocked, at)
                g1 = g1 + d1 * load(blocked, at + width)
                g2 = g2 + d2 * load(blocked, at + 2 * width)
                d0, d1, d2 = d0 * w0, d1 * w1, d2 * w2
            store(grad_blocked, at, load(grad_blocked, at) + d0)
            store(grad_blocked, at + width, load(grad_blocked, at + width) + d1)
            store(grad_blocked, at + 2 * width, load(grad_blocked, at + 2 * width) + d2)
            at += taps * width
            place += width
    grad_weights[0] += total(g0)
    grad_weights[1] += total(g1)
    grad_weights[2] += total(g2)


@njit
def _gradients_of_one(
    grad_weights, grad_blocked, blocked, features, pitch, grad, weight, offset, taps, tap, rows, vectors, last, add
):  # fmt: skip
    width = lanes(weight)
    constant = splat(weight)
    sums = zeros(weight)
    at = tap * width
    place = 0
    for row in range(rows):
        for vector in range(vectors):
            product = load(grad, place) * load(features, offset + row * pitch + min(vector * width, last))
            if add:
                sums = sums + product
            else:
                sums = sums + product * load(blocked, at)
                product = product * constant
            store(grad_blocked, at, load(grad_blocked, at) + product)
            at += taps * width
            place += width
    grad_weights[0] += total(sums)
