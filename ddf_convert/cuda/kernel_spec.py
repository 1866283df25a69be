"""Which CUDA kernels there are: what each one is compiled for, and which elements its tile reads.

A spec is data: two calls that need the same kernel have equal specs. ``build`` makes the function to compile.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from ddf_convert.reference import EPSILON, LEAST_SQUARE

# Kernel sizes of the unrolled kernels: 7x7 in float64 would need more registers than there are.
UNROLLED_SIZES = {"float32": (3, 5, 7), "float16": (3, 5, 7), "bfloat16": (3, 5, 7), "float64": (3, 5)}
LARGEST_STRIDE = 2  # of the unrolled kernels
CHUNK = {3: 128, 5: 64, 7: 32}  # channels that a block can have in shared memory, by kernel size
Q = 4  # channels of a tile
WARP = 32


@dataclass(frozen=True)
class KernelSpec:
    """A kernel for one dtype.

    Attributes:
        dtype: "float32", "float64", "float16" or "bfloat16".
        add: The filters are added, not multiplied.
        module: In ``ddf_convert.cuda.kernels``.
    """

    dtype: str
    add: bool

    module: ClassVar[str]
    threads: ClassVar[int] = 128  # of a block

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        raise NotImplementedError

    @property
    def arguments(self) -> str:
        """A letter for each argument of the kernel.

        "s" is a pointer to stored elements, "c" one to sums (float32, float64 for float64), "f" a number of the type of
        sums, "i" an integer.
        """
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The readable name in cache files and messages."""
        return f"{self.kernel}_{self.dtype}{'_add' if self.add else ''}"

    def constants(self) -> dict[str, Any]:
        """Returns what the kernel takes as known, besides the functions of its dtype."""
        return {}

    def build(self, functions: dict[str, Any], compute: Any) -> Callable[..., None]:
        """Makes the function to compile from the device functions of its dtype, by name, and the type of sums."""
        from ddf_convert.cuda.codegen.unroll import specialize

        kernel = getattr(importlib.import_module(f"ddf_convert.cuda.kernels.{self.module}"), self.kernel)
        known = {"COMPUTE": compute, "EPSILON": EPSILON, "LEAST_SQUARE": LEAST_SQUARE, **self.constants(), **functions}
        return specialize(kernel, self.kernel, known)


@dataclass(frozen=True)
class UnrolledSpec(KernelSpec):
    """A kernel for one kernel size, stride, padding, dilation and layout."""

    size: int
    stride: int
    padding: int
    dilation: int
    channels_last: bool

    @property
    def purpose(self) -> str:
        """What it computes, for its name."""
        return self.kernel

    @property
    def name(self) -> str:
        """The readable name in cache files and messages."""
        layout = "channels_last" if self.channels_last else "contiguous"
        geometry = f"k{self.size}s{self.stride}p{self.padding}d{self.dilation}"
        return f"{self.purpose}_{geometry}_{layout}_{self.dtype}{'_add' if self.add else ''}"


@dataclass(frozen=True)
class WindowSpec(UnrolledSpec):
    """The forward pass, or the gradient of the input.

    Attributes:
        gradient: Computes the gradient of the input.
        normalize: Applies FilterNorm to the spatial filter.
        columns: Places (see :class:`Stencil`) of a tile along the row.
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

    module: ClassVar[str] = "forward"

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return "window"

    @property
    def arguments(self) -> str:
        """A letter for each argument of the kernel."""
        return "ssss" + "f" + "i" * 12

    @property
    def purpose(self) -> str:
        """What it computes, for its name."""
        return "grad_input" if self.gradient else "forward"

    @cached_property
    def stencil(self) -> Stencil:
        """Which elements a tile reads."""
        make = grad_input_stencil if self.gradient else forward_stencil
        return make(self.size, self.stride, self.padding, self.dilation)

    @property
    def rows(self) -> int:
        """Places of a tile down the map: more share more of what they load, and need more registers."""
        return 2 if self.size == 3 and self.stride == 1 else 1

    @property
    def tile_lanes(self) -> int:
        """Tiles that the block's threads compute at the same time."""
        return self.threads // self.groups

    @property
    def tiles(self) -> int:
        """Tiles of a block."""
        return max(16, self.tile_lanes)

    def constants(self) -> dict[str, Any]:
        """Returns what the kernel takes as known, besides the functions of its dtype."""
        stencil = self.stencil
        rows, columns = stencil.uses(self.rows), stencil.uses(self.columns)
        filter_taps = stencil.taps if self.gradient else tuple(tap._replace(offset=0) for tap in stencil.taps)
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
            "STEP_IN": stencil.step_in,
            "STEP_OUT": stencil.step_out,
            "TOTALS": [
                (q, a, b)
                for q in range(Q)
                for a in range(self.rows * stencil.step_out)
                for b in range(stencil.step_out)
            ],
            "SOURCE_ROWS": rows,
            "ROW_STEPS": _steps(rows),
            "SOURCE_COLUMNS": tuple(columns),
            "COLUMN_STEPS": _steps(columns),
            "TAP_COLUMNS": {tap: _tap_columns(columns, tap, stencil.step_out) for tap in range(self.size)},
            "PIECES": pieces(list(columns), lanes, self.columns * stencil.step_in),
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


@dataclass(frozen=True)
class GradFiltersSpec(UnrolledSpec):
    """The gradients of both filters.

    Attributes:
        lanes: Elements that a thread owns: pixels of a row, or channels.
        source_lanes: Most elements of one load of the input along a row (contiguous).
        whole: The channels of a head fill every turn of a block (contiguous).
    """

    lanes: int
    source_lanes: int
    whole: bool

    module: ClassVar[str] = "grad_filters"
    warps: ClassVar[int] = KernelSpec.threads // WARP

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return "grad_filters"

    @property
    def arguments(self) -> str:
        """A letter for each argument of the kernel."""
        return "ccssss" + "i" * 10

    @property
    def steps(self) -> int:
        """Channels, or pixels, of one turn of a warp."""
        return steps(self.size, self.dtype)

    @property
    def pixels(self) -> int:
        """Pixels of a group: those that a thread owns, or those of one turn."""
        return self.steps if self.channels_last else self.lanes

    def constants(self) -> dict[str, Any]:
        """Returns what the kernel takes as known, besides the functions of its dtype."""
        stencil = forward_stencil(self.size, self.stride, self.padding, self.dilation)
        columns = stencil.uses(self.pixels)
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
            "FILTER_TAPS": stencil.taps,
            "ROW_STEPS": _steps(stencil.uses(1)),
            "COLUMN_STEPS": _steps(columns),
            "PIECES": pieces(list(columns), lanes, self.pixels * self.stride),
            "WHOLE": self.whole,
            "CHUNK": CHUNK[self.size],
            "PITCH": WARP + 4,  # rows of sums: no two that are read together start in the same bank
            "FILTER_PITCH": -(-(self.size**2) // 4) * 4,
        }


@dataclass(frozen=True)
class GenericSpec(KernelSpec):
    """One of the kernels that take any geometry: forward, grad_input, grad_channel or grad_spatial."""

    function: str

    module: ClassVar[str] = "generic"

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return self.function

    @property
    def name(self) -> str:
        """The readable name in cache files and messages."""
        return f"generic_{super().name}"

    @property
    def arguments(self) -> str:
        """A letter for each argument of the kernel."""
        return "ssss" + "i" * 24


@dataclass(frozen=True)
class FilterNormSpec(KernelSpec):
    """FilterNorm, or its gradient."""

    gradient: bool

    module: ClassVar[str] = "filter_norm"

    @property
    def kernel(self) -> str:
        """Name of the kernel's function."""
        return "filter_norm_backward" if self.gradient else "filter_norm"

    @property
    def arguments(self) -> str:
        """A letter for each argument of the kernel."""
        return ("sss" if self.gradient else "ss") + "f" + "i" * 7


def steps(size: int, dtype: str) -> int:
    """Returns the channels, or pixels, of one turn of the filters' gradients: more would need too many registers."""
    return 2 if size == 3 and dtype != "float64" else 1


def lanes_dividing(*sizes: int) -> int:
    """Returns the most elements of one load that divide all of these: 4, 2 or 1."""
    lanes = 4
    while any(size % lanes for size in sizes):
        lanes //= 2
    return lanes


# --- which elements a tile reads --------------------------------------------------------------------------------------


class Tap(NamedTuple):
    """One tap along one axis.

    Attributes:
        tap: Its index, 0 to K - 1.
        phase: Of the targets that it serves.
        offset: From the place of the target (u * step_in) to the source.
    """

    tap: int
    phase: int
    offset: int


class Use(NamedTuple):
    """One use of a source row (or column) by a tile: its place in the tile, the target there, and the tap."""

    place: int
    target: int
    tap: int


class TapColumns(NamedTuple):
    """The source columns that one tap reads for the places of a tile, and the phase of the targets that it serves."""

    phase: int
    offsets: tuple[int, ...]


class Piece(NamedTuple):
    """Columns that are loaded in one instruction: ``lanes`` from offset ``first`` of the tile on."""

    first: int
    lanes: int


@dataclass(frozen=True)
class Stencil:
    """The sources of a tile along one axis; both axes have the same.

    A *place* is a step along the map that every tile repeats: one target, or, for the gradient of the input, the
    ``stride`` targets of all phases.

    Attributes:
        taps: Of one axis.
        step_in: Source pixels from one place to the next.
        step_out: Target pixels from one place to the next.
    """

    taps: tuple[Tap, ...]
    step_in: int
    step_out: int

    def uses(self, places: int) -> dict[int, tuple[Use, ...]]:
        """Returns the source rows that a tile of this many places reads, by offset and in order, and their uses."""
        found: dict[int, list[Use]] = {}
        for place in range(places):
            for tap in self.taps:
                source = place * self.step_in + tap.offset
                found.setdefault(source, []).append(Use(place, place * self.step_out + tap.phase, tap.tap))
        return {source: tuple(found[source]) for source in sorted(found)}


def forward_stencil(kernel_size: int, stride: int, padding: int, dilation: int) -> Stencil:
    """Returns the stencil of the output, whose source is the input."""
    taps = tuple(Tap(index, 0, index * dilation - padding) for index in range(kernel_size))
    return Stencil(taps, step_in=stride, step_out=1)


def grad_input_stencil(kernel_size: int, stride: int, padding: int, dilation: int) -> Stencil:
    """Returns the stencil of the gradient of the input, whose source is the gradient of the output."""
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


def _steps(offsets: dict[int, Any]) -> dict[int, int]:
    """Returns the step from each offset's predecessor (or 0) to it."""
    order = list(offsets)
    return {offset: offset - before for before, offset in zip([0, *order], order, strict=False)}


def _tap_columns(columns: dict[int, tuple[Use, ...]], tap: int, step_out: int) -> TapColumns:
    found = sorted(
        (use.place, offset, use.target) for offset, uses in columns.items() for use in uses if use.tap == tap
    )
    return TapColumns(found[0][2] % step_out, tuple(offset for _, offset, _ in found))
