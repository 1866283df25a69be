"""Kernels of FilterNorm over the taps of each pixel and head, and of its gradient (paper, section 3.2).

One thread takes one pixel of one head. It reads the taps for each sum over them; all but the first time from cache.
"""

from __future__ import annotations

import math

from numba import cuda


def filter_norm(result, filters, scale, count, pixels, heads, taps, image_step, tap_step, pixel_step):
    """``result`` = (filters - mean) / (deviation + EPSILON) * scale over the taps.

    Both are (B, G*taps, H, W) in one layout, given by steps in elements; ``count`` = B * G * H * W threads.
    """
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if item >= count:
        return
    rest = item // pixels
    image = rest // heads
    at = image * image_step + (rest - image * heads) * taps * tap_step + (item - rest * pixels) * pixel_step
    first = load[1](filters, at, True, True)[0]  # subtracted first, so that equal taps become exactly 0
    total = COMPUTE(0)
    for tap in range(taps):
        total = total + (load[1](filters, at + tap * tap_step, True, True)[0] - first)
    mean = total / COMPUTE(taps)
    squares = COMPUTE(0)
    for tap in range(taps):
        centered = (load[1](filters, at + tap * tap_step, True, True)[0] - first) - mean
        squares = squares + centered * centered
    factor = scale / (math.sqrt(squares / COMPUTE(taps - 1)) + COMPUTE(EPSILON))
    for tap in range(taps):
        centered = (load[1](filters, at + tap * tap_step, True, True)[0] - first) - mean
        store[1](result, at + tap * tap_step, (centered * factor,))


def filter_norm_backward(result, grad, filters, scale, count, pixels, heads, taps, image_step, tap_step, pixel_step):
    """``result`` = the gradient by the filters, from that by the normalized filters; arguments as above.

    With x the centered filter and d its deviation: scale / (d + EPSILON) * (g - mean(g) - x * sum(g x) * pull), where
    pull = 1 / ((d + EPSILON) * d * (taps - 1)); the squares of x, whose sum is d^2 * (taps - 1), are kept above 0.
    """
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if item >= count:
        return
    rest = item // pixels
    image = rest // heads
    at = image * image_step + (rest - image * heads) * taps * tap_step + (item - rest * pixels) * pixel_step
    first = load[1](filters, at, True, True)[0]
    total = COMPUTE(0)
    total_grad = COMPUTE(0)
    for tap in range(taps):
        total = total + (load[1](filters, at + tap * tap_step, True, True)[0] - first)
        total_grad = total_grad + load[1](grad, at + tap * tap_step, True, True)[0]
    mean = total / COMPUTE(taps)
    mean_grad = total_grad / COMPUTE(taps)
    squares = COMPUTE(0)
    product = COMPUTE(0)
    for tap in range(taps):
        centered = (load[1](filters, at + tap * tap_step, True, True)[0] - first) - mean
        squares = squares + centered * centered
        product = product + load[1](grad, at + tap * tap_step, True, True)[0] * centered
    squares = max(squares, COMPUTE(LEAST_SQUARE))
    deviation = math.sqrt(squares / COMPUTE(taps - 1))
    factor = scale / (deviation + COMPUTE(EPSILON))
    pull = product / (deviation + COMPUTE(EPSILON)) * deviation / squares
    for tap in range(taps):
        centered = (load[1](filters, at + tap * tap_step, True, True)[0] - first) - mean
        value = factor * ((load[1](grad, at + tap * tap_step, True, True)[0] - mean_grad) - pull * centered)
        store[1](result, at + tap * tap_step, (value,))
