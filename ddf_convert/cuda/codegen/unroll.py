"""Unrolls kernels before Numba sees them: ordinary Python in, straight-line Python out.

A tile of outputs must stay in registers, which cannot be indexed at run time. So the loops over a tile must be unrolled
and every index be a constant; for a long loop LLVM does not guarantee that. In a kernel, a plain Python function,

* names in ``constants`` (and loop variables over them) have their value, and expressions of them are evaluated;
* ``for x in static(...)`` is unrolled, and an ``if`` with a known test keeps one branch;
* ``tuple(... for x in static(...))`` is written out;
* ``acc = registers()`` makes ``acc[i, j]``, whose indices are known, a variable of its own.

The same specialized source runs in Numba's CUDA simulator.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, NoneType
from typing import Any

from numba.core import types

_LITERALS = (bool, int, float)
_ARITHMETIC = (
    *(ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp),
    *(ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
)


def static(values: Any) -> Any:
    """Marks a loop to unroll."""
    return values


def registers() -> Any:
    """Marks a variable as a set of registers with known indices."""
    raise NotImplementedError("registers() stands only in kernels, which are specialized first")


def specialize(function: Callable[..., None], name: str, constants: dict[str, Any]) -> Callable[..., None]:
    """Returns the function, called ``name``, with its constants inserted and its static loops unrolled.

    Numbers among the constants become literals, also those taken from tuples and objects; callables become globals.
    Tracebacks and debuggers can show the new source. A static loop or an index of a register that is not known raises
    TypeError.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise TypeError(f"{function!r} is not a function")
    definition.name = name
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    unroller = _Unroller(constants)
    definition.body = unroller.block(_without_docstring(definition.body))
    source = ast.unparse(tree) + "\n"
    file = f"<ddf_convert {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {**inspect.unwrap(function).__globals__, **unroller.objects}
    exec(compile(source, file, "exec"), scope)
    specialized: Callable[..., None] = scope[name]
    return specialized


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    has_one = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if has_one else body


class _Expression:
    """The properties of an expression that do not depend on what is known; cached, as loops repeat them."""

    def __init__(self, node: ast.expr) -> None:
        parts = list(ast.walk(node))
        names = [each for each in parts if isinstance(each, ast.Name)]
        called = [each.func for each in parts if isinstance(each, ast.Call)]
        self.node = node
        self.names = {each.id for each in names}
        self.needed = {name for name in self.names if not hasattr(builtins, name)}
        self.called = {each.id for each in called if isinstance(each, ast.Name)}
        self.only_reads = all(isinstance(each.ctx, ast.Load) for each in names)
        self.only_calls_names = all(isinstance(each, ast.Name) for each in called)
        self.is_arithmetic = not isinstance(node, ast.Constant) and all(isinstance(each, _ARITHMETIC) for each in parts)

    @functools.cached_property
    def code(self) -> CodeType:
        return compile(ast.fix_missing_locations(ast.Expression(self.node)), "<constant>", "eval")


class _Unroller(ast.NodeVisitor):
    """Makes new statements and expressions; those of the kernel are left unchanged, for the next turn of a loop."""

    def __init__(self, constants: dict[str, Any]) -> None:
        self.known = dict(constants)
        self.registers: set[str] = set()
        self.objects: dict[str, Any] = {}
        self._read = functools.cache(_Expression)

    def block(self, nodes: Iterable[ast.AST]) -> list[Any]:
        """Transforms each statement (or expression)."""
        made = []
        for node in nodes:
            result = self.visit(node)
            made.extend(result if isinstance(result, list) else [result])
        return made

    def generic_visit(self, node: ast.AST) -> Any:
        """Returns the same node with its parts transformed."""
        return type(node)(**{name: self._part(value) for name, value in ast.iter_fields(node)})

    def _part(self, value: Any) -> Any:
        if isinstance(value, list):
            return self.block(value)
        return self.visit(value) if isinstance(value, ast.AST) else value

    # --- statements ---------------------------------------------------------------------------------------------------

    def visit_Assign(self, node: ast.Assign) -> Any:
        value = node.value
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "registers":
            self.registers.update(target.id for target in node.targets if isinstance(target, ast.Name))
            return []
        return ast.Assign([self.visit(target) for target in node.targets], self.visit(value), lineno=node.lineno)

    def visit_If(self, node: ast.If) -> Any:
        if self._is_known(node.test):
            return self.block(node.body if self._value(node.test) else node.orelse)
        return ast.If(self.visit(node.test), self.block(node.body) or [ast.Pass()], self.block(node.orelse))

    def visit_For(self, node: ast.For) -> Any:
        if _is_static(node.iter):
            return [each for _ in self._turns(node.target, node.iter) for each in self.block(node.body)]
        return ast.For(node.target, self.visit(node.iter), self.block(node.body), [], lineno=node.lineno)

    # --- expressions --------------------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> Any:
        """Replaces known expressions by their values, the largest one first."""
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) and self._is_known(node):
            return self._literal(self._value(node))
        return super().visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        """Simplifies ``KNOWN or x`` and ``KNOWN and x``."""
        first = node.values[0]
        if not self._is_known(first):
            return self.generic_visit(node)
        if bool(self._value(first)) == isinstance(node.op, ast.Or):
            return self.visit(first)
        rest = node.values[1:]
        return self.visit(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        """Simplifies ``x & True`` to x."""
        made: Any = self.generic_visit(node)
        is_and = isinstance(made, ast.BinOp) and isinstance(made.op, ast.BitAnd)
        return made.left if is_and and isinstance(made.right, ast.Constant) and made.right.value is True else made

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        if self._is_known(node.test):
            return self.visit(node.body if self._value(node.test) else node.orelse)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "tuple" and isinstance(node.args[0], ast.GeneratorExp):
            each, (loop,) = node.args[0].elt, node.args[0].generators
            return ast.Tuple([self.visit(each) for _ in self._turns(loop.target, loop.iter)], ast.Load())
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if not (isinstance(node.value, ast.Name) and node.value.id in self.registers):
            return self.generic_visit(node)
        if not self._can_be_known(node.slice):
            raise TypeError(f"line {node.lineno}: the index of a register must be known: {ast.unparse(node)}")
        index = self._value(node.slice)
        parts = index if isinstance(index, tuple) else (index,)
        return ast.Name("_".join([node.value.id, *(str(part).replace("-", "m") for part in parts)]), node.ctx)

    def _turns(self, target: ast.expr, over: ast.expr) -> Iterator[None]:
        """Yields once for each turn of a static loop, with its variable known."""
        values = over.args[0] if isinstance(over, ast.Call) and _is_static(over) else None
        if values is None or not self._can_be_known(values):
            raise TypeError(f"line {over.lineno}: what a static loop goes over must be known: {ast.unparse(over)}")
        outer = dict(self.known)
        for value in self._value(values):
            self._bind(target, value)
            yield
        self.known = outer

    def _bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            for each, part in zip(target.elts, value, strict=True):
                self._bind(each, part)
        elif isinstance(target, ast.Name):
            self.known[target.id] = value

    def _can_be_known(self, node: ast.expr) -> bool:
        """Whether nothing in an expression is unknown."""
        read = self._read(node)
        if not (read.only_reads and read.only_calls_names and read.needed <= self.known.keys()):
            return False
        # Built-in functions and conversions to Numba's types are evaluated; device functions are left to the kernel.
        return all(isinstance(self.known.get(name), types.Type | NoneType) for name in read.called)

    def _is_known(self, node: ast.expr) -> bool:
        read = self._read(node)
        return self._can_be_known(node) and (read.is_arithmetic or not read.names.isdisjoint(self.known))

    def _value(self, node: ast.expr) -> Any:
        return eval(self._read(node).code, self.known)

    def _literal(self, value: Any) -> ast.expr:
        if type(value) in _LITERALS:  # NumPy's scalars keep their type
            return ast.Constant(value)
        for name, known in self.objects.items():
            if known is value:
                return ast.Name(name, ast.Load())
        name = f"static_{len(self.objects)}"
        self.objects[name] = value
        return ast.Name(name, ast.Load())


def _is_static(over: ast.expr) -> bool:
    return isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "static"
