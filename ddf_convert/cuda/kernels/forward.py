"""The kernel of the forward pass and of the gradient of the input, in either layout.

A thread computes a tile: ``Q`` channels of ``ROWS`` x ``COLUMNS`` places (see ``kernel_spec.Stencil``). A block is
``TILES`` tiles of the map for each of ``GROUPS`` groups of ``Q`` channels; it goes over a chunk of channels of one head
in steps of ``GROUPS * Q``. The tiles share filters, which the block first writes to shared memory in float32 (or
float64): the spatial filter of its pixels, normalized with NORMALIZE, and the channel filter of its channels. The
feature map is loaded into registers, row by row of the window; rows that neighboring tiles read again are in L1.

Neighboring threads are neighbors in memory: along the row in the contiguous layout, along the channels in
channels_last, where a thread's ``Q`` channels are one wide load.
"""

from __future__ import annotations

import math

from numba import cuda

from ddf_convert.cuda.codegen.unroll import registers, static


def window(
    target,
    source,
    channel,
    spatial,
    scale,
    channels,
    source_channels,
    heads,
    places_down,
    places_across,
    target_height,
    target_width,
    source_height,
    source_width,
    filter_height,
    filter_width,
    chunk,
):
    """Computes ``target`` from ``source``.

    ``channels`` and ``heads`` are those of the filters; in DDF-Up the source has s*s times fewer channels, which serve
    s*s filters in turn. The map has ``places_down`` x ``places_across`` places (u, v), the spatial filter
    ``filter_height`` x ``filter_width`` pixels, and a block ``chunk`` channels (at most CHUNK).
    """
    per_head = divide(channels, heads)
    tiles_across = divide(places_across + (COLUMNS - 1), COLUMNS)
    tiles_down = divide(places_down + (ROWS - 1), ROWS)
    blocks_of_tiles = divide(tiles_down * tiles_across + (TILES - 1), TILES)
    chunks = divide(per_head + (chunk - 1), chunk)
    block = cuda.blockIdx.x
    rest = divide(block, blocks_of_tiles)
    first_tile = (block - rest * blocks_of_tiles) * TILES
    images_and_heads = divide(rest, chunks)
    first_channel = (rest - images_and_heads * chunks) * chunk
    image = divide(images_and_heads, heads)
    head = images_and_heads - image * heads
    last_channel = min(first_channel + chunk, per_head) + head * per_head
    first_channel += head * per_head
    first_source = first_channel - divide(first_channel, source_channels) * source_channels
    thread = cuda.threadIdx.x

    # The channel filter: tap by tap, the channels of the chunk side by side.
    channel_tile = cuda.shared.array(TAPS * CHUNK, COMPUTE, alignment=ALIGNMENT)
    for item in range(thread, (last_channel - first_channel) * TAPS, THREADS):
        which = divide(item, TAPS)
        value = load[1](channel, (image * channels + first_channel) * TAPS + item, True, True)
        put(channel_tile, (item - which * TAPS) * CHUNK + which, value[0])

    # The spatial filter: tap by tap, row of tile by row of tile, the pixels side by side.
    spatial_tile = cuda.shared.array(TAPS * ROWS * TILES * COLUMNS, COMPUTE, alignment=ALIGNMENT)
    taps = registers()
    for item in range(thread, ROWS * TILES * COLUMNS, THREADS):
        down_tile = divide(item, TILES * COLUMNS)
        within = item - down_tile * (TILES * COLUMNS)
        tile = first_tile + divide(within, COLUMNS)
        down = divide(tile, tiles_across)
        u = down * ROWS + down_tile
        v = (tile - down * tiles_across) * COLUMNS + within - divide(within, COLUMNS) * COLUMNS
        for i, _, dy in static(FILTER_TAPS):
            for j, _, dx in static(FILTER_TAPS):
                y = u + dy
                x = v + dx
                y_inside = (y >= 0) & (y < filter_height)
                x_inside = (x >= 0) & (x < filter_width)
                if CHANNELS_LAST:
                    at = (((image * filter_height + y) * filter_width + x) * heads + head) * TAPS + (i * SIZE + j)
                else:
                    at = (((image * heads + head) * TAPS + (i * SIZE + j)) * filter_height + y) * filter_width + x
                value = load[1](spatial, at, y_inside, x_inside)
                taps[i * SIZE + j] = value[0]
        if NORMALIZE:
            first = taps[0]  # subtracted first, so that equal taps become exactly 0
            mean = COMPUTE(0)
            for tap in static(range(TAPS)):
                taps[tap] = taps[tap] - first
                mean = mean + taps[tap]
            mean = mean * COMPUTE(1 / TAPS)
            squares = COMPUTE(0)
            for tap in static(range(TAPS)):
                taps[tap] = taps[tap] - mean
                squares = squares + taps[tap] * taps[tap]
            factor = scale / (math.sqrt(squares * COMPUTE(1 / (TAPS - 1))) + COMPUTE(EPSILON))
            for tap in static(range(TAPS)):
                taps[tap] = taps[tap] * factor
        for tap in static(range(TAPS)):
            put(spatial_tile, tap * (ROWS * TILES * COLUMNS) + item, taps[tap])
    cuda.syncthreads()

    # This thread's tiles.
    if CHANNELS_LAST:
        tile_lane = divide(thread, GROUPS)
        group = thread - tile_lane * GROUPS
    else:
        group = divide(thread, TILE_LANES)
        tile_lane = thread - group * TILE_LANES
    f = registers()
    total = registers()
    row = registers()
    row_inside = registers()
    piece_inside = registers()
    source_plane = source_height * source_width
    target_plane = target_height * target_width
    for which_tile in range(tile_lane, min(TILES, tiles_down * tiles_across - first_tile), TILE_LANES):
        tile = first_tile + which_tile
        down = divide(tile, tiles_across)
        u = down * ROWS
        v = (tile - down * tiles_across) * COLUMNS
        top = u * STEP_IN
        left = v * STEP_IN
        for dy in static(SOURCE_ROWS):
            row_inside[dy] = (top + dy >= 0) & (top + dy < source_height)
        for piece in static(PIECES):
            piece_inside[piece.first] = (left + piece.first >= 0) & (left + piece.first < source_width)
        corner = top * source_width + left
        for local in range(group * Q, last_channel - first_channel, GROUPS * Q):
            for q, a, b in static(TOTALS):
                total[q, a, b] = tuple(COMPUTE(0) for column in static(range(COLUMNS)))
            here = first_channel + local
            this_tile = opaque(which_tile)
            if CHANNELS_LAST:
                row[0] = shift(source, (image * source_plane + corner) * source_channels + first_source + local)
            else:
                row[0] = shift(source, (image * source_channels + first_source + local) * source_plane + corner)
                for q in static(range(1, Q)):
                    row[q] = shift(row[q - 1], source_plane)
            for dy in static(SOURCE_ROWS):
                if CHANNELS_LAST:
                    row[0] = shift(row[0], ROW_STEPS[dy] * source_width * source_channels)
                    pixel = row[0]
                    for dx in static(SOURCE_COLUMNS):
                        pixel = shift(pixel, COLUMN_STEPS[dx] * source_channels)
                        for first in static(range(0, Q, CHANNEL_LANES)):
                            exist = piece_inside[dx] & (WHOLE or here + first < last_channel)
                            values = load[CHANNEL_LANES](pixel, first, row_inside[dy], exist)
                            for lane in static(range(CHANNEL_LANES)):
                                f[first + lane, dx] = values[lane]
                else:
                    for q in static(range(Q)):
                        row[q] = shift(row[q], ROW_STEPS[dy] * source_width)
                        for piece in static(PIECES):
                            exist = piece_inside[piece.first] & (WHOLE or here + q < last_channel)
                            values = load[piece.lanes](row[q], piece.first, row_inside[dy], exist)
                            for lane in static(range(piece.lanes)):
                                f[q, piece.first + lane] = values[lane]
                for place, a, i in static(SOURCE_ROWS[dy]):
                    for j in static(range(SIZE)):
                        c = fetch[Q](channel_tile, (i * SIZE + j) * CHUNK + local)
                        at = (((i * SIZE + j) * ROWS + place) * TILES + this_tile) * COLUMNS
                        s = fetch[COLUMNS](spatial_tile, at)
                        for q in static(range(Q)):
                            features = tuple(f[q, dx] for dx in static(TAP_COLUMNS[j].offsets))
                            total[q, a, TAP_COLUMNS[j].phase] = fma_combine[COLUMNS](
                                total[q, a, TAP_COLUMNS[j].phase], c[q], s, features
                            )

            for a in static(range(ROWS * STEP_OUT)):
                y = u * STEP_OUT + a
                inside = y < target_height
                for x in static(range(0, COLUMNS * STEP_OUT)):
                    if CHANNELS_LAST:
                        at = ((image * target_height + y) * target_width + v * STEP_OUT + x) * channels + here
                        for q in static(range(0, Q, CHANNEL_LANES)):
                            if inside & (v * STEP_OUT + x < target_width) & (WHOLE or here + q < last_channel):
                                values = tuple(
                                    total[q + lane, a, x % STEP_OUT][x // STEP_OUT]
                                    for lane in static(range(CHANNEL_LANES))
                                )
                                store[CHANNEL_LANES](target, at + q, values)
                    elif x % TARGET_LANES == 0:
                        at = (image * channels + here) * target_plane + y * target_width + v * STEP_OUT + x
                        for q in static(range(Q)):
                            if inside & (v * STEP_OUT + x < target_width) & (WHOLE or here + q < last_channel):
                                values = tuple(
                                    total[q, a, column % STEP_OUT][column // STEP_OUT]
                                    for column in static(range(x, x + TARGET_LANES))
                                )
                                store[TARGET_LANES](target, at + q * target_plane, values)
