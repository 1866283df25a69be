"""The sizes of a program's inputs: which are free, within which limits, and why others are fixed."""

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

AXES = {0: "batch", 2: "height", 3: "width"}  # of (B, C, H, W)
_SMALLEST_TRACED = 2  # torch.export specializes a size of 1, and reports 2 as the least of others
_SEARCH_MARGIN = 64  # sizes beyond twice the example's that are tried against the program's guards

Shape = tuple[Any, ...]  # numbers, and sympy expressions where a size is free


@dataclass(frozen=True)
class Size:
    """What one size of the inputs may be.

    Attributes:
        name: "batch", "height", "width"; prefixed by the input's name where inputs have sizes of their own.
        example: Its value in the example.
        least: The smallest allowed value, if it is free.
        most: The largest; None if nothing bounds it.
        multiple_of: Only multiples of this number are allowed.
        fixed: Why it always has the example's value; None if it is free.
    """

    name: str
    example: int
    least: int = 1
    most: int | None = None
    multiple_of: int = 1
    fixed: str | None = None

    def __str__(self) -> str:
        """Returns the size in words: ``33 or more``."""
        if self.fixed is not None:
            return f"fixed at {self.example}: {self.fixed}"
        limits = f"{self.least} to {self.most}" if self.most is not None else f"{self.least} or more"
        if self.multiple_of > 1:
            return f"multiples of {self.multiple_of}, {limits}"
        return "any" if limits == "1 or more" else limits


@dataclass(frozen=True)
class InputShapes:
    """The tensor inputs of a program.

    Attributes:
        names: Names of the tensors, in the program's order.
        shapes: Their shapes.
        symbols: The symbols of free sizes, by our names.
        sizes: All sizes that could be free.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    symbols: dict[str, Any]
    sizes: tuple[Size, ...]

    def at(self, sizes: Mapping[str, int]) -> list[tuple[int, ...]]:
        """Returns the shapes in numbers for sizes by name; one that is left out is the example's."""
        examples = {size.name: size.example for size in self.sizes}
        values = {symbol: sizes.get(name, examples[name]) for name, symbol in self.symbols.items()}
        return [_substitute(shape, values) for shape in self.shapes]

    def renamed(self, shape: Iterable[Any]) -> tuple[int | str, ...]:
        """Returns a shape in numbers and expressions of our names: ``8*height``."""
        names = {str(symbol): name for name, symbol in self.symbols.items()}
        return tuple(size if isinstance(size, int) else rename(str(size), names) for size in shape)

    def fixed_by_guards(self) -> dict[str, str]:
        """Returns why sizes that have a symbol still have one value, by the names of axes."""
        reasons: dict[str, str] = {}
        for size in self.sizes:
            if size.fixed and size.name in self.symbols:
                axis = size.name.rpartition("_")[2]
                reasons |= dict.fromkeys([axis] if axis in AXES.values() else ["height", "width"], size.fixed)
        return reasons


def rename(expression: str, names: Mapping[str, str]) -> str:
    """Replaces the symbols of an expression by other names."""
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), expression)


def free_axes(tensor: Tensor) -> tuple[int, ...]:
    """Returns the axes that may be free: all but the channels of (B, C, H, W), the batch of other tensors."""
    return tuple(AXES) if tensor.dim() == 4 else (0,) if tensor.dim() else ()


def node_shape(node: torch.fx.Node) -> Shape:
    """Returns the shape of a node's value."""
    sizes = (size if isinstance(size, int) else size.node.expr for size in node.meta["val"].shape)
    return tuple(int(size) if isinstance(size, int) or size.is_number else size for size in sizes)


def input_shapes(program: ExportedProgram, examples: list[Tensor], why_fixed: Callable[[int, int], str]) -> InputShapes:
    """Finds the free sizes of a program's inputs, and their limits.

    Args:
        program: The program.
        examples: The tensors it was traced with, in its order.
        why_fixed: Returns the reason why an axis, with its size, is not free.
    """
    inputs = set(program.graph_signature.user_inputs)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    nodes = [node for node in nodes if isinstance(node.meta.get("val"), Tensor)]
    names, shapes = tuple(node.name for node in nodes), tuple(node_shape(node) for node in nodes)
    symbols: dict[str, Any] = {}
    fixed: dict[str, Size] = {}
    for input, shape, example in zip(names, shapes, examples, strict=True):
        for axis in free_axes(example):
            size, number, name = shape[axis], example.shape[axis], AXES[axis]
            if isinstance(size, int):
                if fixed.get(name) and fixed[name].example != number:
                    name = f"{input}_{name}"
                fixed[name] = fixed.get(name) or Size(name, number, fixed=why_fixed(axis, number))
            elif size.is_Symbol and size not in symbols.values():
                symbols[f"{input}_{name}" if name in symbols else name] = size
    for symbol in sorted({each for shape in shapes for size in shape for each in _symbols(size)}, key=str):
        if symbol not in symbols.values():  # it stands in expressions only: (B, C, 2*s, W)
            symbols[str(symbol)] = symbol
    values = {symbol: _example_value(symbol, shapes, examples) for symbol in symbols.values()}
    accepts = _guards(program, names, shapes)
    sizes = [_limits(name, symbol, values, program, accepts) for name, symbol in symbols.items()]
    sizes += [size for name, size in fixed.items() if name not in symbols]
    order = list(AXES.values())
    sizes.sort(key=lambda size: order.index(size.name) if size.name in order else len(order))
    return InputShapes(names, shapes, symbols, tuple(sizes))


def _symbols(size: Any) -> set[Any]:
    return set() if isinstance(size, int) else set(size.free_symbols)


def _substitute(shape: Shape, values: Mapping[Any, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else int(size.subs(values)) for size in shape)


def _example_value(symbol: Any, shapes: Iterable[Shape], examples: Iterable[Tensor]) -> int:
    """Returns the value of a symbol in the example."""
    for shape, example in zip(shapes, examples, strict=True):
        for size, number in zip(shape, example.shape, strict=True):
            if _symbols(size) == {symbol}:
                for value in range(number + 1):
                    if int(size.subs(symbol, value)) == number:
                        return value
    raise DDFError(f"torch.export gives {symbol} for a size of the inputs, and nothing says what it is")


def _guards(
    program: ExportedProgram, names: tuple[str, ...], shapes: tuple[Shape, ...]
) -> Callable[[Mapping[Any, int]], bool]:
    """Returns a function that says whether the program, traced for the example's sizes, is right for other sizes.

    Versions of torch that keep no guards refuse, or fix in tracing, whatever would need any.
    """
    guards = getattr(program.module(), "_guards_fn", None)
    order = list(program.graph_signature.user_inputs)

    def accepts(values: Mapping[Any, int]) -> bool:
        if guards is None:
            return True
        tensors = iter([torch.empty(_substitute(shape, values), device="meta") for shape in shapes])
        try:
            guards(*[next(tensors) if leaf in names else leaf for leaf in order])
        except AssertionError:
            return False
        return True

    return accepts


def _limits(
    name: str,
    symbol: Any,
    examples: Mapping[Any, int],
    program: ExportedProgram,
    accepts: Callable[[Mapping[Any, int]], bool],
) -> Size:
    """Returns what one size may be while the others are those of the example."""
    example, least, most = examples[symbol], 1, None
    bounds = program.range_constraints.get(symbol)
    if bounds is not None:
        least = 1 if bounds.lower <= _SMALLEST_TRACED else int(bounds.lower)
        most = int(bounds.upper) if bounds.upper.is_number and bounds.upper < 2**31 else None
    end = min(most or 2**31, 2 * example + _SEARCH_MARGIN)
    accepted = [size for size in range(least, end + 1) if accepts({**examples, symbol: size})]
    step = math.gcd(*accepted) or 1
    if len(accepted) < 2 or accepted != list(range(accepted[0], accepted[-1] + 1, step)):  # irregular gaps
        return Size(name, example, fixed="its forward calculates differently at other sizes")
    return Size(name, example, accepted[0], most if accepted[-1] + step > end else accepted[-1], step)
