"""The kernel of the gradients of both filters: one pass over the input and the gradient of the output.

Both need the product d = grad_output * input, tap by tap: summed over the pixels it gives the gradient of the channel
filter, summed over the channels the gradient of the spatial filter. A thread owns ``LANES`` fixed elements that are
neighbors in memory (pixels in the contiguous layout, channels in channels_last) and goes over the other axis in steps
of ``STEPS`` (channels, or pixels). The gradient of the filter of its own elements (``own``) adds up in registers; the
parts of the other (``other``) are added across the warp, through shared memory, at every step. Every sum has one fixed
order. Blocks write their parts of a gradient side by side, and the caller adds them up.
"""

from __future__ import annotations

from numba import cuda

from ddf_convert.cuda.codegen.unroll import registers, static


def grad_filters(
    channel_parts,
    spatial_parts,
    grad_output,
    source,
    channel,
    spatial,
    images,
    channels,
    source_channels,
    heads,
    out_height,
    out_width,
    source_height,
    source_width,
    chunk,
    span,
):
    """Computes the parts of each block of the gradients.

    ``channels`` and ``heads`` are those of the filters; the source can have fewer channels, as in forward.py.
    ``channel_parts`` is (blocks of pixels, B, C, K*K), ``spatial_parts`` (chunks of channels, B, G*K*K, Ho, Wo) in the
    layout of the map. A block takes ``chunk`` channels of one head (at most CHUNK) and ``span`` pixel groups, each of
    PIXELS pixels of one row.
    """
    per_head = divide(channels, heads)
    groups_across = divide(out_width + (PIXELS - 1), PIXELS)
    pixel_groups = groups_across * out_height
    spans = divide(pixel_groups + (span - 1), span)
    chunks = divide(per_head + (chunk - 1), chunk)
    block = cuda.blockIdx.x
    rest = divide(block, spans)
    which_span = block - rest * spans
    images_and_heads = divide(rest, chunks)
    which_chunk = rest - images_and_heads * chunks
    image = divide(images_and_heads, heads)
    head = images_and_heads - image * heads
    first_channel = head * per_head + which_chunk * chunk
    last_channel = min(first_channel + chunk, (head + 1) * per_head)
    repeated = divide(first_channel, source_channels) * source_channels
    first_group = which_span * span
    last_group = min(first_group + span, pixel_groups)
    thread = cuda.threadIdx.x
    warp = divide(thread, 32)
    lane = thread - warp * 32
    plane = source_height * source_width
    out_plane = out_height * out_width

    parts = cuda.shared.array(WARPS * STEPS * TAPS * PITCH, COMPUTE, alignment=ALIGNMENT)
    sums = registers()
    own = registers()
    other = registers()
    f = registers()
    g = registers()
    row = registers()
    across = registers()
    filters_here = registers()
    piece_inside = registers()

    if CHANNELS_LAST:
        here = first_channel + lane * LANES
        exists = here < last_channel
        column_values = registers()
        for tap in static(range(TAPS)):
            for at in static(range(LANES)):
                column_values[at] = load[1](channel, (image * channels + here + at) * TAPS + tap, exists, True)[0]
            own[tap] = tuple(column_values[at] for at in static(range(LANES)))
        turns = divide(last_group - first_group + (WARPS - 1), WARPS)
    else:
        filters = cuda.shared.array(CHUNK * FILTER_PITCH, COMPUTE, alignment=ALIGNMENT)
        for item in range(thread, CHUNK * TAPS, THREADS):  # zeros where there is no channel: steps go past the last
            which = divide(item, TAPS)
            exist = first_channel + which < last_channel
            value = load[1](channel, (image * channels + first_channel) * TAPS + item, exist, True)[0]
            put(filters, which * FILTER_PITCH + item - which * TAPS, value)
        cuda.syncthreads()
        group = first_group + lane
        u = divide(group, groups_across)
        v = (group - u * groups_across) * PIXELS
        exists = group < last_group
        corner = u * STRIDE * source_width + v * STRIDE
        for tap in static(range(TAPS)):
            at = ((image * heads + head) * TAPS + tap) * out_plane + u * out_width + v
            own[tap] = load[LANES](spatial, at, exists, True)
        turns = divide(last_channel - first_channel + (WARPS * STEPS - 1), WARPS * STEPS)

    for tap in static(range(TAPS)):
        sums[tap] = tuple(COMPUTE(0) for at in static(range(LANES)))
    for turn in range(turns):
        # One turn: STEPS channels of the thread's pixels, or STEPS pixels of its channels.
        if CHANNELS_LAST:
            group = first_group + turn * WARPS + warp
            u = divide(group, groups_across)
            v = (group - u * groups_across) * PIXELS
            active = group < last_group
            pixel = image * out_plane + u * out_width + v
            corner = (image * source_height + u * STRIDE) * source_width + v * STRIDE
            row[0] = shift(source, corner * source_channels + here - repeated)
            for step in static(range(STEPS)):
                across[step] = v + step < out_width
                g[step] = load[LANES](grad_output, (pixel + step) * channels + here, active & exists, across[step])
                filters_here[step] = shift(spatial, ((pixel + step) * heads + head) * TAPS)
        else:
            active = exists
            local = (turn * WARPS + warp) * STEPS
            here = first_channel + local
            for step in static(range(STEPS)):
                at = (image * channels + here + step) * out_plane + u * out_width + v
                g[step] = load[LANES](grad_output, at, active, WHOLE or here + step < last_channel)
                row[step] = shift(source, (image * source_channels + here - repeated + step) * plane + corner)
                for first in static(range(0, TAPS, 4)):
                    values = fetch[4](filters, (local + step) * FILTER_PITCH + first)
                    for tap in static(range(first, min(first + 4, TAPS))):
                        other[step, tap] = values[tap - first]
        top = u * STRIDE
        left = v * STRIDE
        for piece in static(PIECES):
            piece_inside[piece.first] = active & (left + piece.first >= 0) & (left + piece.first < source_width)

        for i, _, dy in static(FILTER_TAPS):
            row_inside = (top + dy >= 0) & (top + dy < source_height)
            if CHANNELS_LAST:
                row[0] = shift(row[0], ROW_STEPS[dy] * source_width * source_channels)
                column = row[0]
                for piece in static(PIECES):
                    column = shift(column, COLUMN_STEPS[piece.first] * source_channels)
                    f[0, piece.first] = load[LANES](column, 0, row_inside & exists, piece_inside[piece.first])
                for step in static(range(STEPS)):
                    for tap in static(range(i * SIZE, i * SIZE + SIZE)):
                        other[step, tap] = load[1](filters_here[step], tap, active, across[step])[0]
            else:
                for step in static(range(STEPS)):
                    row[step] = shift(row[step], ROW_STEPS[dy] * source_width)
                    row_exists = row_inside & (WHOLE or here + step < last_channel)
                    for piece in static(PIECES):
                        values = load[piece.lanes](row[step], piece.first, row_exists, piece_inside[piece.first])
                        for lane_of_piece in static(range(piece.lanes)):
                            f[step, piece.first + lane_of_piece] = values[lane_of_piece]
            for j, _, dx in static(FILTER_TAPS):
                for step in static(range(STEPS)):
                    if CHANNELS_LAST:
                        product = multiply[LANES](g[step], f[0, step * STRIDE + dx])
                    else:
                        features = tuple(f[step, at * STRIDE + dx] for at in static(range(LANES)))
                        product = multiply[LANES](g[step], features)
                    sums[i * SIZE + j] = accumulate[LANES](sums[i * SIZE + j], other[step, i * SIZE + j], product)
                    part = dot[LANES](own[i * SIZE + j], product)
                    put(parts, ((warp * STEPS + step) * TAPS + (i * SIZE + j)) * PITCH + lane, part)
        sync_warp()
        for first in static(range(0, STEPS * TAPS, 32)):
            which = first + lane
            if which < STEPS * TAPS:
                total = COMPUTE(0)
                for quarter in static(range(8)):
                    values = fetch[4](parts, (warp * (STEPS * TAPS) + which) * PITCH + 4 * quarter)
                    total = total + ((values[0] + values[1]) + (values[2] + values[3]))
                step = divide(which, TAPS)
                tap = which - step * TAPS
                if CHANNELS_LAST:
                    if active & (v + step < out_width):
                        at = which_chunk * images * out_plane + pixel + step
                        store_sum(spatial_parts, (at * heads + head) * TAPS + tap, (total,))
                elif here + step < last_channel:
                    at = (which_span * images + image) * channels + here + step
                    store_sum(channel_parts, at * TAPS + tap, (total,))
        sync_warp()

    # The gradient in registers: the warps' parts are added up, by a thread for each element.
    owner = divide(thread, LANES)
    if CHANNELS_LAST:
        writes = first_channel + thread < last_channel
        at = ((which_span * images + image) * channels + first_channel + thread) * TAPS
    else:
        writes = first_group + owner < last_group
        u = divide(first_group + owner, groups_across)
        v = (first_group + owner - u * groups_across) * PIXELS + thread - owner * LANES
        at = ((which_chunk * images + image) * heads + head) * TAPS * out_plane + u * out_width + v
    for tap in static(range(TAPS)):
        cuda.syncthreads()
        for element in static(range(LANES)):
            put(parts, (warp * 32 + lane) * LANES + element, sums[tap][element])
        cuda.syncthreads()
        if (thread < 32 * LANES) & writes:
            total = COMPUTE(0)
            for each in static(range(WARPS)):
                total = total + fetch[1](parts, each * (32 * LANES) + thread)[0]
            if CHANNELS_LAST:
                store_sum(channel_parts, at + tap, (total,))
            else:
                store_sum(spatial_parts, at + tap * out_plane, (total,))
