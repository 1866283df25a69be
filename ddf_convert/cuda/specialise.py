"""Unrolls kernels before Numba sees them: ordinary Python in, straight-line Python out.

A tile of outputs must stay in registers, and a register cannot be indexed at run time. So the loops over a tile must be
unrolled and every index be a constant. Whether LLVM does that to a long loop is its own decision; here it is ours.
A kernel is a plain Python function that says what is known when it is compiled:

* names in ``constants`` (and loop variables over them) have their value, and expressions of them are calculated;
* ``for x in static(...)`` is unrolled, and an ``if`` with a known test keeps one branch;
* ``tuple(... for x in static(...))`` is a tuple written out;
* ``acc = registers()`` makes ``acc[i, j]``, whose indices are known, a variable of its own.

The same text, specialised in the same way, runs in Numba's CUDA simulator.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator
from types import NoneType
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
    raise NotImplementedError("registers() stands only in kernels, which are specialised first")


def specialise(function: Callable[..., None], name: str, constants: dict[str, Any]) -> Callable[..., None]:
    """The function with its constants worked in.

    Args:
        function: A kernel, see above; its globals stay visible.
        name: Of the result, a Python identifier.
        constants: Values by name. Numbers become literals; of tuples and objects the numbers that are taken from
            them; anything that can be called becomes a global.

    Returns:
        A function whose source Python's tracebacks and debuggers can show.

    Raises:
        TypeError: A loop marked static, or the index of a register, is not known.
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
    source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    file = f"<ddf_convert {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {**inspect.unwrap(function).__globals__, **unroller.objects}
    exec(compile(source, file, "exec"), scope)
    specialised: Callable[..., None] = scope[name]
    return specialised


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    has_one = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if has_one else body


class _Unroller(ast.NodeTransformer):
    def __init__(self, constants: dict[str, Any]) -> None:
        self.known = dict(constants)
        self.registers: set[str] = set()
        self.objects: dict[str, Any] = {}

    def block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """Each statement, or what becomes of it."""
        made: list[ast.stmt] = []
        for statement in statements:
            result = self.visit(statement)
            made.extend(result if isinstance(result, list) else [result])
        return made

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
            return [each for part in self._unrolled(node.target, node.iter, node.body) for each in self.block(part)]
        return ast.For(node.target, self.visit(node.iter), self.block(node.body), [], lineno=node.lineno)

    # --- expressions --------------------------------------------------------------------------------------------------

    def visit(self, node: ast.AST) -> Any:
        """What is known becomes its value, the largest expression first."""
        if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) and self._is_known(node):
            return self._literal(self._value(node))
        return super().visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        """``KNOWN or x`` and ``KNOWN and x``."""
        first = node.values[0]
        if not self._is_known(first):
            return self.generic_visit(node)
        if bool(self._value(first)) == isinstance(node.op, ast.Or):
            return self.visit(first)
        rest = node.values[1:]
        return self.visit(rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest))

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        """``x & True`` is x."""
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
            return ast.Tuple([self.visit(part) for part in self._unrolled(loop.target, loop.iter, each)], ast.Load())
        return self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        if not (isinstance(node.value, ast.Name) and node.value.id in self.registers):
            return self.generic_visit(node)
        if not self._can_be_known(node.slice):
            raise TypeError(f"line {node.lineno}: the index of a register must be known: {ast.unparse(node)}")
        index = self._value(node.slice)
        parts = index if isinstance(index, tuple) else (index,)
        return ast.Name("_".join([node.value.id, *(str(part).replace("-", "m") for part in parts)]), node.ctx)

    def _unrolled(self, target: ast.expr, over: ast.expr, part: Any) -> Iterator[Any]:
        """A copy of ``part`` for each value of a static loop, while that value is known."""
        values = over.args[0] if isinstance(over, ast.Call) and _is_static(over) else None
        if values is None or not self._can_be_known(values):
            raise TypeError(f"line {over.lineno}: what a static loop goes over must be known: {ast.unparse(over)}")
        outer = dict(self.known)
        for value in self._value(values):
            self._bind(target, value)
            yield copy.deepcopy(part)
        self.known = outer

    def _bind(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Tuple):
            for each, part in zip(target.elts, value, strict=True):
                self._bind(each, part)
        elif isinstance(target, ast.Name):
            self.known[target.id] = value

    def _can_be_known(self, node: ast.expr) -> bool:
        named = all(
            isinstance(each.ctx, ast.Load) and (each.id in self.known or hasattr(builtins, each.id))
            for each in _names(node)
        )
        return named and all(self._is_pure(each.func) for each in ast.walk(node) if isinstance(each, ast.Call))

    def _is_pure(self, function: ast.expr) -> bool:
        """Python's own functions, and conversions to Numba's types; device functions are for the kernel to call."""
        return isinstance(function, ast.Name) and isinstance(self.known.get(function.id), (types.Type, NoneType))

    def _is_known(self, node: ast.expr) -> bool:
        if not self._can_be_known(node):
            return False
        return any(each.id in self.known for each in _names(node)) or _is_arithmetic(node)

    def _value(self, node: ast.expr) -> Any:
        return eval(
            compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(node))), "<constant>", "eval"), self.known
        )

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


def _names(node: ast.expr) -> list[ast.Name]:
    return [each for each in ast.walk(node) if isinstance(each, ast.Name)]


def _is_arithmetic(node: ast.expr) -> bool:
    """Numbers alone."""
    return not isinstance(node, ast.Constant) and all(isinstance(each, _ARITHMETIC) for each in ast.walk(node))
