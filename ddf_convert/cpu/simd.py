"""Raw pointers and vectors for Numba kernels.

Numba's arrays give LLVM's vectorizer more pointers than it will check for overlap: the nine-tap loop of a 3x3 filter
then runs one element at a time. With these intrinsics a kernel is written in vectors, which LLVM maps to what the
processor has (AVX2, AVX-512, NEON, ...).
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel, register_default
from numba.extending import intrinsic, lower_builtin, type_callable

VECTOR_BYTES = 32
# Lets LLVM fuse a product and a sum, where the processor can; nothing else is reordered.
_FUSE = ("contract",)


class Vector(types.Type):  # type: ignore[misc]
    """The Numba type of an LLVM vector of one element type, VECTOR_BYTES wide."""

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
    """Returns a pointer to elements of the type of the scalar ``like``."""
    result = types.CPointer(like)

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.int64, like), codegen


@intrinsic
def data(typingctx, array):
    """Returns a pointer to the elements of a one-dimensional array; the caller calls :func:`keep_alive` on the array.

    Pointers instead of arrays spare the kernels the counting of references.
    """
    result = types.CPointer(array.dtype)

    def codegen(context, builder, signature, arguments):
        return context.make_array(array)(context, builder, arguments[0]).data

    return result(array), codegen


@njit
def keep_alive(array):
    """Keeps ``array`` alive up to here; Numba frees an array after its last use, whatever points into it."""
    return array.size


@intrinsic
def distance(typingctx, start, end):
    """Returns the elements from one pointer to another, which may point into another tensor or array."""

    def codegen(context, builder, signature, arguments):
        integer = context.get_value_type(types.int64)
        first, last = (builder.ptrtoint(argument, integer) for argument in arguments)
        size = context.get_constant(types.int64, start.dtype.bitwidth // 8)
        return builder.sdiv(builder.sub(last, first), size)

    return types.int64(start, end), codegen


@intrinsic
def lanes(typingctx, like):
    """Returns the elements of the type of the scalar ``like`` in a vector, known at compile time."""
    count = Vector(like).lanes

    def codegen(context, builder, signature, arguments):
        return context.get_constant(types.int64, count)

    return types.int64(like), codegen


@intrinsic
def load(typingctx, base, index):
    """Returns the vector that starts at ``base[index]``, aligned as an element is."""
    result = Vector(base.dtype)

    def codegen(context, builder, signature, arguments):
        place = _vector_pointer(context, builder, result, *arguments)
        value = builder.load(place)
        value.align = base.dtype.bitwidth // 8
        return value

    return result(base, types.int64), codegen


@intrinsic
def store(typingctx, base, index, value):
    """Writes a vector at ``base[index]``, aligned as an element is."""

    def codegen(context, builder, signature, arguments):
        place = _vector_pointer(context, builder, value, *arguments[:2])
        builder.store(arguments[2], place).align = base.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(base, types.int64, value), codegen


@intrinsic
def _prefetch(typingctx, base, index):
    def codegen(context, builder, signature, arguments):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        place = builder.bitcast(cgutils.gep(builder, *arguments), byte)
        reading, keep_close, of_data = word(0), word(3), word(1)
        builder.call(function, [place, reading, keep_close, of_data])
        return context.get_dummy_value()

    return types.void(base, types.int64), codegen


@njit(forceinline=True)
def prefetch(base, count):
    """Prefetches the cache lines of base[0:count], which may lie outside the tensor: a prefetch never faults."""
    for k in range(0, count, 2 * lanes(base[0])):
        _prefetch(base, k)


@intrinsic
def splat(typingctx, value):
    """Returns the vector with ``value`` in every lane."""
    result = Vector(value)

    def codegen(context, builder, signature, arguments):
        kind = context.get_value_type(result)
        one = builder.insert_element(ir.Constant(kind, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), result.lanes), [0] * result.lanes)
        return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)

    return result(value), codegen


@intrinsic
def zeros(typingctx, like):
    """Returns the vector of zeros of the type of the scalar ``like``."""
    result = Vector(like)

    def codegen(context, builder, signature, arguments):
        kind = context.get_value_type(result)
        return ir.Constant(kind, [0.0] * result.lanes)

    return result(like), codegen


@intrinsic
def total(typingctx, value):
    """Returns the sum of the lanes, halves first: the same order every time."""

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


@type_callable(operator.add)
def _type_add(context):
    def typer(left, right):
        if isinstance(left, Vector) and left == right:
            return left
        if isinstance(left, types.CPointer) and isinstance(right, types.Integer):
            return left

    return typer


@type_callable(operator.mul)
def _type_multiply(context):
    def typer(left, right):
        if isinstance(left, Vector) and left == right:
            return left

    return typer


@lower_builtin(operator.add, Vector, Vector)
def _lower_add(context, builder, signature, arguments):
    return builder.fadd(*arguments, flags=_FUSE)


@lower_builtin(operator.mul, Vector, Vector)
def _lower_multiply(context, builder, signature, arguments):
    return builder.fmul(*arguments, flags=_FUSE)


@lower_builtin(operator.add, types.CPointer, types.Integer)
def _lower_advance(context, builder, signature, arguments):
    return cgutils.gep(builder, *arguments)


def _vector_pointer(context: Any, builder: Any, vector: Vector, base: Any, index: Any) -> Any:
    kind = context.get_value_type(vector)
    return builder.bitcast(cgutils.gep(builder, base, index), kind.as_pointer())
