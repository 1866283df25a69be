"""Raw pointers and vectors for Numba kernels.

Numba's arrays give LLVM's vectoriser more pointers than it will check for overlap: the nine-tap loop of a 3x3 filter
then runs one element at a time. Here a kernel says itself what is a vector. LLVM maps the vectors to whatever the
processor has (AVX2, AVX-512, NEON, ...).
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic, overload

VECTOR_BYTES = 32
# Lets LLVM fuse a product and a sum, where the processor can; nothing else is reordered.
_FUSE = ("contract",)


class Vector(types.Type):  # type: ignore[misc]
    """Numba's name for an LLVM vector of one element type, VECTOR_BYTES wide."""

    def __init__(self, element: Any) -> None:
        self.element = element
        self.lanes = VECTOR_BYTES * 8 // element.bitwidth
        super().__init__(name=f"Vector({element} x {self.lanes})")


@register_default(Vector)
class _VectorModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.element).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


@intrinsic
def pointer(typingctx, address, like):
    """Pointer to elements of the type of the scalar ``like``."""
    result = types.CPointer(like)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, like), codegen


@intrinsic
def data(typingctx, array):
    """Pointer to the elements of a one-dimensional array, which the caller must keep alive (see :func:`keep`).

    Passing pointers, not arrays, spares the kernels the counting of references.
    """
    result = types.CPointer(array.dtype)

    def codegen(context, builder, signature, arguments):
        return context.make_array(array)(context, builder, arguments[0]).data

    return result(array), codegen


@njit
def keep(array):
    """Called after the last use of a pointer into ``array``: Numba frees an array after its own last use."""
    return array.size


@intrinsic
def _advance(typingctx, base, count):
    def codegen(context, builder, signature, arguments):
        return cgutils.gep(builder, *arguments)

    return base(base, types.int64), codegen


@overload(operator.add, inline="always")
def _pointer_add(base, count):
    if isinstance(base, types.CPointer) and isinstance(count, types.Integer):
        return lambda base, count: _advance(base, count)


@intrinsic
def lanes(typingctx, like):
    """Elements of the type of the scalar ``like`` in a vector, known at compile time."""
    count = Vector(like).lanes

    def codegen(context, builder, signature, arguments):
        return context.get_constant(types.int64, count)

    return types.int64(like), codegen


@intrinsic
def load(typingctx, base, index):
    """The vector that starts at ``base[index]``; no alignment beyond an element's."""
    result = Vector(base.dtype)

    def codegen(context, builder, signature, arguments):
        place = _vector_pointer(context, builder, result, *arguments)
        value = builder.load(place)
        value.align = base.dtype.bitwidth // 8
        return value

    return result(base, types.int64), codegen


@intrinsic
def store(typingctx, base, index, value):
    """Writes a vector at ``base[index]``; no alignment beyond an element's."""

    def codegen(context, builder, signature, arguments):
        place = _vector_pointer(context, builder, value, *arguments[:2])
        builder.store(arguments[2], place).align = base.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(base, types.int64, value), codegen


@intrinsic
def splat(typingctx, value):
    """The vector with ``value`` in every lane."""
    result = Vector(value)

    def codegen(context, builder, signature, arguments):
        kind = context.get_value_type(result)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), result.lanes), [0] * result.lanes)
        return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)

    return result(value), codegen


@intrinsic
def zeros(typingctx, like):
    """The vector of zeros of the type of the scalar ``like``."""
    result = Vector(like)

    def codegen(context, builder, signature, arguments):
        kind = context.get_value_type(result)
        return ir.Constant(kind, [0.0] * result.lanes)

    return result(like), codegen


@intrinsic
def total(typingctx, value):
    """Sum of the lanes, halves first: the same order every time."""

    def codegen(context, builder, signature, arguments):
        vector, width = arguments[0], value.lanes
        while width > 1:
            width //= 2
            halves = [
                builder.shuffle_vector(
                    vector,
                    vector,
                    ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width))),
                )
                for first in (0, width)
            ]
            vector = builder.fadd(*halves)
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return value.element(value), codegen


@intrinsic
def _add(typingctx, left, right):
    def codegen(context, builder, signature, arguments):
        return builder.fadd(*arguments, flags=_FUSE)

    return left(left, right), codegen


@intrinsic
def _multiply(typingctx, left, right):
    def codegen(context, builder, signature, arguments):
        return builder.fmul(*arguments, flags=_FUSE)

    return left(left, right), codegen


@overload(operator.add, inline="always")
def _vector_add(left, right):
    if isinstance(left, Vector) and left == right:
        return lambda left, right: _add(left, right)


@overload(operator.mul, inline="always")
def _vector_multiply(left, right):
    if isinstance(left, Vector) and left == right:
        return lambda left, right: _multiply(left, right)


def _vector_pointer(context: Any, builder: Any, vector: Vector, base: Any, index: Any) -> Any:
    kind = context.get_value_type(vector)
    return builder.bitcast(cgutils.gep(builder, base, index), kind.as_pointer())
