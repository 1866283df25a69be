"""What the sizes of a program's inputs may be: which are free, which are not and why, and between which limits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from ddf_convert.errors import DDFError
from ddf_convert.export.result import Size

AXES = {0: "batch", 2: "height", 3: "width"}  # of (B, C, H, W)
_SMALLEST_TRACED = 2  # torch.export takes a size of 1 for one that is always 1, and has this for the least of others
_LOOKED_AT = 64  # sizes beyond twice the example's that are tried against the conditions of a program
_DEPENDS = "its forward calculates differently at other sizes"

Shape = tuple[Any, ...]  # numbers, and sympy expressions of what is free


@dataclass(frozen=True)
class Shapes:
    """The inputs of a program.

    Attributes:
        names: Of the tensors, in the program's order.
        shapes: Theirs.
        symbols: The symbols of sizes that are free, by our names for those.
        sizes: All sizes that could be free.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    symbols: dict[str, Any]
    sizes: tuple[Size, ...]

    def at(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Shapes in numbers.

        Args:
            sizes: By name; the example's where one is left out.
        """
        examples = {size.name: size.example for size in self.sizes}
        values = {symbol: sizes.get(name, examples[name]) for name, symbol in self.symbols.items()}
        return [_with(shape, values) for shape in self.shapes]

    def renamed(self, shape: Iterable[Any]) -> tuple[int | str, ...]:
        """A shape in numbers, and expressions of our names: ``8*height``."""
        names = {str(symbol): name for name, symbol in self.symbols.items()}
        return tuple(size if isinstance(size, int) else rename(str(size), names) for size in shape)


def rename(expression: str, names: Mapping[str, str]) -> str:
    """An expression with other names of its symbols."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), expression)


def fixed_by_conditions(shapes: Shapes) -> dict[str, str]:
    """What has a symbol, and no more than one value; why, by the names of axes."""
    fixed = {size.name: size.fixed for size in shapes.sizes if size.fixed and size.name in shapes.symbols}
    found: dict[str, str] = {}
    for name, why in fixed.items():
        axis = name.rpartition("_")[2]
        found |= dict.fromkeys([axis] if axis in AXES.values() else ["height", "width"], why)
    return found


def axes(tensor: Tensor) -> tuple[int, ...]:
    """Those that may be free: of batches of maps, all but the channels; of other batches, the batch."""
    return tuple(AXES) if tensor.dim() == 4 else (0,) if tensor.dim() else ()


def shape_of(node: torch.fx.Node) -> Shape:
    """Of what a node of a program makes."""
    sizes = (size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape)
    return tuple(int(size) if isinstance(size, int) or size.is_number else size for size in sizes)


def shapes_of(program: ExportedProgram, examples: list[Tensor], why_fixed: Callable[[int, int], str]) -> Shapes:
    """Looks at a program.

    Args:
        program: It.
        examples: Its inputs as they were given, in its order.
        why_fixed: Says of an axis, and its size, why it is not free.
    """
    wanted = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    nodes = [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    names, shapes = tuple(node.name for node in nodes), tuple(shape_of(node) for node in nodes)
    symbols: dict[str, Any] = {}
    fixed: dict[str, Size] = {}
    for input, shape, example in zip(names, shapes, examples, strict=True):
        for axis in axes(example):
            size, number, name = shape[axis], example.shape[axis], AXES[axis]
            if isinstance(size, int):
                if fixed.get(name) and fixed[name].example != number:
                    name = f"{input}_{name}"
                fixed[name] = fixed.get(name) or Size(name, number, fixed=why_fixed(axis, number))
            elif size.is_Symbol and size not in symbols.values():
                symbols[f"{input}_{name}" if name in symbols else name] = size
    for symbol in sorted({each for shape in shapes for size in shape for each in _symbols(size)}, key=str):
        if symbol not in symbols.values():  # that of no size as such: (B, C, 2*s, W)
            symbols[str(symbol)] = symbol
    found = {symbol: _in_example(symbol, shapes, examples) for symbol in symbols.values()}
    allowed = _conditions(program, names, shapes)
    free = [_limits(name, symbol, found, program, allowed) for name, symbol in symbols.items()]
    order = list(AXES.values())
    sizes = [*free, *(size for name, size in fixed.items() if name not in symbols)]
    return Shapes(
        names,
        shapes,
        symbols,
        tuple(sorted(sizes, key=lambda size: order.index(size.name) if size.name in order else 9)),
    )


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.free_symbols)


def _with(shape: Shape, values: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else int(size.subs(values)) for size in shape)


def _in_example(symbol: Any, shapes: Iterable[Shape], examples: Iterable[Tensor]) -> int:
    """What a symbol is in the example."""
    for shape, example in zip(shapes, examples, strict=True):
        for size, number in zip(shape, example.shape, strict=True):
            if _symbols(size) == {symbol}:
                for value in range(number + 1):
                    if int(size.subs(symbol, value)) == number:
                        return value
    raise DDFError(f"torch.export gives {symbol} for a size of the inputs, and nothing says what it is")


def _conditions(
    program: ExportedProgram, names: tuple[str, ...], shapes: tuple[Shape, ...]
) -> Callable[[Mapping[Any, int]], bool]:
    """Tells of sizes whether the program, which was made for those of the example, is right for them.

    Versions of torch that keep no conditions refuse, or fix in tracing, whatever would need any.
    """
    guards = getattr(program.module(), "_guards_fn", None)
    order = list(program.graph_signature.user_inputs)

    def allowed(values: Mapping[Any, int]) -> bool:
        if guards is None:
            return True
        tensors = iter([torch.empty(_with(shape, values), device="meta") for shape in shapes])
        try:
            guards(*[next(tensors) if leaf in names else leaf for leaf in order])
        except AssertionError:
            return False
        return True

    return allowed


def _limits(
    name: str,
    symbol: Any,
    examples: Mapping[Any, int],
    program: ExportedProgram,
    allowed: Callable[[Mapping[Any, int]], bool],
) -> Size:
    """What one size may be while the others are those of the example."""
    example, least, most = examples[symbol], 1, None
    bounds = program.range_constraints.get(symbol)
    if bounds is not None:
        least = 1 if bounds.lower <= _SMALLEST_TRACED else int(bounds.lower)
        most = int(bounds.upper) if bounds.upper.is_number and bounds.upper < 2**31 else None
    end = min(most or 2**31, 2 * example + _LOOKED_AT)
    fit = [size for size in range(least, end + 1) if allowed({**examples, symbol: size})]
    step = math.gcd(*fit) or 1
    if len(fit) < 2 or fit != list(range(fit[0], fit[-1] + 1, step)):  # with gaps that are no pattern
        return Size(name, example, fixed=_DEPENDS)
    return Size(name, example, fit[0], most if fit[-1] + step > end else fit[-1], step)
