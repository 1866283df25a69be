"""Where each tap of a filter stands in a padded, strided map.

A map is held in s * s phases, s being the stride: phase (r, r') holds the padded rows r, r + s, r + 2s, ... and the
columns likewise. Then a tap at distance o reads phase o % s, shifted by o // s, with unit stride, whatever the stride.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit
def ceil_div(value, divisor):
    """Value / divisor, rounded up, for any sign of value."""
    return -(-value // divisor)


@njit
def tap_phases(size, stride, dilation):
    """Lists the taps phase by phase.

    Returns:
        order: (K*K,), the taps, those of the first phase first.
        starts: (s*s + 1,), where each phase's taps begin in ``order``.
        down: (K*K,), rows by which each tap of ``order`` is shifted in its phase.
        right: (K*K,), columns likewise.
    """
    order = np.zeros(size * size, np.int64)
    starts = np.zeros(stride * stride + 1, np.int64)
    down, right = np.zeros(size * size, np.int64), np.zeros(size * size, np.int64)
    found = 0
    for phase in range(stride * stride):
        for tap in range(size * size):
            row, column = tap // size * dilation, tap % size * dilation
            if row % stride == phase // stride and column % stride == phase % stride:
                order[found] = tap
                down[found] = row // stride
                right[found] = column // stride
                found += 1
        starts[phase + 1] = found
    return order, starts, down, right


@njit
def fine_pixel(image, row, column, height, width, factor, filter):
    """Where, among the pixels of all images, a filter's result for a pixel is in maps that are upscaled by ``factor``.

    ``height`` and ``width`` are those of the map before; filter ``dy * factor + dx`` makes the pixels
    (factor * row + dy, factor * column + dx).
    """
    fine_row = (image * height + row) * factor + filter // factor
    return (fine_row * width + column) * factor + filter % factor


@njit
def inside(first, step, size, count):
    """The range of k < count for which 0 <= first + k * step < size."""
    low = min(count, max(0, ceil_div(-first, step)))
    return low, max(low, min(count, ceil_div(size - first, step)))
