"""Which kernels there are: what each is compiled for, and the shape of its tile.

A variant is data: two calls that need the same kernel have equal variants. ``build`` makes the function to compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from ddf_convert.reference import EPSILON, LEAST_SQUARE


class Tap(NamedTuple):
    """One tap along one axis.

    Attributes:
        tap: Its place, 0 to K - 1.
        phase: Of the targets that it serves.
        offset: From the place of the target (u * step_in) to the source.
    """

    tap: int
    phase: int
    offset: int


class Use(NamedTuple):
    """One use of a source row (or column) by a tile.

    Attributes:
        place: Row (or column) of the tile.
        target: Row (or column) of the tile's targets.
        tap: Index of the tap.
    """

    place: int
    target: int
    tap: int


class Piece(NamedTuple):
    """Columns that are loaded in one instruction.

    Attributes:
        first: Offset of the first from the tile's first column (v * step_in).
        lanes: How many.
    """

    first: int
    lanes: int


@dataclass(frozen=True)
class Stencil:
    """The geometry of one kernel.

    Attributes:
        taps: Of one axis; both have the same.
        step_in: Source pixels from one place to the next.
        step_out: Target pixels from one place to the next.
    """

    taps: tuple[Tap, ...]
    step_in: int
    step_out: int

    def uses(self, places: int) -> dict[int, tuple[Use, ...]]:
        """Every source row that a tile of so many places reads, in order, and what for.

        Args:
            places: Rows (or columns) of the tile.

        Returns:
            By offset from the tile's first place.
        """
        found: dict[int, list[Use]] = {}
        for place in range(places):
            for tap in self.taps:
                source = place * self.step_in + tap.offset
                found.setdefault(source, []).append(Use(place, place * self.step_out + tap.phase, tap.tap))
        return {source: tuple(found[source]) for source in sorted(found)}


def forward(kernel_size: int, stride: int, padding: int, dilation: int) -> Stencil:
    """The output from the input."""
    taps = tuple(Tap(index, 0, index * dilation - padding) for index in range(kernel_size))
    return Stencil(taps, step_in=stride, step_out=1)


def grad_input(kernel_size: int, stride: int, padding: int, dilation: int) -> Stencil:
    """The gradient of the input from that of the output."""
    taps = tuple(
        Tap(index, phase, (phase + padding - index * dilation) // stride)
        for phase in range(stride)
        for index in range(kernel_size)
        if (phase + padding - index * dilation) % stride == 0
    )
    return Stencil(taps, step_in=1, step_out=stride)


def pieces(columns: list[int], lanes: int, base: int) -> tuple[Piece, ...]:
    """Covers columns with aligned loads: wide ones where at least two of their columns are wanted.

    Args:
        columns: Offsets, in order.
        lanes: Most elements of one load, 1, 2 or 4.
        base: The tile's first column is a multiple of this.
    """
    while base % lanes:
        lanes //= 2
    made: list[Piece] = []
    left = list(columns)
    while left:
        first = left[0] // lanes * lanes
        inside = [column for column in left if column < first + lanes]
        made += [Piece(first, lanes)] if len(inside) > 1 else [Piece(left[0], 1)]
        left = left[len(inside) :]
    return tuple(made)


# Kernel sizes that the fast kernels are made for: 7x7 in float64 would need more registers than there are.
UNROLLED = {"float32": (3, 5, 7), "float16": (3, 5, 7), "bfloat16": (3, 5, 7), "float64": (3, 5)}
FASTEST_STRIDE = 2  # and the strides up to this one
Q = 4  # channels of a tile
WARP = 32

# The channels that a block can have in shared memory, by kernel size.
CHUNK = {3: 128, 5: 64, 7: 32}


class Columns(NamedTuple):
    """What one tap does along a row of a tile.

    Attributes:
        phase: Of the targets that it serves.
        offsets: Of the source columns, for each place of the tile.
    """

    phase: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """A kernel for one dtype.

    Attributes:
        dtype: "float32", "float64", "float16" or "bfloat16".
        add: The filters are added, not multiplied.
        module: Of the kernel, in this package.
        kernel: Name of its function.
        arguments: What it takes, a letter each: "s" a pointer to stored elements, "c" one to sums (float32, float64 for
            float64), "f" a number of that type, "i" an integer.
    """

    dtype: str
    add: bool

    module: ClassVar[str]

    @property
    def threads(self) -> int:
        """Of a block."""
        return 128

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return self.module

    @property
    def arguments(self) -> str:
        """See the class."""
        raise NotImplementedError

    def constants(self) -> dict[str, Any]:
        """What the kernel takes as known, besides the functions of its dtype."""
        return {}

    @property
    def name(self) -> str:
        """A name for people, such as cache files and messages carry."""
        return f"{self.kernel}_{self.dtype}{'_add' if self.add else ''}"

    def build(self, functions: dict[str, Any], compute: Any) -> Callable[..., None]:
        """The function to compile.

        Args:
            functions: The device functions for this dtype, by name.
            compute: The type of sums.
        """
        from ddf_convert.cuda.codegen.unroll import specialize

        kernel = getattr(importlib.import_module(f"ddf_convert.cuda.{self.module}"), self.kernel)
        constants = {
            "COMPUTE": compute,
            "EPSILON": EPSILON,
            "LEAST_SQUARE": LEAST_SQUARE,
            **self.constants(),
            **functions,
        }
        return specialize(kernel, self.kernel, constants)


@dataclass(frozen=True)
class Unrolled(Variant):
    """A kernel for one geometry of the operator, of an unrolled kernel size.

    Attributes:
        size: K.
        stride: Of the operator.
        padding: Of the operator.
        dilation: Of the operator.
        channels_last: The layout.
    """

    size: int
    stride: int
    padding: int
    dilation: int
    channels_last: bool

    @property
    def purpose(self) -> str:
        """What it calculates, for its name."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """See Variant."""
        layout = "channels_last" if self.channels_last else "contiguous"
        geometry = f"k{self.size}s{self.stride}p{self.padding}d{self.dilation}"
        return f"{self.purpose}_{geometry}_{layout}_{self.dtype}{'_add' if self.add else ''}"


@dataclass(frozen=True)
class Window(Unrolled):
    """The forward pass, or the gradient of the input, for an unrolled kernel size.

    Attributes:
        gradient: Of the input, not the forward pass.
        normalize: Apply FilterNorm to the spatial filter.
        columns: Places (see stencil.py) of a tile along the row.
        source_lanes: Most elements of one load along a row (contiguous).
        target_lanes: Elements of one store along a row (contiguous).
        channel_lanes: Elements of one load or store along the channels (channels_last).
        whole: The channels of a head are a multiple of Q.
        groups: Groups of Q channels of a block.
    """

    gradient: bool
    normalize: bool
    columns: int
    source_lanes: int
    target_lanes: int
    channel_lanes: int
    whole: bool
    groups: int

    module: ClassVar[str] = "kernels.forward"
    kernel: ClassVar[str] = "window"

    @property
    def arguments(self) -> str:
        """See Variant."""
        return "ssss" + "f" + "i" * 12

    @property
    def purpose(self) -> str:
        """See Unrolled."""
        return "grad_input" if self.gradient else "forward"

    @cached_property
    def stencil(self) -> Stencil:
        """The geometry."""
        make = grad_input if self.gradient else forward
        return make(self.size, self.stride, self.padding, self.dilation)

    @property
    def rows(self) -> int:
        """Places of a tile down the map: more share more of what they load, and need more registers."""
        return 2 if self.size == 3 and self.stride == 1 else 1

    @property
    def tile_lanes(self) -> int:
        """Tiles that the block's threads make at the same time."""
        return self.threads // self.groups

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return max(16, self.tile_lanes)

    def constants(self) -> dict[str, Any]:
        """See Variant."""
        made = self.stencil
        rows, columns = made.uses(self.rows), made.uses(self.columns)
        filter_taps = made.taps if self.gradient else tuple(tap._replace(offset=0) for tap in made.taps)
        lanes = 1 if self.channels_last else self.source_lanes
        return {
            "SIZE": self.size,
            "TAPS": self.size**2,
            "ADD": self.add,
            "CHANNELS_LAST": self.channels_last,
            "NORMALIZE": self.normalize,
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "Q": Q,
            "STEP_IN": made.step_in,
            "STEP_OUT": made.step_out,
            "TOTALS": [
                (q, a, b) for q in range(Q) for a in range(self.rows * made.step_out) for b in range(made.step_out)
            ],
            "SOURCE_ROWS": rows,
            "ROW_STEPS": _steps(rows),
            "SOURCE_COLUMNS": tuple(columns),
            "COLUMN_STEPS": _steps(columns),
            "TAP_COLUMNS": {index: _columns(columns, index, made.step_out) for index in range(self.size)},
            "PIECES": pieces(list(columns), lanes, self.columns * made.step_in),
            "FILTER_TAPS": filter_taps,
            "TARGET_LANES": self.target_lanes,
            "CHANNEL_LANES": self.channel_lanes,
            "WHOLE": self.whole,
            "GROUPS": self.groups,
            "TILE_LANES": self.tile_lanes,
            "TILES": self.tiles,
            "THREADS": self.threads,
            "CHUNK": CHUNK[self.size],
        }


def _steps(offsets: dict[int, Any]) -> dict[int, int]:
    """From each offset's predecessor (or 0) to it."""
    order = list(offsets)
    return {offset: offset - before for before, offset in zip([0, *order], order, strict=False)}


def _columns(columns: dict[int, tuple[Use, ...]], tap: int, step_out: int) -> Columns:
    found = sorted(
        (use.place, offset, use.target) for offset, uses in columns.items() for use in uses if use.tap == tap
    )
    return Columns(found[0][2] % step_out, tuple(offset for _, offset, _ in found))


@dataclass(frozen=True)
class FilterGradients(Unrolled):
    """The gradients of both filters, for an unrolled kernel size.

    Attributes:
        lanes: Elements that a thread owns: pixels of a row, or channels.
        source_lanes: Most elements of one load of the input along a row (contiguous).
        whole: The channels of a head fill every turn of a block (contiguous).
    """

    lanes: int
    source_lanes: int
    whole: bool

    module: ClassVar[str] = "kernels.grad_filters"
    kernel: ClassVar[str] = "filter_gradients"

    @property
    def arguments(self) -> str:
        """See Variant."""
        return "ccssss" + "i" * 10

    @property
    def purpose(self) -> str:
        """See Unrolled."""
        return "grad_filters"

    @property
    def steps(self) -> int:
        """Channels, or pixels, of one turn of a warp."""
        return steps(self.size, self.dtype)

    warps: ClassVar[int] = 4

    @property
    def threads(self) -> int:
        """See Variant."""
        return self.warps * WARP

    @property
    def pixels(self) -> int:
        """Pixels of a group: those that a thread owns, or those of one step."""
        return self.steps if self.channels_last else self.lanes

    def constants(self) -> dict[str, Any]:
        """See Variant."""
        made = forward(self.size, self.stride, self.padding, self.dilation)
        columns = list(made.uses(self.pixels))
        lanes = 1 if self.channels_last else self.source_lanes
        return {
            "SIZE": self.size,
            "TAPS": self.size**2,
            "CHANNELS_LAST": self.channels_last,
            "LANES": self.lanes,
            "STEPS": self.steps,
            "PIXELS": self.pixels,
            "WARPS": self.warps,
            "THREADS": self.threads,
            "STRIDE": self.stride,
            "FILTER_TAPS": made.taps,
            "ROW_STEPS": _steps(made.uses(1)),
            "COLUMN_STEPS": _steps(made.uses(self.pixels)),
            "PIECES": pieces(columns, lanes, self.pixels * self.stride),
            "WHOLE": self.whole,
            "CHUNK": CHUNK[self.size],
            "PITCH": WARP + 4,  # rows of sums: no two that are read together start in the same bank
            "FILTER_PITCH": -(-(self.size**2) // 4) * 4,
        }


@dataclass(frozen=True)
class Plain(Variant):
    """One of the kernels that take anything.

    Attributes:
        function: forward, grad_input, grad_channel or grad_spatial.
    """

    function: str

    module: ClassVar[str] = "kernels.generic"

    @property
    def kernel(self) -> str:
        """See Variant."""
        return self.function

    @property
    def name(self) -> str:
        """See Variant."""
        return f"plain_{super().name}"

    @property
    def arguments(self) -> str:
        """See Variant."""
        return "ssss" + "i" * 24


@dataclass(frozen=True)
class Norm(Variant):
    """FilterNorm, or its gradient.

    Attributes:
        gradient: The gradient.
    """

    gradient: bool

    module: ClassVar[str] = "kernels.filter_norm"

    @property
    def kernel(self) -> str:
        """See Variant."""
        return "filter_norm_backward" if self.gradient else "filter_norm"

    @property
    def arguments(self) -> str:
        """See Variant."""
        return ("sss" if self.gradient else "ss") + "f" + "i" * 7


def steps(size: int, dtype: str) -> int:
    """Channels, or pixels, that one turn of the filters' gradients takes: more would need too many registers."""
    return 2 if size == 3 and dtype != "float64" else 1


def lanes_dividing(*sizes: int, most: int = 4) -> int:
    """The most elements of one load, if they must divide all of these: 4, 2 or 1."""
    lanes = most
    while any(size % lanes for size in sizes):
        lanes //= 2
    return lanes
