"""Reading and writing of elements: float32 and float64 as they are, half types as float32.

Numba has no half types on the CPU. A kernel sees float16 as uint16 and bfloat16 as int16, and converts with integer
arithmetic, which LLVM vectorizes.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numba.extending import intrinsic, overload, register_jitable

from ddf_convert.cpu.simd import lanes, load, store

# 2**k as float32, for the conversions of float16.
_TWO_110 = np.float32(2.0**-110)
_TWO_112 = np.float32(2.0**112)
_TWO_MINUS_112 = np.float32(2.0**-112)
_HALF = np.float32(0.5)


@intrinsic
def _as_float(typingctx, bits):
    """Returns the float32 with these 32 bits."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), codegen


@intrinsic
def _as_bits(typingctx, value):
    """Returns the 32 bits of a float32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@register_jitable
def _from_bfloat16(half):
    return _as_float(np.uint32(np.uint16(half)) << np.uint32(16))


@register_jitable
def _to_bfloat16(value):
    bits = _as_bits(value)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)  # to nearest, ties to even
    return np.int16(np.uint16(0x7FC0) if value != value else np.uint16(rounded))


@register_jitable
def _from_float16(half):
    word = np.uint32(half) << np.uint32(16)
    sign = word & np.uint32(0x80000000)
    twice = np.uint32(word + word)
    normal = _as_float(np.uint32((twice >> np.uint32(4)) + np.uint32(0xE0 << 23))) * _TWO_MINUS_112
    subnormal = _as_float((twice >> np.uint32(17)) | np.uint32(126 << 23)) - _HALF
    magnitude = _as_bits(subnormal) if twice < np.uint32(1 << 27) else _as_bits(normal)
    return _as_float(sign | magnitude)


@register_jitable
def _to_float16(value):
    # Adding a power of two that fits the exponent makes the float32 adder round to float16's precision, ties to even.
    bits = _as_bits(value)
    sign = bits & np.uint32(0x80000000)
    magnitude = _as_float(bits & np.uint32(0x7FFFFFFF))
    base = (magnitude * _TWO_112) * _TWO_110
    twice = np.uint32(bits + bits)
    bias = twice & np.uint32(0xFF000000)
    bias = max(bias, np.uint32(0x71000000))
    rounded = _as_bits(_as_float(np.uint32((bias >> np.uint32(1)) + np.uint32(0x07800000))) + base)
    exponent = (rounded >> np.uint32(13)) & np.uint32(0x7C00)
    result = np.uint32(exponent + (rounded & np.uint32(0x0FFF)))
    result = np.uint32(0x7E00) if twice > np.uint32(0xFF000000) else result
    return np.uint16((sign >> np.uint32(16)) | result)


def _widen(value):
    """Converts a stored element to the type that the kernels calculate in."""


@overload(_widen)
def _overload_widen(value):
    if value == types.int16:
        return lambda value: _from_bfloat16(value)
    if value == types.uint16:
        return lambda value: _from_float16(value)
    return lambda value: value


def _narrow(value, like):
    """Converts a calculated value to an element stored like ``like``."""


@overload(_narrow)
def _overload_narrow(value, like):
    if like == types.int16:
        return lambda value, like: _to_bfloat16(value)
    if like == types.uint16:
        return lambda value, like: _to_float16(value)
    return lambda value, like: value


def scratch(size, like):
    """Returns zeros of the type that the kernels calculate in, for tensors stored like the scalar ``like``."""


@overload(scratch)
def _overload_scratch(size, like):
    if like == types.float64:
        return lambda size, like: np.zeros(size, np.float64)
    return lambda size, like: np.zeros(size, np.float32)


def is_direct(output, line):
    """Whether kernels may write vectors straight to ``output``: it has the type that they calculate in."""


@overload(is_direct)
def _overload_is_direct(output, line):
    same = output == line
    return lambda output, line: same


def output_or_line(wanted, output, line):
    """Returns ``output`` if wanted and possible (see :func:`is_direct`), else ``line``."""


@overload(output_or_line)
def _overload_output_or_line(wanted, output, line):
    if output == line:
        return lambda wanted, output, line: output if wanted else line
    return lambda wanted, output, line: line


@njit(forceinline=True)
def read(target, source, step, count):
    """Sets target[k] = source[k * step] for k < count, widened."""
    if step == 1:
        _read_line(target, source, count)
    else:
        for k in range(count):
            target[k] = _widen(source[k * step])


@njit(forceinline=True)
def write(target, step, source, count):
    """Sets target[k * step] = source[k] for k < count, narrowed."""
    if step == 1:
        _write_line(target, source, count)
    else:
        like = target[0]
        for k in range(count):
            target[k * step] = _narrow(source[k], like)


@njit
def clear(target, count):
    """Sets target[k] = 0 for k < count."""
    for k in range(count):
        target[k] = 0


@njit(forceinline=True)
def _copy_line(target, source, count):
    """Copies a row in whole vectors; the last one overlaps the one before, which spares a loop over a remainder."""
    width = lanes(target[0])
    if count >= width:
        for k in range(0, count - width, width):
            store(target, k, load(source, k))
        store(target, count - width, load(source, count - width))
    else:
        for k in range(count):
            target[k] = source[k]


def _read_line(target, source, count):
    """Sets target[k] = source[k] for k < count, widened."""


@overload(_read_line)
def _overload_read_line(target, source, count):
    if target == source:
        return lambda target, source, count: _copy_line(target, source, count)

    def convert(target, source, count):
        for k in range(count):
            target[k] = _widen(source[k])

    return convert


def _write_line(target, source, count):
    """Sets target[k] = source[k] for k < count, narrowed."""


@overload(_write_line)
def _overload_write_line(target, source, count):
    if target == source:
        return lambda target, source, count: _copy_line(target, source, count)

    def convert(target, source, count):
        like = target[0]
        for k in range(count):
            target[k] = _narrow(source[k], like)

    return convert
