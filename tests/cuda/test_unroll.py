"""How CUDA kernels are written out before Numba sees them, and which elements a tile reads."""
# ruff: noqa: F821  # what these kernels know comes from outside, as in the package

from __future__ import annotations

import itertools
import linecache
import math
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from numba.core import types

from ddf_convert import ops
from ddf_convert.cuda import kernel_spec
from ddf_convert.cuda.codegen.unroll import registers, specialize, static
from ddf_convert.cuda.kernel_spec import Piece, pieces

# --- unroll.py --------------------------------------------------------------------------------------------------------


def source(function: Callable[..., None]) -> str:
    """What became of a kernel: tracebacks show the same."""
    return "".join(linecache.getlines(function.__code__.co_filename))


def test_static_loops_are_written_out_and_registers_become_variables() -> None:
    def kernel(out, values):
        """Is left out."""
        total = registers()
        for row, (down, across) in static(PLACES):
            total[row, -1] = 0
            for step in static(range(down)):
                total[row, -1] = total[row, -1] + values[across + step] * SCALE
        for row in static(range(len(PLACES))):
            out[row] = total[row, -1]

    made = specialize(kernel, "made", {"PLACES": ((0, (2, 0)), (1, (1, 3))), "SCALE": 10})
    assert made.__name__ == "made"
    assert source(made).splitlines() == [
        "def made(out, values):",
        "    total_0_m1 = 0",
        "    total_0_m1 = total_0_m1 + values[0] * 10",
        "    total_0_m1 = total_0_m1 + values[1] * 10",
        "    total_1_m1 = 0",
        "    total_1_m1 = total_1_m1 + values[3] * 10",
        "    out[0] = total_0_m1",
        "    out[1] = total_1_m1",
    ]
    out = [0, 0]
    made(out, [1, 2, 3, 4])
    assert out == [30, 40]


def test_known_conditions_keep_one_branch() -> None:
    def kernel(out, x):
        if WIDE and LANES > 2:
            out[0] = x if LANES == 4 else -x
        elif x > 0:
            out[0] = 1
        if not WIDE:
            out[1] = 2
        if WIDE or x > LANES:
            out[2] = 3
        if x > 0 and LANES > 2:
            out[3] = 4
        out[4] = (x > 1) & (WIDE or x > 5)

    wide = specialize(kernel, "wide", {"WIDE": True, "LANES": 4})
    assert source(wide).splitlines()[1] == "    out[0] = x"
    assert source(wide).splitlines()[-1] == "    out[4] = x > 1"
    assert "LANES" not in source(wide)
    narrow = specialize(kernel, "narrow", {"WIDE": False, "LANES": 1})
    assert "elif" not in source(narrow)
    for x, constants in itertools.product((-1, 1, 2, 7), ({"WIDE": True, "LANES": 4}, {"WIDE": False, "LANES": 1})):
        plain: list[Any] = [None] * 5
        FunctionType(kernel.__code__, {**constants})(plain, x)
        made: list[Any] = [None] * 5
        (wide if constants["WIDE"] else narrow)(made, x)
        assert made == plain


def test_loops_over_what_is_not_known_stay_loops() -> None:
    def kernel(out, count):
        for turn in range(FIRST, count, STEP):
            for lane in static(range(2)):
                out[turn + lane] = turn * 10 + lane

    made = specialize(kernel, "made", {"FIRST": 0, "STEP": 2})
    assert "for turn in range(0, count, 2):" in source(made)
    out = [0] * 4
    made(out, 4)
    assert out == [0, 1, 20, 21]


def test_tuples_are_written_out() -> None:
    def kernel(out):
        values = registers()
        for lane in static(range(LANES)):
            values[lane] = lane * 1.5
        out[0] = tuple(values[LANES - 1 - lane] for lane in static(range(LANES)))
        lane = 7  # a variable of the kernel's own again, after the loops
        out[1] = lane

    made = specialize(kernel, "made", {"LANES": 3})
    assert "out[0] = (values_2, values_1, values_0)" in source(made)
    out: list[Any] = [None, None]
    made(out)
    assert out == [(3.0, 1.5, 0.0), 7]


def test_functions_and_types_become_globals() -> None:
    def kernel(out, x):
        for lanes in static((1, 2)):
            out[lanes] = DOUBLE[lanes](x, COMPUTE(2) * COMPUTE(0.5))

    functions = {1: lambda x, y: x + y, 2: lambda x, y: 2 * x + y}
    made = specialize(kernel, "made", {"DOUBLE": functions, "COMPUTE": np.float32})
    assert functions[1] in made.__globals__.values()
    out = [None] * 3
    made(out, 3.0)
    assert out == [None, 4.0, 7.0]
    # The types of Numba are functions of numbers that are known: their products are, too.
    folded = specialize(kernel, "folded", {"DOUBLE": functions, "COMPUTE": types.float32})
    assert "COMPUTE" not in source(folded)


def test_two_kernels_of_one_function_do_not_share_anything() -> None:
    def kernel(out):
        out[0] = VALUE

    first, second = (specialize(kernel, "same", {"VALUE": value}) for value in (1, 2))
    out = [0]
    first(out)
    assert out == [1]
    second(out)
    assert out == [2]


def _unknown_loop(out, count):
    for turn in static(range(count)):
        out[turn] = 0


def _unknown_tuple(out, count):
    out[0] = tuple(turn for turn in range(count))


def _unknown_index(out, count):
    values = registers()
    values[count] = 0


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (_unknown_loop, "line 2: what a static loop goes over must be known: static(range(count))"),
        (_unknown_tuple, "line 2: what a static loop goes over must be known: range(count)"),
        (_unknown_index, "line 3: the index of a register must be known: values[count]"),
    ],
)
def test_what_must_be_known_and_is_not_is_named(kernel: Callable[..., None], words: str) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        specialize(kernel, "made", {})


def test_only_functions_are_specialized() -> None:
    class Kernel:
        pass

    with pytest.raises(TypeError, match="is not a function"):
        specialize(Kernel, "made", {})
    with pytest.raises(NotImplementedError, match="only in kernels"):
        registers()


# --- kernel_spec.py: which elements a tile reads ----------------------------------------------------------------------

GEOMETRIES = [
    (size, stride, padding, dilation)
    for size in (1, 3, 5, 7)
    for stride in (1, 2, 3)
    for padding in (0, 1, 2, 3, 5)
    for dilation in (1, 2, 3)
]


def pairs(size: int, stride: int, padding: int, dilation: int, length: int) -> set[tuple[int, int, int]]:
    """(output, input, tap) along an axis, by the operator's definition."""
    count = ops.output_size(length, size, stride, padding, dilation)
    return {
        (output, output * stride - padding + tap * dilation, tap)
        for output in range(count)
        for tap in range(size)
        if 0 <= output * stride - padding + tap * dilation < length
    }


@pytest.mark.parametrize("places", [1, 2, 4])
def test_tiles_meet_every_pair_of_the_definition_once(places: int) -> None:
    checked = 0
    for geometry, length in itertools.product(GEOMETRIES, (9, 10)):
        outputs = ops.output_size(length, *geometry)
        if outputs < 1:
            continue
        expected = pairs(*geometry, length)
        for gradient in (False, True):
            made = (kernel_spec.grad_input_stencil if gradient else kernel_spec.forward_stencil)(*geometry)
            targets, sources = (length, outputs) if gradient else (outputs, length)
            across = math.ceil(targets / made.step_out)
            found = [
                (target, at, use.tap)
                for first in range(0, across, places)
                for offset, uses in made.uses(places).items()
                for use in uses
                if 0 <= (at := first * made.step_in + offset) < sources
                and (target := first * made.step_out + use.target) < targets
            ]
            met = [(at, target, tap) if gradient else (target, at, tap) for target, at, tap in found]
            assert len(met) == len(set(met)), (geometry, gradient)
            assert set(met) == expected, (geometry, gradient)
            checked += 1
    assert checked > 600


def test_uses_name_the_place_that_owns_the_target() -> None:
    for geometry in GEOMETRIES:
        for make in (kernel_spec.forward_stencil, kernel_spec.grad_input_stencil):
            made = make(*geometry)
            for uses in made.uses(4).values():
                for place, target, tap in uses:
                    phase = next(each.phase for each in made.taps if each.tap == tap)
                    assert target == place * made.step_out + phase


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("base", [1, 2, 4, 8])
def test_pieces_cover_the_columns_and_never_cross_the_border(lanes: int, base: int) -> None:
    for columns in ([-1, 0, 1, 2, 3, 4], [0, 1, 2, 3], [-3, -1, 1, 3], [-6, 0, 5, 6, 7, 12], [2], list(range(-7, 9))):
        made = pieces(columns, lanes, base)
        loaded = [column for piece in made for column in range(piece.first, piece.first + piece.lanes)]
        assert len(loaded) == len(set(loaded))
        assert set(loaded) >= set(columns)
        for piece in made:
            assert piece.lanes in (1, 2, 4)
            assert piece.lanes <= lanes
            assert len(set(columns) & set(range(piece.first, piece.first + piece.lanes))) >= min(2, piece.lanes)
            # Wherever a tile begins, the load is aligned, and its columns are all inside of a row of whole loads, or
            # all outside.
            assert (base + piece.first) % piece.lanes == piece.first % piece.lanes == 0


def test_a_tile_of_four_columns_is_a_vector_and_its_neighbors() -> None:
    assert pieces([-1, 0, 1, 2, 3, 4], 4, 4) == (Piece(-1, 1), Piece(0, 4), Piece(4, 1))
