"""Which elements a tile of outputs reads: all that is known of the geometry before a kernel is compiled.

The forward pass and the gradient of the input are one calculation, a weighted sum over a window:

    target[u * step_out + a, v * step_out + b]
        = sum over the taps of weight * source[u * step_in + dy, v * step_in + dx]

Forward, the source is the input, ``step_in`` the stride, and there is one phase, a = b = 0. For the gradient the source
is the gradient of the output, and a pixel of the input is met only by the taps that its phase, its place modulo the
stride, allows: ``step_out`` is the stride, and every tap belongs to one phase along each axis.

A thread makes a tile of ``rows`` x ``columns`` places (u, v), with all their phases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


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
