"""Kernels for whatever the fast ones are not made for: any kernel size, stride and plane, in any layout.

One thread makes one element. Maps are given by strides in elements, so that one kernel serves every layout.
``channels`` and ``heads`` are those of the filters; the source can have fewer channels, as in forward.py.
"""

from __future__ import annotations

from numba import cuda


def forward(
    output, source, channel, spatial,
    count, channels, source_channels, heads, height, width, out_height, out_width, size, stride, padding, dilation,
    source_image, source_channel, source_row, source_column,
    out_image, out_channel, out_row, out_column,
    filter_image, filter_tap, filter_row, filter_column,
):  # fmt: skip
    """``output`` = the operator of ``source``; a thread for each of ``count`` elements of the output."""
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if item >= count:
        return
    rest = item // out_width
    x = item - rest * out_width
    y = rest % out_height
    rest = rest // out_height
    r = rest % channels
    b = rest // channels
    head = r // (channels // heads)
    total = COMPUTE(0)
    for i in range(size):
        row = y * stride - padding + i * dilation
        for j in range(size):
            column = x * stride - padding + j * dilation
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            tap = i * size + j
            at = b * source_image + r % source_channels * source_channel + row * source_row + column * source_column
            f = load[1](source, at, inside, True)
            c = load[1](channel, (b * channels + r) * size * size + tap, inside, True)
            at = b * filter_image + (head * size * size + tap) * filter_tap + y * filter_row + x * filter_column
            s = load[1](spatial, at, inside, True)
            total = fma_combine[1]((total,), c[0], s, f)[0]
    store[1](output, b * out_image + r * out_channel + y * out_row + x * out_column, (total,))


def grad_input(
    gradient, grad_output, channel, spatial,
    count, channels, source_channels, heads, height, width, out_height, out_width, size, stride, padding, dilation,
    source_image, source_channel, source_row, source_column,
    out_image, out_channel, out_row, out_column,
    filter_image, filter_tap, filter_row, filter_column,
):  # fmt: skip
    """``gradient`` of the input; a thread for each of its ``count`` elements. Source strides are those of the input."""
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if item >= count:
        return
    rest = item // width
    column = item - rest * width
    row = rest % height
    rest = rest // height
    r = rest % channels
    b = rest // channels
    head = r // (channels // heads)
    total = COMPUTE(0)
    for i in range(size):
        y = (row + padding - i * dilation) // stride
        for j in range(size):
            x = (column + padding - j * dilation) // stride
            meets = (y * stride == row + padding - i * dilation) & (x * stride == column + padding - j * dilation)
            inside = meets & (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
            tap = i * size + j
            g = load[1](grad_output, b * out_image + r * out_channel + y * out_row + x * out_column, inside, True)
            c = load[1](channel, (b * channels + r) * size * size + tap, inside, True)
            at = b * filter_image + (head * size * size + tap) * filter_tap + y * filter_row + x * filter_column
            s = load[1](spatial, at, inside, True)
            total = fma_combine[1]((total,), c[0], s, g)[0]
    at = b * source_image + r * source_channel + row * source_row + column * source_column
    store[1](gradient, at, (total,))


def grad_channel(
    gradient, grad_output, source, spatial,
    count, channels, source_channels, heads, height, width, out_height, out_width, size, stride, padding, dilation,
    source_image, source_channel, source_row, source_column,
    out_image, out_channel, out_row, out_column,
    filter_image, filter_tap, filter_row, filter_column,
):  # fmt: skip
    """``gradient`` of the channel filter, (B, C, K, K); a thread for each of its ``count`` elements."""
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if item >= count:
        return
    plane = item // (size * size)
    tap = item - plane * size * size
    i = tap // size
    j = tap - i * size
    b = plane // channels
    r = plane - b * channels
    head = r // (channels // heads)
    total = COMPUTE(0)
    for y in range(out_height):
        row = y * stride - padding + i * dilation
        line = COMPUTE(0)  # a sum for each row keeps rounding small
        for x in range(out_width):
            column = x * stride - padding + j * dilation
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = b * source_image + r % source_channels * source_channel + row * source_row + column * source_column
            f = load[1](source, at, inside, True)
            g = load[1](grad_output, b * out_image + r * out_channel + y * out_row + x * out_column, inside, True)
            at = b * filter_image + (head * size * size + tap) * filter_tap + y * filter_row + x * filter_column
            s = load[1](spatial, at, inside, True)
            line = accumulate[1]((line,), s[0], multiply[1](g, f))[0]
        total = total + line
    store[1](gradient, item, (total,))


def grad_spatial(
    gradient, grad_output, source, channel,
    count, channels, source_channels, heads, height, width, out_height, out_width, size, stride, padding, dilation,
    source_image, source_channel, source_row, source_column,
    out_image, out_channel, out_row, out_column,
    filter_image, filter_tap, filter_row, filter_column,
):  # fmt: skip
    """``gradient`` of the spatial filter, (B, G*K*K, Ho, Wo); a thread for each of its ``count`` elements."""
    item = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if item >= count:
        return
    rest = item // out_width
    x = item - rest * out_width
    y = rest % out_height
    rest = rest // out_height
    which = rest % (heads * size * size)
    b = rest // (heads * size * size)
    head = which // (size * size)
    tap = which - head * size * size
    i = tap // size
    row = y * stride - padding + i * dilation
    column = x * stride - padding + (tap - i * size) * dilation
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    per_head = channels // heads
    total = COMPUTE(0)
    for r in range(head * per_head, (head + 1) * per_head):
        at = b * source_image + r % source_channels * source_channel + row * source_row + column * source_column
        f = load[1](source, at, inside, True)
        g = load[1](grad_output, b * out_image + r * out_channel + y * out_row + x * out_column, inside, True)
        c = load[1](channel, (b * channels + r) * size * size + tap, inside, True)
        total = accumulate[1]((total,), c[0], multiply[1](g, f))[0]
    store[1](gradient, b * filter_image + which * filter_tap + y * filter_row + x * filter_column, (total,))
