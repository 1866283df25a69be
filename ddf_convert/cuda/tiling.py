"""How a call is cut into tiles and blocks: which kernel it takes, how many blocks, and the numbers they are told.

Nothing here knows tensors: the same geometry gives the same launches, so they are worked out once and remembered.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ddf_convert.cuda.kernel_spec import (
    CHUNK,
    FASTEST_STRIDE,
    UNROLLED,
    WARP,
    FilterGradients,
    Norm,
    Plain,
    Q,
    Variant,
    Window,
    lanes_dividing,
    steps,
)

_BLOCKS_EACH = 4  # blocks that each multiprocessor should have at least, where the work can be split that far
_FAR = 2**31  # pixels of a plane that 32 bits can count
_REMEMBERED = 4096


class Geometry(NamedTuple):
    """All that decides how a call of the operator is launched.

    Attributes:
        dtype: As in Variant.
        add: The filters are added, not multiplied.
        channels_last: The layout.
        aligned: Every map starts at a multiple of 16 bytes.
        batch: B.
        channels: Of the filters and of what they make: C, and s*s*C for DDF-Up.
        source_channels: Of the input: C.
        heads: Of the filters: G, and s*s*G for DDF-Up.
        height: H, of the input.
        width: W, of the input.
        out_height: Ho.
        out_width: Wo.
        size: K.
        stride: Of the operator.
        padding: Of the operator.
        dilation: Of the operator.
        multiprocessors: Of the GPU.
    """

    dtype: str
    add: bool
    channels_last: bool
    aligned: bool
    batch: int
    channels: int
    source_channels: int
    heads: int
    height: int
    width: int
    out_height: int
    out_width: int
    size: int
    stride: int
    padding: int
    dilation: int
    multiprocessors: int

    @property
    def known(self) -> dict[str, Any]:
        """What an unrolled kernel is compiled for, by the names of Unrolled."""
        names = ("dtype", "add", "size", "stride", "padding", "dilation", "channels_last")
        return {name: getattr(self, name) for name in names}

    @property
    def per_head(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    @property
    def images(self) -> int:
        """Images, each head for itself."""
        return self.batch * self.heads

    @property
    def is_fast(self) -> bool:
        """Whether the unrolled kernels take this call; the plain ones take any."""
        small = max(self.height * self.width, self.out_height * self.out_width) < _FAR
        return small and self.size in UNROLLED[self.dtype] and self.stride <= FASTEST_STRIDE

    def lanes(self, *lengths: int) -> int:
        """The most elements of one load in maps with rows (or channels) of these lengths."""
        return lanes_dividing(*lengths) if self.aligned else 1

    def enough(self, blocks: int) -> bool:
        """Whether so many blocks keep the GPU busy."""
        return blocks >= _BLOCKS_EACH * self.multiprocessors


class Launch(NamedTuple):
    """A kernel, its grid, and the numbers that follow the tensors among its arguments.

    Attributes:
        variant: The kernel.
        blocks: Of the grid.
        numbers: Its last arguments.
    """

    variant: Variant
    blocks: int
    numbers: tuple[int, ...]


class FilterLaunch(NamedTuple):
    """The launch of the gradients of the filters, and how many parts of each there will be to add up.

    Attributes:
        launch: Of the kernel.
        spans: Parts of the channel filter's gradient.
        chunks: Parts of the spatial filter's gradient.
    """

    launch: Launch
    spans: int
    chunks: int


@functools.lru_cache(_REMEMBERED)
def window(geometry: Geometry, gradient: bool, normalize: bool) -> Launch:
    """The launch of the forward pass, or of the gradient of the input; its numbers follow the scale of FilterNorm."""
    source, target = (geometry.height, geometry.width), (geometry.out_height, geometry.out_width)
    if gradient:
        source, target = target, source
    step_out = geometry.stride if gradient else 1
    down, across = (up(side, step_out) for side in target)
    columns = _window_columns(geometry, target[1], step_out)
    last = geometry.channels_last
    variant = Window(
        **geometry.known,
        gradient=gradient,
        normalize=normalize,
        columns=columns,
        source_lanes=1 if last else geometry.lanes(source[1]),
        target_lanes=1 if last else geometry.lanes(target[1], columns * step_out),
        channel_lanes=geometry.lanes(geometry.per_head) if last else 1,
        whole=geometry.per_head % Q == 0,
        groups=_window_groups(geometry, down, across, columns) if last else 4,
    )
    blocks_of_tiles = up(up(down, variant.rows) * up(across, columns), variant.tiles)
    step = variant.groups * Q
    chunk = step if last else CHUNK[geometry.size]
    while chunk > step and not geometry.enough(geometry.images * blocks_of_tiles * up(geometry.per_head, chunk)):
        chunk //= 2
    blocks = geometry.images * blocks_of_tiles * up(geometry.per_head, chunk)
    maps = (*target, *source, geometry.out_height, geometry.out_width)
    channels = (geometry.channels, geometry.channels if gradient else geometry.source_channels)
    return Launch(variant, blocks, (*channels, geometry.heads, down, across, *maps, chunk))


def _window_columns(geometry: Geometry, width: int, step_out: int) -> int:
    """Places of a tile along the row: as wide as one store, as far as registers allow."""
    most = 2 if geometry.dtype == "float64" or geometry.size == 7 or step_out > 1 else 4
    if geometry.channels_last:
        return most
    return min(most, max(1, lanes_dividing(width) // step_out))


def _window_groups(geometry: Geometry, down: int, across: int, columns: int) -> int:
    """Groups of channels side by side in a channels_last block: few enough that all multiprocessors have work."""
    groups = 4
    while groups < WARP and groups * Q < min(geometry.per_head, CHUNK[geometry.size]):
        groups *= 2
    tiles = geometry.images * up(down, 2) * up(across, columns)
    while groups > 4 and not geometry.enough(tiles * up(geometry.per_head, groups * Q) // 16):
        groups //= 2
    return groups


@functools.lru_cache(_REMEMBERED)
def filter_gradients(geometry: Geometry) -> FilterLaunch:
    """The launch of the gradients of both filters."""
    last = geometry.channels_last
    most = {3: 4, 5: 2, 7: 1}[geometry.size]
    if geometry.dtype == "float64":
        most = max(1, most // 2)
    lanes = min(most, geometry.lanes(geometry.per_head if last else geometry.out_width))
    while last and lanes > 1 and WARP * lanes > geometry.per_head:
        lanes //= 2
    variant = FilterGradients(
        **geometry.known,
        lanes=lanes,
        source_lanes=1 if last else geometry.lanes(geometry.width),
        whole=geometry.per_head % (FilterGradients.warps * steps(geometry.size, geometry.dtype)) == 0,
    )
    groups = geometry.out_height * up(geometry.out_width, variant.pixels)

    def blocks(chunk: int, span: int) -> int:
        return geometry.images * up(geometry.per_head, chunk) * up(groups, span)

    if last:
        chunk, span = WARP * lanes, WARP * variant.warps
        while span > variant.warps and not geometry.enough(blocks(chunk, span)):
            span //= 2
    else:
        chunk, span = CHUNK[geometry.size], WARP
        while chunk > 2 * variant.warps * variant.steps and not geometry.enough(blocks(chunk, span)):
            chunk //= 2
    channels = (geometry.channels, geometry.source_channels, geometry.heads)
    sizes = (geometry.out_height, geometry.out_width, geometry.height, geometry.width)
    numbers = (geometry.batch, *channels, *sizes, chunk, span)
    launch = Launch(variant, blocks(chunk, span), numbers)
    return FilterLaunch(launch, spans=up(groups, span), chunks=up(geometry.per_head, chunk))


@functools.lru_cache(_REMEMBERED)
def plain(geometry: Geometry, function: str, count: int) -> Launch:
    """The launch of a plain kernel with a thread for each of ``count`` elements."""
    variant = Plain(geometry.dtype, geometry.add, function)

    def strides(channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Elements from one image, channel, row and column to the next."""
        if geometry.channels_last:
            return channels * height * width, 1, width * channels, channels
        return channels * height * width, height * width, width, 1

    source = geometry.channels if function == "grad_input" else geometry.source_channels
    numbers = (
        *(count, geometry.channels, source, geometry.heads, geometry.height, geometry.width),
        *(geometry.out_height, geometry.out_width, geometry.size),
        *(geometry.stride, geometry.padding, geometry.dilation),
        *strides(source, geometry.height, geometry.width),
        *strides(geometry.channels, geometry.out_height, geometry.out_width),
        *strides(geometry.heads * geometry.size**2, geometry.out_height, geometry.out_width),
    )
    return Launch(variant, up(count, variant.threads), numbers)


@functools.lru_cache(_REMEMBERED)
def norm(dtype: str, gradient: bool, channels_last: bool, shape: tuple[int, int, int, int], taps: int) -> Launch:
    """The launch of FilterNorm, or of its gradient, over (B, G*taps, H, W); its numbers follow the scale."""
    variant = Norm(dtype, add=False, gradient=gradient)
    batch, channels, height, width = shape
    pixels = height * width
    count = batch * channels * pixels // taps
    tap_and_pixel = (1, channels) if channels_last else (pixels, 1)
    numbers = (count, pixels, channels // taps, taps, channels * pixels, *tap_and_pixel)
    return Launch(variant, up(count, variant.threads), numbers)


def up(items: int, each: int) -> int:
    """How many times ``each`` covers the items."""
    return -(-items // each)
