"""Device functions that Numba-CUDA lacks: wide, predicated loads and stores of any dtype, arithmetic on tuples.

Addresses are plain pointers, so that a kernel's arguments are a few numbers. Where the predicate ``ok`` is false, a
load reads nothing and returns zeros, without a branch. Loads take the read-only path (``ld.global.nc``): no kernel
writes what it reads. Half types are float32 in registers; float16 is stored as uint16, bfloat16 as int16.

Numba's simulator runs Python, not intrinsics: simulator.py has a twin of each.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_GLOBAL = 1  # NVVM's address space of device memory
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_IR_TYPES = {types.float32: _F32, types.float64: _F64}

_WIDEN_PAIR = {  # one word, two elements
    types.uint16: "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }",
    types.int16: "{ .reg .b32 lo, hi; shl.b32 lo, $2, 16; and.b32 hi, $2, 0xffff0000;"
    " mov.b32 $0, lo; mov.b32 $1, hi; }",
}


def _assembly(
    builder: Any, result: Any, text: str, constraints: str, arguments: list[Any], effect: bool = False
) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), arguments)


def _address(builder: Any, pointer: Any, index: Any) -> Any:
    return builder.ptrtoint(builder.gep(pointer, [index]), _I64)


def _flag(builder: Any, ok: Any) -> Any:
    return builder.zext(ok if ok.type == _I1 else builder.trunc(ok, _I1), _I32)


def _read_words(builder: Any, address: Any, flags: list[Any], count: int, bits: int) -> list[Any]:
    """Reads ``count`` words of ``bits`` bits, or zeros: at most 16 bytes in one instruction. 16 bits come as 32."""
    word, letter = (_I64, "l") if bits == 64 else (_I32, "r")
    names = [f"${place}" for place in range(count)]
    zeros = " ".join(f"mov.b{max(bits, 32)} {name}, 0;" for name in names)
    kind = "u16" if bits == 16 else f"b{bits}"
    width, target = ("", names[0]) if count == 1 else (f".v{count}", "{" + ", ".join(names) + "}")
    text = (
        f"{{ .reg .pred ok; setp.ne.b32 ok, ${count + 1}, 0; setp.ne.and.b32 ok, ${count + 2}, 0, ok; {zeros}"
        f" @ok ld.global.nc{width}.{kind} {target}, [${count}]; }}"
    )
    constraints = ",".join([f"={letter}"] * count + ["l", "r", "r"])
    result = word if count == 1 else ir.LiteralStructType([word] * count)
    made = _assembly(builder, result, text, constraints, [address, *flags])
    return [made] if count == 1 else [builder.extract_value(made, place) for place in range(count)]


@intrinsic
def shift(typing: Any, pointer: Any, index: Any) -> Any:
    """Returns the pointer to the element at ``index``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(*[arguments[0], [arguments[1]]])

    return pointer(pointer, types.int64), generate


def loader(stored: Any, compute: Any, lanes: int) -> Any:
    """Makes ``load(pointer, index, ok, also)``: 1, 2 or 4 aligned elements, zeros unless ``ok`` and ``also``.

    ``stored`` is the element's type in memory, ``compute`` its type in registers.
    """

    @intrinsic
    def load(typing: Any, pointer: Any, index: Any, ok: Any, also: Any) -> Any:
        signature = types.UniTuple(compute, lanes)(pointer, types.int64, types.boolean, types.boolean)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, index, *conditions = arguments
            flags = [_flag(builder, condition) for condition in conditions]
            values = _load(builder, stored, lanes, _address(builder, pointer, index), flags)
            return context.make_tuple(builder, signature.return_type, values)

        return signature, generate

    return load


def _load(builder: Any, stored: Any, lanes: int, address: Any, flags: list[Any]) -> list[Any]:
    if stored in _IR_TYPES:
        bits = stored.bitwidth
        at_once = min(lanes, 128 // bits)
        words = []
        for first in range(0, lanes, at_once):
            here = builder.add(address, _I64(first * bits // 8))
            words += _read_words(builder, here, flags, at_once, bits)
        return [builder.bitcast(word, _IR_TYPES[stored]) for word in words]
    if lanes == 1:
        (word,) = _read_words(builder, address, flags, 1, 16)
        if stored == types.uint16:
            return [_assembly(builder, _F32, "cvt.f32.f16 $0, $1;", "=f,h", [builder.trunc(word, _I16)])]
        return [builder.bitcast(builder.shl(word, _I32(16)), _F32)]
    values = []
    for pair in _read_words(builder, address, flags, lanes // 2, 32):
        both = _assembly(builder, ir.LiteralStructType([_F32, _F32]), _WIDEN_PAIR[stored], "=f,=f,r", [pair])
        values += [builder.extract_value(both, place) for place in (0, 1)]
    return values


def storer(stored: Any, compute: Any, lanes: int, native_bfloat16: bool) -> Any:
    """Makes ``store(pointer, index, values)``: writes a tuple of 1, 2 or 4 elements, aligned to their size.

    Types are those of :func:`loader`; from sm_80 on the processor rounds to bfloat16 itself (``native_bfloat16``).
    """

    @intrinsic
    def store(typing: Any, pointer: Any, index: Any, values: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer, index, values = arguments
            address = _address(builder, pointer, index)
            words = [builder.extract_value(values, lane) for lane in range(lanes)]
            if stored not in _IR_TYPES:
                words = _narrow(builder, stored, words, native_bfloat16)
            _write_words(builder, address, words)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, types.UniTuple(compute, lanes)), generate

    return store


def _write_words(builder: Any, address: Any, words: list[Any]) -> None:
    """Writes at most 16 bytes in one instruction."""
    kind = words[0].type
    size = {_F32: 4, _F64: 8, _I16: 2, _I32: 4}[kind]
    at_once = min(len(words), 16 // size)
    for first in range(0, len(words), at_once):
        value = words[first]
        if at_once > 1:
            value = ir.Constant(ir.VectorType(kind, at_once), ir.Undefined)
            for place in range(at_once):
                value = builder.insert_element(value, words[first + place], _I32(place))
        here = builder.add(address, _I64(first * size))
        builder.store(value, builder.inttoptr(here, value.type.as_pointer(_GLOBAL)), align=size * at_once)


def _narrow(builder: Any, stored: Any, values: list[Any], native_bfloat16: bool) -> list[Any]:
    """Rounds float32 to halves, ties to even: a 16-bit word for one element, 32-bit words for pairs."""
    if stored == types.uint16:
        halves = [_assembly(builder, _I16, "cvt.rn.f16.f32 $0, $1;", "=h,f", [value]) for value in values]
    elif native_bfloat16:
        halves = [_assembly(builder, _I16, "cvt.rn.bf16.f32 $0, $1;", "=h,f", [value]) for value in values]
    else:
        halves = [_round_bfloat16(builder, value) for value in values]
    if len(halves) == 1:
        return halves
    return [
        _assembly(builder, _I32, "mov.b32 $0, {$1, $2};", "=r,h,h", halves[first : first + 2])
        for first in range(0, len(halves), 2)
    ]


def _round_bfloat16(builder: Any, value: Any) -> Any:
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.add(bits, builder.add(odd, _I32(0x7FFF)))  # overflows into infinity as it should
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(bits, _I32(0x400000))
    return builder.trunc(builder.lshr(builder.select(is_nan, quiet, rounded), _I32(16)), _I16)


@intrinsic
def divide(typing: Any, dividend: Any, divisor: Any) -> Any:
    """Divides two numbers from 0 to 2^31 - 1, much faster than Python's division of signed 64-bit numbers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        short = [builder.trunc(argument, _I32) for argument in arguments]
        return builder.zext(builder.udiv(*short), _I64)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def sync_warp(typing: Any) -> Any:
    """Waits for the threads of a warp and makes their writes visible to each other."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _assembly(builder, ir.VoidType(), "bar.warp.sync 0xffffffff;", "~{memory}", [], effect=True)
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def opaque(typing: Any, index: Any) -> Any:
    """Returns the index, which the compiler can then not recognize from one turn of a loop to the next.

    So a value at this index is read again in each turn instead of held in registers that the loop needs.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _assembly(builder, _I64, "mov.b64 $0, $1;", "=l,l", arguments, effect=True)

    return types.int64(types.int64), generate


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Returns the address of an element, without the checks for Python's negative indices."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def fetcher(lanes: int) -> Any:
    """Makes ``fetch(array, index)``: a tuple of elements of a shared array; ``index`` is a multiple of ``lanes``."""

    @intrinsic
    def fetch(typing: Any, array: Any, index: Any) -> Any:
        signature = types.UniTuple(array.dtype, lanes)(array, types.int64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            element = _IR_TYPES[array.dtype]
            place = _element(context, builder, array, *arguments)
            size = array.dtype.bitwidth // 8
            at_once = min(lanes, 16 // size)
            values: list[Any] = []
            for first in range(0, lanes, at_once):
                here = builder.gep(place, [_I64(first)])
                if at_once == 1:
                    values.append(builder.load(here))
                    continue
                vector = builder.bitcast(here, ir.VectorType(element, at_once).as_pointer())
                made = builder.load(vector, align=size * at_once)
                values += [builder.extract_element(made, _I32(lane)) for lane in range(at_once)]
            return context.make_tuple(builder, signature.return_type, values)

        return signature, generate

    return fetch


@intrinsic
def put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Sets ``array[index] = value`` in a shared array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array_value, index, value = arguments
        builder.store(value, _element(context, builder, array, array_value, index))
        return context.get_dummy_value()

    return types.void(array, types.int64, array.dtype), generate


def fma_combiner(compute: Any, lanes: int, add: bool) -> Any:
    """Makes ``fma_combine(total, a, b, feature)``: total + (a * b) * feature, or total + (a + b) * feature.

    ``a`` is a number, the others are tuples of ``lanes``.
    """

    @intrinsic
    def fma_combine(typing: Any, total: Any, a: Any, b: Any, feature: Any) -> Any:
        vector = types.UniTuple(compute, lanes)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            total, a, b, feature = arguments
            combine = builder.fadd if add else builder.fmul
            values = []
            for lane in range(lanes):
                t, s, f = (builder.extract_value(each, lane) for each in (total, b, feature))
                values.append(builder.fadd(t, builder.fmul(combine(a, s), f)))
            return context.make_tuple(builder, vector, values)

        return vector(vector, compute, vector, vector), generate

    return fma_combine


def products(compute: Any, lanes: int, add: bool) -> dict[str, Any]:
    """Makes the arithmetic of the filters' gradients, for tuples of ``lanes``.

    ``multiply(a, b)`` works element by element, ``accumulate(total, weight, product)`` is total + weight * product, and
    ``dot(weights, product)`` the sum of weights * product. The last two leave the weights out if the filters are added:
    then one filter's gradient does not depend on the other filter.
    """
    vector = types.UniTuple(compute, lanes)

    def split(builder: Any, values: Any) -> list[Any]:
        return [builder.extract_value(values, lane) for lane in range(lanes)]

    @intrinsic
    def multiply(typing: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pairs = zip(*(split(builder, each) for each in arguments), strict=True)
            return context.make_tuple(builder, vector, [builder.fmul(*pair) for pair in pairs])

        return vector(vector, vector), generate

    @intrinsic
    def accumulate(typing: Any, total: Any, weight: Any, product: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            total, weight, product = arguments
            terms = [each if add else builder.fmul(weight, each) for each in split(builder, product)]
            made = [builder.fadd(*pair) for pair in zip(split(builder, total), terms, strict=True)]
            return context.make_tuple(builder, vector, made)

        return vector(vector, compute, vector), generate

    @intrinsic
    def dot(typing: Any, weights: Any, product: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            weights, product = (split(builder, each) for each in arguments)
            terms = product if add else [builder.fmul(*pair) for pair in zip(weights, product, strict=True)]
            total = terms[0]
            for term in terms[1:]:
                total = builder.fadd(total, term)
            return total

        return compute(vector, vector), generate

    return {"multiply": multiply, "accumulate": accumulate, "dot": dot}


def functions(stored: Any, compute: Any, add: bool, native_bfloat16: bool) -> dict[str, Any]:
    """Returns all functions of this module for one dtype, by the names that kernels use."""
    arithmetic = {lanes: products(compute, lanes, add) for lanes in (1, 2, 4)}
    return {
        **{name: {lanes: arithmetic[lanes][name] for lanes in arithmetic} for name in arithmetic[1]},
        "load": {lanes: loader(stored, compute, lanes) for lanes in (1, 2, 4)},
        "store": {lanes: storer(stored, compute, lanes, native_bfloat16) for lanes in (1, 2, 4)},
        "store_sum": storer(compute, compute, 1, native_bfloat16),
        "fetch": {lanes: fetcher(lanes) for lanes in (1, 2, 4)},
        "fma_combine": {lanes: fma_combiner(compute, lanes, add) for lanes in (1, 2, 4)},
        "put": put,
        "ALIGNMENT": 16,
        "shift": shift,
        "divide": divide,
        "opaque": opaque,
        "sync_warp": sync_warp,
    }
