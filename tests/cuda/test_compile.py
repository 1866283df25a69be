"""Every CUDA kernel compiles for every architecture, without local memory, calls or spills. Needs no GPU.

Compiling all of them takes a quarter of an hour of CPU time, nearly all of it Numba's. `make test` compiles those of
``usual``; the rest are marked ``long``, for `make test-long`. Of kernels larger than 3x3, those for float16, for stride
2, and those that normalize are left to `make kernels`, which compiles all there are.
"""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import pytest

pytest.importorskip("numba_cuda")

import kernels

from ddf_convert.cuda.codegen.ptx import Capability, entry
from ddf_convert.cuda.kernel_spec import GradFiltersSpec, KernelSpec, WindowSpec

LARGER = [dtype for dtype in kernels.DTYPES if dtype != "float16"]
CASES = kernels.variants(sizes=(3,)) + [
    variant
    for variant in kernels.variants(LARGER, sizes=(5, 7), strides=(1,))
    if isinstance(variant, WindowSpec | GradFiltersSpec) and not (isinstance(variant, WindowSpec) and variant.normalize)
]

# The two halves differ in how they are loaded and stored: they take turns, from purpose to purpose.
DTYPES = ["float32", "float64", "half"]
HALVES = ["float16", "bfloat16"]
PURPOSES = ["forward", "forward_normalized", "grad_input", "grad_filters"]
# One of those that come nearest to the 255 registers of a thread (benchmarks/results/cuda_kernels.md), and to spilling.
LARGER_USUAL = {"grad_filters_k5s1p2d1_channels_last_float64"}


def traits(variant: WindowSpec | GradFiltersSpec) -> tuple[str, str, bool, int]:
    """What a 3x3 kernel is for, and for which tensors: dtype (or half), purpose, channels_last, stride."""
    dtype = "half" if variant.dtype in HALVES else variant.dtype
    normalized = "_normalized" if isinstance(variant, WindowSpec) and variant.normalize else ""
    return dtype, variant.purpose + normalized, variant.channels_last, variant.stride


@functools.cache
def compiled(variant: KernelSpec) -> dict[Capability, str]:
    """PTX for every architecture."""
    return kernels.compile_each(variant, kernels.ARCHITECTURES)


def usual(variant: KernelSpec) -> bool:
    """Whether `make test` compiles it: of the 3x3 kernels a fifth, so chosen that any two traits meet in one."""
    if not isinstance(variant, WindowSpec | GradFiltersSpec):
        return True
    if variant.size > 3:
        return kernels.label(variant) in LARGER_USUAL
    dtype, purpose, channels_last, stride = traits(variant)
    row, column = DTYPES.index(dtype), PURPOSES.index(purpose)
    if dtype == "half" and variant.dtype != HALVES[column % 2]:
        return False
    return channels_last == (row + column) % 2 and stride - 1 == (row // 2 + column // 2) % 2


def marked(variant: KernelSpec) -> Any:
    return pytest.param(variant, marks=() if usual(variant) else pytest.mark.long, id=kernels.label(variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [marked(variant) for variant in CASES])
def test_compiles_for_every_architecture(variant: KernelSpec) -> None:
    made = compiled(variant)
    assert set(made) == set(kernels.ARCHITECTURES)
    for (major, minor), ptx in made.items():
        assert f".target sm_{major}{minor}" in ptx
        assert re.fullmatch(r"\w+", entry(ptx))
        assert ptx.count(".entry") == 1
        assert "__local_depot" not in ptx
        assert not re.search(r"^\s*call", ptx, re.MULTILINE)
        loads = set(re.findall(r"ld\.global\.nc(?:\.v\d)?\.\w+", ptx))
        if isinstance(variant, WindowSpec):
            assert _widest(variant) in loads
    if kernels.tool("ptxas") is None:
        pytest.skip("PTX is right; no ptxas here to assemble it with")
    usage = {capability: kernels.assemble(ptx, capability) for capability, ptx in made.items()}
    print({f"sm_{major}{minor}": each.registers for (major, minor), each in usage.items()}, "registers")
    assert not any(each.spilled or each.stack for each in usage.values()), usage
    assert all(each.shared <= 48 * 1024 for each in usage.values()), usage


def _widest(variant: WindowSpec) -> str:
    """The load of as many elements as a tile can take at once, on maps of 56 columns or 28 and 256 channels."""
    lanes = 4 if variant.channels_last else min(4, variant.columns * variant.stencil.step_in)
    words = {"float64": (lanes, "b64"), "float32": (lanes, "b32")}.get(variant.dtype, (lanes // 2, "b32"))
    most = 16 // (8 if words[1] == "b64" else 4)
    count = min(words[0], most)
    return f"ld.global.nc{f'.v{count}' if count > 1 else ''}.{words[1]}"


def test_cases_are_all_there() -> None:
    assert len(CASES) == len(set(CASES)) == 2 * 2 * 4 * 4 + 4 * 6 + 2 * (3 * 3 + 2 * 3)


def test_any_two_traits_meet_in_a_usual_case() -> None:
    small = [variant for variant in CASES if isinstance(variant, WindowSpec | GradFiltersSpec) and variant.size == 3]
    for first, second in itertools.combinations(range(4), 2):
        pairs = {(traits(variant)[first], traits(variant)[second]) for variant in small}
        assert {(traits(each)[first], traits(each)[second]) for each in small if usual(each)} == pairs
    assert sum(map(usual, small)) == 12
    assert {each.dtype for each in small if usual(each)} == set(kernels.DTYPES)
    assert {kernels.label(each) for each in CASES if usual(each)} >= LARGER_USUAL


@pytest.mark.slow
@pytest.mark.skipif(kernels.tool("nvdisasm") is None, reason="no nvdisasm here")
def test_the_loop_of_the_forward_kernel() -> None:
    """18 instructions an element are the arithmetic; the rest stays below ten (docs/kernels.md)."""
    for variant in CASES:
        if kernels.label(variant) in ("forward_k3s1p1d1_contiguous_float32", "forward_k3s1p1d1_channels_last_float32"):
            assert isinstance(variant, WindowSpec)
            count = kernels.loop_instructions(compiled(variant)[9, 0], (9, 0))
            arithmetic = count["FMUL"] + count["FFMA"]
            assert arithmetic == 18 * kernels.elements(variant)
            assert count["STG"] * 4 == kernels.elements(variant)
            assert count.total() < 28 * kernels.elements(variant)
            assert not count["LDL"] + count["STL"]
