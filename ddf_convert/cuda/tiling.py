"""How a call is cut into tiles and blocks: its kernel, its number of blocks, and the kernel's numeric arguments.

Nothing here knows tensors: equal problems get equal launches, which are computed once and cached.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from ddf_convert.cuda.kernel_spec import (
    CHUNK,
    LARGEST_STRIDE,
    UNROLLED_SIZES,
    WARP,
    FilterNormSpec,
    GenericSpec,
    GradFiltersSpec,
    KernelSpec,
    Q,
    WindowSpec,
    lanes_dividing,
    steps,
)

_BLOCKS_EACH = 4  # blocks that each multiprocessor should have at least, where the work can be split that far
_MOST_PIXELS = 2**31  # of a plane: the unrolled kernels count them in 32 bits
_CACHED_LAUNCHES = 4096


class Problem(NamedTuple):
    """All that decides how a call of the operator is launched.

    Attributes:
        aligned: Every map starts at a multiple of 16 bytes.
        channels: Of the filters and of what they make: C, and s*s*C for DDF-Up.
        source_channels: Of the input: C.
        heads: Of the filters: G, and s*s*G for DDF-Up.
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
        """The fields that an unrolled kernel is compiled for."""
        names = ("dtype", "add", "size", "stride", "padding", "dilation", "channels_last")
        return {name: getattr(self, name) for name in names}

    @property
    def per_head(self) -> int:
        """Channels of a head."""
        return self.channels // self.heads

    @property
    def images(self) -> int:
        """Images, counted once for each head."""
        return self.batch * self.heads

    @property
    def is_unrolled(self) -> bool:
        """Whether the unrolled kernels take this call; the generic ones take any."""
        small = max(self.height * self.width, self.out_height * self.out_width) < _MOST_PIXELS
        return small and self.size in UNROLLED_SIZES[self.dtype] and self.stride <= LARGEST_STRIDE

    def lanes(self, *lengths: int) -> int:
        """Returns the most elements of one load in maps with rows (or channels) of these lengths."""
        return lanes_dividing(*lengths) if self.aligned else 1

    def fills_gpu(self, blocks: int) -> bool:
        """Whether this many blocks keep the GPU busy."""
        return blocks >= _BLOCKS_EACH * self.multiprocessors


class Launch(NamedTuple):
    """A kernel, its grid, and the numbers that follow the tensors among its arguments."""

    spec: KernelSpec
    blocks: int
    numbers: tuple[int, ...]


class GradFiltersLaunch(NamedTuple):
    """The launch of the filters' gradients, and how many parts of each there are to add up.

    Attributes:
        spans: Parts of the channel filter's gradient.
        chunks: Parts of the spatial filter's gradient.
    """

    launch: Launch
    spans: int
    chunks: int


@functools.lru_cache(_CACHED_LAUNCHES)
def window_launch(problem: Problem, gradient: bool, normalize: bool) -> Launch:
    """Returns the launch of the forward pass, or of the gradient of the input; its numbers follow ``norm_scale``."""
    source, target = (problem.height, problem.width), (problem.out_height, problem.out_width)
    if gradient:
        source, target = target, source
    step_out = problem.stride if gradient else 1
    down, across = (ceil_div(side, step_out) for side in target)
    columns = _window_columns(problem, target[1], step_out)
    last = problem.channels_last
    spec = WindowSpec(
        **problem.known,
        gradient=gradient,
        normalize=normalize,
        columns=columns,
        source_lanes=1 if last else problem.lanes(source[1]),
        target_lanes=1 if last else problem.lanes(target[1], columns * step_out),
        channel_lanes=problem.lanes(problem.per_head) if last else 1,
        whole=problem.per_head % Q == 0,
        groups=_window_groups(problem, down, across, columns) if last else 4,
    )
    blocks_of_tiles = ceil_div(ceil_div(down, spec.rows) * ceil_div(across, columns), spec.tiles)
    step = spec.groups * Q
    chunk = step if last else CHUNK[problem.size]
    while chunk > step and not problem.fills_gpu(problem.images * blocks_of_tiles * ceil_div(problem.per_head, chunk)):
        chunk //= 2
    blocks = problem.images * blocks_of_tiles * ceil_div(problem.per_head, chunk)
    maps = (*target, *source, problem.out_height, problem.out_width)
    channels = (problem.channels, problem.channels if gradient else problem.source_channels)
    return Launch(spec, blocks, (*channels, problem.heads, down, across, *maps, chunk))


def _window_columns(problem: Problem, width: int, step_out: int) -> int:
    """Returns the places of a tile along the row: as wide as one store, as far as registers allow."""
    most = 2 if problem.dtype == "float64" or problem.size == 7 or step_out > 1 else 4
    if problem.channels_last:
        return most
    return min(most, max(1, lanes_dividing(width) // step_out))


def _window_groups(problem: Problem, down: int, across: int, columns: int) -> int:
    """Returns the groups of channels of a channels_last block: few enough that all multiprocessors have work."""
    groups = 4
    while groups < WARP and groups * Q < min(problem.per_head, CHUNK[problem.size]):
        groups *= 2
    tiles = problem.images * ceil_div(down, 2) * ceil_div(across, columns)
    while groups > 4 and not problem.fills_gpu(tiles * ceil_div(problem.per_head, groups * Q) // 16):
        groups //= 2
    return groups


@functools.lru_cache(_CACHED_LAUNCHES)
def grad_filters_launch(problem: Problem) -> GradFiltersLaunch:
    """Returns the launch of the gradients of both filters."""
    last = problem.channels_last
    most = {3: 4, 5: 2, 7: 1}[problem.size]
    if problem.dtype == "float64":
        most = max(1, most // 2)
    lanes = min(most, problem.lanes(problem.per_head if last else problem.out_width))
    while last and lanes > 1 and WARP * lanes > problem.per_head:
        lanes //= 2
    spec = GradFiltersSpec(
        **problem.known,
        lanes=lanes,
        source_lanes=1 if last else problem.lanes(problem.width),
        whole=problem.per_head % (GradFiltersSpec.warps * steps(problem.size, problem.dtype)) == 0,
    )
    groups = problem.out_height * ceil_div(problem.out_width, spec.pixels)

    def blocks(chunk: int, span: int) -> int:
        return problem.images * ceil_div(problem.per_head, chunk) * ceil_div(groups, span)

    if last:
        chunk, span = WARP * lanes, WARP * spec.warps
        while span > spec.warps and not problem.fills_gpu(blocks(chunk, span)):
            span //= 2
    else:
        chunk, span = CHUNK[problem.size], WARP
        while chunk > 2 * spec.warps * spec.steps and not problem.fills_gpu(blocks(chunk, span)):
            chunk //= 2
    channels = (problem.channels, problem.source_channels, problem.heads)
    sizes = (problem.out_height, problem.out_width, problem.height, problem.width)
    numbers = (problem.batch, *channels, *sizes, chunk, span)
    launch = Launch(spec, blocks(chunk, span), numbers)
    return GradFiltersLaunch(launch, spans=ceil_div(groups, span), chunks=ceil_div(problem.per_head, chunk))


@functools.lru_cache(_CACHED_LAUNCHES)
def generic_launch(problem: Problem, function: str, count: int) -> Launch:
    """Returns the launch of a generic kernel with a thread for each of ``count`` elements."""
    spec = GenericSpec(problem.dtype, problem.add, function)

    def strides(channels: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Returns the elements from one image, channel, row and column to the next."""
        if problem.channels_last:
            return channels * height * width, 1, width * channels, channels
        return channels * height * width, height * width, width, 1

    source = problem.channels if function == "grad_input" else problem.source_channels
    numbers = (
        *(count, problem.channels, source, problem.heads, problem.height, problem.width),
        *(problem.out_height, problem.out_width, problem.size),
        *(problem.stride, problem.padding, problem.dilation),
        *strides(source, problem.height, problem.width),
        *strides(problem.channels, problem.out_height, problem.out_width),
        *strides(problem.heads * problem.size**2, problem.out_height, problem.out_width),
    )
    return Launch(spec, ceil_div(count, spec.threads), numbers)


@functools.lru_cache(_CACHED_LAUNCHES)
def filter_norm_launch(
    dtype: str, gradient: bool, channels_last: bool, shape: tuple[int, int, int, int], taps: int
) -> Launch:
    """Returns the launch of FilterNorm, or of its gradient, over (B, G*taps, H, W); its numbers follow ``scale``."""
    spec = FilterNormSpec(dtype, add=False, gradient=gradient)
    batch, channels, height, width = shape
    pixels = height * width
    count = batch * channels * pixels // taps
    tap_and_pixel = (1, channels) if channels_last else (pixels, 1)
    numbers = (count, pixels, channels // taps, taps, channels * pixels, *tap_and_pixel)
    return Launch(spec, ceil_div(count, spec.threads), numbers)


def ceil_div(items: int, each: int) -> int:
    """Returns how many times ``each`` covers the items."""
    return -(-items // each)
