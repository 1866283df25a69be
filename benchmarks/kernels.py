"""What the compilers make of the CUDA kernels: registers, shared memory, spills. Needs no GPU.

    python benchmarks/kernels.py                                         every kernel for sm_75, 80, 90 and 100
    python benchmarks/kernels.py --arch 90 --kernel 'forward_*'          some of them
    python benchmarks/kernels.py --arch 90 --sass 'forward_k3s1*'        instructions of the innermost loop

Kernels are compiled to PTX by Numba-CUDA, then assembled by ptxas, which comes with CUDA's toolkit and with the package
triton (so with torch on Linux); --sass needs nvdisasm from the same places. Exit code: 1 if a kernel spills registers
or uses local memory.
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import functools
import importlib.util
import itertools
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from common import markdown
from common.results import script_parser
from gpu.cases import Case, MapGeometry, kernels_of
from rich.console import Console
from rich.table import Table

from ddf_convert.bench.measure import DTYPES, LAYOUTS
from ddf_convert.cuda.codegen.ptx import Capability, compile_ptx
from ddf_convert.cuda.kernel_spec import FilterNormSpec, GenericSpec, GradFiltersSpec, KernelSpec, Q, WindowSpec

ARCHITECTURES = ((7, 5), (8, 0), (9, 0), (10, 0))
# Of one multiprocessor: threads, registers, bytes of shared memory, blocks (CUDA C++ Programming Guide, appendix on
# compute capabilities).
MULTIPROCESSOR = {
    (7, 5): (1024, 65536, 64 * 1024, 16),
    (8, 0): (2048, 65536, 164 * 1024, 32),
    (9, 0): (2048, 65536, 228 * 1024, 32),
    (10, 0): (2048, 65536, 228 * 1024, 32),
}
RESERVED = 1024  # bytes of shared memory that each block takes besides its own, from sm_80 on


class Usage(NamedTuple):
    """A kernel's registers of a thread, and bytes of memory, by ptxas."""

    registers: int
    stack: int
    spilled: int
    shared: int


class Compiled(NamedTuple):
    """A kernel for one architecture; usage is None without ptxas."""

    variant: KernelSpec
    capability: Capability
    ptx_bytes: int
    usage: Usage | None


def variants(
    dtypes: Sequence[str] = tuple(DTYPES), sizes: Sequence[int] = (3, 5, 7), strides: Sequence[int] = (1, 2)
) -> list[KernelSpec]:
    """Returns the kernels of layers with 256 channels on 56x56 maps, and the generic ones."""
    cases = (
        Case(size, dtype, layout, MapGeometry(56, 56, stride), channels=256, heads=1, combine="mul")
        for dtype, layout, size, stride in itertools.product(dtypes, LAYOUTS, sizes, strides)
    )
    found = kernels_of(cases, normalized=True)
    for dtype in dtypes:
        for function in ("forward", "grad_input", "grad_channel", "grad_spatial"):
            found.setdefault(GenericSpec(dtype, False, function))
        for gradient in (False, True):
            found.setdefault(FilterNormSpec(dtype, False, gradient))
    return list(found)


def label(variant: KernelSpec) -> str:
    """Returns the variant's name, with an ending if it normalizes."""
    return f"{variant.name}_normalized" if isinstance(variant, WindowSpec) and variant.normalize else variant.name


@functools.cache
def tool(name: str) -> str | None:
    """Returns the path of a tool of CUDA's toolkit, from the PATH or the package triton; None if there is none.

    It is the first that is no older than NVVM: ptxas takes no PTX newer than itself, and triton has two of them.
    """
    triton = importlib.util.find_spec("triton")
    folder = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin") if triton and triton.origin else ""
    places = [shutil.which(name), shutil.which(name, path=folder), shutil.which(f"{name}-blackwell", path=folder)]
    found = [place for place in places if place]
    return next((place for place in found if release(place) >= nvvm()), None)


def release(tool: str) -> tuple[int, ...]:
    """Returns the release of CUDA that a tool belongs to."""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.findall(r"V(\d+)\.(\d+)", text)[0]))


def nvvm() -> tuple[int, ...]:
    """Returns the release of CUDA whose PTX Numba-CUDA makes."""
    for package in ("nvidia-nvvm", "nvidia-cuda-nvcc-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return tuple(map(int, metadata.version(package).split(".")[:2]))
    return ()  # a toolkit that was installed by hand, with its ptxas


def assemble(ptx: str, capability: Capability, output: Path | None = None) -> Usage:
    """Assembles a kernel; returns its registers and memory."""
    ptxas = tool("ptxas")
    assert ptxas is not None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = output or Path(folder) / "kernel.cubin"
        arguments = [ptxas, "-v", f"-arch=sm_{capability[0]}{capability[1]}", str(source), "-o", str(target)]
        result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas: {result.stderr.strip()}")

    def number(pattern: str) -> int:
        match = re.search(pattern, result.stderr)
        return int(match[1]) if match else 0

    return Usage(
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared=number(r"(\d+) bytes smem"),
    )


def blocks_each(compiled: Compiled) -> int:
    """Returns the blocks that one multiprocessor can hold."""
    assert compiled.usage is not None
    threads, registers, shared, blocks = MULTIPROCESSOR[compiled.capability]
    per_warp = -(-compiled.usage.registers * 32 // 256) * 256
    warps = compiled.variant.threads // 32
    reserved = RESERVED if compiled.capability >= (8, 0) else 0
    return min(
        blocks,
        threads // compiled.variant.threads,
        registers // (per_warp * warps),
        shared // max(1, compiled.usage.shared + reserved),
    )


def compile_each(variant: KernelSpec, capabilities: Sequence[Capability]) -> dict[Capability, str]:
    """Returns PTX for several architectures.

    Unlike ``compile_ptx`` for each, Numba's part, which takes most of the time, is done once for all that share it.
    """
    from numba.cuda import compiler

    made: dict[Capability, str] = {}
    for _, group in itertools.groupby(capabilities, key=lambda each: variant.dtype == "bfloat16" and each < (8, 0)):
        first, *others = group
        libraries: list[Any] = []
        compile_function = compiler._compile_pyfunc_with_fixup

        def remember(*arguments: Any, **options: Any) -> Any:
            result = compile_function(*arguments, **options)  # noqa: B023
            libraries.append(result[0])  # noqa: B023
            return result

        with mock.patch.object(compiler, "_compile_pyfunc_with_fixup", remember):
            made[first] = compile_ptx(variant, first)
        made |= {other: "\n".join(libraries[-1].get_asm_strs(cc=other)) for other in others}
    return made


def compiled(task: tuple[KernelSpec, Sequence[Capability]]) -> list[Compiled]:
    variant, capabilities = task
    return [
        Compiled(variant, capability, len(ptx), assemble(ptx, capability) if tool("ptxas") else None)
        for capability, ptx in compile_each(variant, capabilities).items()
    ]


# --- the instructions of a loop ---------------------------------------------------------------------------------------

CLASSES = {
    "multiply, add": ("FMUL", "FFMA", "FADD", "DMUL", "DFMA", "DADD"),
    "load, map": ("LDG",),
    "load, shared": ("LDS",),
    "store": ("STG", "STS"),
    "convert": ("F2FP", "F2F", "HADD2", "PRMT", "SHF", "LOP3"),
    "zero, move": ("CS2R", "MOV", "HFMA2"),
    "address, predicate": ("IADD3", "IMAD", "LEA", "ISETP", "VIADD", "PLOP3", "P2R", "R2P", "SEL"),
}


def loop_instructions(ptx: str, capability: Capability) -> collections.Counter[str]:
    """Counts the machine instructions of the shortest loop with most of the arithmetic, by opcode."""
    nvdisasm = tool("nvdisasm")
    if nvdisasm is None or tool("ptxas") is None:
        raise SystemExit("--sass needs ptxas and nvdisasm: of CUDA's toolkit, or pip install triton")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        assemble(ptx, capability, cubin)
        text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in text.splitlines():
        if mark := re.match(r"(\.L_x_\d+):", line):
            labels[mark[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*)", line):
            instructions.append((found[1], found[2]))
    loops = [
        instructions[labels[target[0]] : place + 1]
        for place, (opcode, rest) in enumerate(instructions)
        if opcode == "BRA" and (target := re.search(r"\.L_x_\d+", rest)) and labels.get(target[0], place + 1) <= place
    ]
    counts = [collections.Counter(opcode for opcode, _ in loop) for loop in loops]
    most = max((_arithmetic(count) for count in counts), default=0)
    return min((count for count in counts if _arithmetic(count) == most), key=lambda count: count.total())


def _arithmetic(count: collections.Counter[str]) -> int:
    return sum(count[opcode] for opcode in CLASSES["multiply, add"])


def elements(variant: KernelSpec) -> int:
    """Returns the elements of the map that a thread works on in one turn of the loop."""
    if isinstance(variant, WindowSpec):
        return Q * variant.rows * variant.columns * variant.stencil.step_out**2
    return variant.steps * variant.lanes if isinstance(variant, GradFiltersSpec) else 1


def sass_table(chosen: list[KernelSpec], capability: Capability) -> Iterator[tuple[str, ...]]:
    yield ("kernel", "all", *CLASSES, "other")
    for variant in chosen:
        if not isinstance(variant, WindowSpec | GradFiltersSpec):
            continue
        count = loop_instructions(compile_ptx(variant, capability), capability)
        each = elements(variant)
        parts = [sum(count[opcode] for opcode in opcodes) for opcodes in CLASSES.values()]
        figures = [count.total(), *parts, count.total() - sum(parts)]
        yield (label(variant), *(f"{figure / each:.1f}" for figure in figures))


# --- output -----------------------------------------------------------------------------------------------------------


def usage_table(results: list[Compiled]) -> Iterator[tuple[str, ...]]:
    by_variant: dict[KernelSpec, list[Compiled]] = collections.defaultdict(list)
    for result in results:
        by_variant[result.variant].append(result)
    capabilities = list(dict.fromkeys(result.capability for result in results))
    names = [f"sm_{major}{minor}" for major, minor in capabilities]
    yield ("kernel", "shared memory", *(f"{name}: registers, blocks" for name in names), "spilled bytes")
    for variant, found in by_variant.items():
        usages = [each.usage for each in found if each.usage]
        if not usages:
            yield (label(variant), *["no ptxas"] * (len(found) + 2))
            continue
        cells = [f"{each.usage.registers}, {blocks_each(each)}" for each in found if each.usage]
        spilled = sum(usage.spilled + usage.stack for usage in usages)
        yield (label(variant), str(usages[0].shared), *cells, str(spilled))


def versions() -> str:
    words = [f"{name} {metadata.version(name)}" for name in ("numba-cuda", "numba")]
    ptxas = tool("ptxas")
    if ptxas:
        text = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=True).stdout
        words.append("ptxas " + re.findall(r"V([\d.]+)", text)[0])
    return ", ".join(words)


def main() -> int:
    parser = script_parser(__doc__)
    known = [f"{major}{minor}" for major, minor in ARCHITECTURES]
    parser.add_argument("--arch", nargs="+", choices=known, default=known, help="default: all")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--kernel", default="*", metavar="GLOB", help="names, such as 'grad_input_k3s1*_bfloat16'")
    parser.add_argument("--sass", metavar="GLOB", help="count the instructions of these kernels' loops instead")
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    capabilities = [ARCHITECTURES[known.index(name)] for name in options.arch]
    chosen = [each for each in variants(options.dtype) if fnmatch.fnmatch(label(each), options.sass or options.kernel)]
    if not chosen:
        parser.error(f"no kernel is called {options.sass or options.kernel}")
    spilled = False
    if options.sass:
        rows = list(sass_table(chosen, capabilities[0]))
        title = f"Instructions for each element of the map, sm_{options.arch[0]}"
    else:
        tasks = [(variant, capabilities) for variant in chosen]
        with ProcessPoolExecutor(
            options.jobs, multiprocessing.get_context("spawn"), initializer=logging.disable
        ) as pool:
            results = [each for found in pool.map(compiled, tasks) for each in found]
        rows = list(usage_table(results))
        spilled = any(each.usage.spilled or each.usage.stack for each in results if each.usage)
        title = "Registers of a thread and blocks that a multiprocessor can hold"
    table = Table(*rows[0], title=f"{title} ({versions()})")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    if options.output:
        text = "\n".join(markdown.table(rows[0], rows[1:]))
        options.output.write_text(f"# {title}\n\nCompiled with {versions()}; not run.\n\n{text}")
    if spilled:
        print("some kernels spill registers or use local memory", file=sys.stderr)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
