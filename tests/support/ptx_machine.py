"""Interprets PTX on the CPU, so that tests run the same code that the driver would get.

It knows the part of PTX that the kernels use; an unknown instruction, modifier or operand is an error. The threads of
several blocks execute an instruction together, as NumPy vectors; where they diverge, those furthest behind go first. It
is stricter than a GPU. These are errors, which name the instruction:

* a load or store outside its tensor or its shared array, or not aligned to its size;
* an element that is written twice, or written and read, by one launch (kernels read with ``ld.global.nc``);
* two threads at one place of shared memory, one of them writing, without a barrier between them;
* a barrier that not all threads of the block, or of the warp, reach together;
* a register that is read before it is written, or has another type than the instruction.

Unwritten shared memory reads as NaN. Arithmetic rounds to nearest once, as on a GPU, except for ``fma``:
its product is exact and its sum rounded to float64 and then to float32 (float32), or both are rounded (float64).
"""

from __future__ import annotations

import functools
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WARP = 32
_BATCH = 8  # blocks that run together
_UNWRITTEN = 0x7FF7DEAD  # of shared memory: a NaN as float32, and twice as float64
_REGION = 40  # bits of an address within a buffer: no two buffers can be mistaken for each other
_ARRAY = 20  # bits of an address within a shared array

Array = Any  # np.ndarray of any type
Lanes = Any  # which threads take part: their indices, or slice(None) for all


class PtxError(Exception):
    """The PTX does what it must not do, or is beyond this machine."""


# --- types ------------------------------------------------------------------------------------------------------------

_DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "bf16": np.dtype("u2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}
_SIGNED = {"s16", "s32", "s64"}
_UNSIGNED = {"u16", "u32", "u64"}
_INTEGERS = _SIGNED | _UNSIGNED
_FLOATS = {"f32", "f64"}
_BITS = {"b16", "b32", "b64"}


def _bits(kind: str) -> int:
    return 1 if kind == "pred" else int(kind.lstrip("usbf"))


def _storage(kind: str) -> Any:
    """What registers of a type are kept as: their bits."""
    return np.bool_ if kind == "pred" else np.dtype(f"u{_bits(kind) // 8}")


def _fits(declared: str, used: str) -> bool:
    """PTX's rule for operands: as many bits, and one kind, unless one of the two is bits alone."""
    if _bits(declared) != _bits(used) or "pred" in (declared, used):
        return declared == used
    kinds = {declared[0], used[0]}
    return "b" in kinds or ("f" in kinds) == (kinds == {"f"})


def _fits_memory(declared: str, used: str) -> bool:
    """The rule for loads and stores: the register may also be wider than what is in memory."""
    wider = declared != "pred" and _bits(declared) > _bits(used) and "f" not in declared + used
    return wider or _fits(declared, used)


def _wider(kind: str) -> str:
    return kind[0] + str(2 * _bits(kind))


# --- the text ---------------------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"(?P<nothing>\s+|//[^\n]*|/\*.*?\*/)|(?P<string>\"[^\"]*\")|(?P<word>[%$_.A-Za-z][\w$.%<>]*)"
    r"|(?P<number>-?\d[\w.]*)|(?P<mark>[][{}(),;:@!+|=])",
    re.DOTALL,
)


class Token(NamedTuple):
    text: str
    line: int


def _tokens(text: str) -> list[Token]:
    found, at, line = [], 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise PtxError(f"line {line}: cannot read {text[at : at + 20]!r}")
        if match.lastgroup != "nothing":
            found.append(Token(match.group(), line))
        line += match.group().count("\n")
        at = match.end()
    return found


@dataclass(frozen=True)
class Register:
    number: int
    kind: str


@dataclass(frozen=True)
class Address:
    base: Any  # a Register, or the name of a parameter or shared array
    offset: int


@dataclass(frozen=True)
class Word:
    """A number, a special register, a name."""

    text: str


Operand = Register | Address | Word | tuple[Any, ...]


@dataclass(eq=False)
class Instruction:
    """One instruction; ``run`` does it for some threads."""

    line: int
    opcode: str
    operands: list[Operand]
    guard: tuple[Register, bool] | None  # a predicate, and whether it must be false
    text: str
    run: Callable[[Frame, Lanes], None] | None = None

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass
class SharedArray:
    size: int
    base: int


class _Reader:
    """From the text of a module to one kernel's instructions."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.at = 0
        self.shared: dict[str, SharedArray] = {}
        self.parameters: dict[str, tuple[str, int]] = {}  # type and offset, by name
        self.parameters_size = 0
        self.most_threads: int | None = None
        self.kinds: list[str] = []  # of registers, by number
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        while self.at < len(self.tokens):
            self._declaration()
        if not self.instructions:
            raise PtxError("no kernel in the text")

    def _next(self, *expected: str) -> str:
        if self.at >= len(self.tokens):
            raise PtxError("the text ends too early")
        token = self.tokens[self.at]
        if expected and token.text not in expected:
            raise self._refusal(f"expected {' or '.join(expected)}, found {token.text}")
        self.at += 1
        return token.text

    def _peek(self) -> str:
        return self.tokens[self.at].text

    def _refusal(self, what: str) -> PtxError:
        return PtxError(f"line {self.tokens[min(self.at, len(self.tokens) - 1)].line}: {what}")

    def _declaration(self) -> None:
        word = self._next()
        if word in (".version", ".target", ".address_size"):
            self._next()
        elif word in (".visible", ".common", ".weak"):
            pass
        elif word == ".global":  # Numba's environment, which kernels do not touch: its name stays unknown here
            while self._next() != ";":
                pass
        elif word == ".shared":
            self._shared_array()
        elif word == ".entry":
            if self.instructions:
                raise self._refusal("a second kernel")
            self._kernel()
        else:
            raise self._refusal(f"cannot take {word} outside of a kernel")

    def _shared_array(self) -> None:
        self._next(".align")
        self._next()
        self._next(".b8")
        name = self._next()
        self._next("[")
        size = int(self._next())
        self._next("]")
        self._next(";")
        if size >= 1 << _ARRAY:
            raise self._refusal(f"{name} is too large")
        self.shared[name] = SharedArray(size, (len(self.shared) + 1) << _ARRAY)

    def _kernel(self) -> None:
        self._next()
        self._next("(")
        while self._peek() != ")":
            self._next(".param")
            kind = self._next().removeprefix(".")
            size = _bits(kind) // 8
            offset = -(-self.parameters_size // size) * size  # as in a C struct
            self.parameters[self._next()] = kind, offset
            self.parameters_size = offset + size
            if self._peek() == ",":
                self._next()
        self._next(")")
        while self._peek() != "{":
            self._next(".maxntid")
            sizes = [int(self._next())]
            while self._peek() == ",":
                self._next()
                sizes.append(int(self._next()))
            self.most_threads = int(np.prod(sizes))
        self._next("{")
        self._block({})

    def _block(self, outer: dict[str, Register]) -> None:
        """Statements up to the closing brace; registers that are declared here are known only here."""
        registers = dict(outer)
        while (word := self._next()) != "}":
            if word == "{":
                self._block(registers)
            elif word == ".reg":
                self._registers(registers)
            elif word == ".pragma":
                self._next()
                self._next(";")
            elif self._peek() == ":":
                self._next()
                self.labels[word] = len(self.instructions)
            else:
                self.at -= 1
                self._instruction(registers)

    def _registers(self, registers: dict[str, Register]) -> None:
        kind = self._next().removeprefix(".")
        if kind not in _DTYPES:
            raise self._refusal(f"registers of unknown type {kind}")
        while True:
            name = self._next()
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            names = [f"{many[1]}{number}" for number in range(int(many[2]))] if many else [name]
            for each in names:
                registers[each] = Register(len(self.kinds), kind)
                self.kinds.append(kind)
            if self._next(",", ";") == ";":
                return

    def _instruction(self, registers: dict[str, Register]) -> None:
        first = self.at
        line = self.tokens[first].line
        guard = None
        if self._peek() == "@":
            self._next()
            negated = self._peek() == "!"
            if negated:
                self._next()
            guard = registers[self._next()], negated
        opcode = self._next()
        operands = []
        while self._peek() != ";":
            operands.append(self._operand(registers))
            if self._peek() == ",":
                self._next()
        text = " ".join(token.text for token in self.tokens[first : self.at])
        self._next(";")
        self.instructions.append(Instruction(line, opcode, operands, guard, text))

    def _operand(self, registers: dict[str, Register]) -> Operand:
        word = self._next()
        if word == "{":
            parts = []
            while self._peek() != "}":
                parts.append(self._operand(registers))
                if self._peek() == ",":
                    self._next()
            self._next("}")
            return tuple(parts)
        if word == "[":
            name = self._next()
            offset = 0
            if self._peek() == "+":
                self._next()
                offset = int(self._next(), 0)
            self._next("]")
            return Address(registers.get(name, name), offset)
        if word in registers:
            return registers[word]
        if word in "](),;:@!+|=":
            raise self._refusal(f"cannot take the operand {word}")
        return Word(word)


# --- memory -----------------------------------------------------------------------------------------------------------


class Buffer:
    """A tensor in the GPU's memory: elements of 2, 4 or 8 bytes, as unsigned integers.

    Attributes:
        base: Its address.
        count: How many elements.
        size: Bytes of one.
    """

    def __init__(self, base: int, elements: Array) -> None:
        self.elements = elements
        self.start(base, len(elements), elements.dtype.itemsize)

    def start(self, base: int, count: int, size: int) -> None:
        self.base, self.count, self.size = base, count, size
        self.was_read = False
        self.written: list[tuple[Instruction, Array]] = []

    def get(self, places: Array) -> Array:
        return self.elements[places]

    def put(self, places: Array, values: Array) -> None:
        self.elements[places] = values

    def check(self) -> Array:
        """The places that were written, in order, after all threads are done."""
        if not self.written:
            return np.empty(0, np.int64)
        if self.was_read:
            raise PtxError(f"{self.written[0][0]}: writes a tensor that the same kernel reads")
        places = np.concatenate([places.ravel() for _, places in self.written])
        different, counts = np.unique(places, return_counts=True)
        if len(different) != len(places):
            twice = different[counts > 1][0]
            who = [str(instruction) for instruction, places in self.written if (places == twice).any()]
            raise PtxError(f"{' and '.join(who)}: write element {twice} twice")
        return different


class Rule(Buffer):
    """A tensor too large to hold: its elements follow from their places, and what is written is kept aside."""

    def __init__(self, base: int, count: int, size: int, rule: Callable[[Array], Array]) -> None:
        self.rule = rule
        self.stored: list[tuple[Array, Array]] = []
        self.start(base, count, size)

    def get(self, places: Array) -> Array:
        return self.rule(places).view(np.dtype(f"u{self.size}"))

    def put(self, places: Array, values: Array) -> None:
        self.stored.append((places.ravel(), values.ravel()))


class _Memory:
    """The buffers of a launch, by address."""

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self.regions = {buffer.base >> _REGION: buffer for buffer in buffers}

    def _place(self, instruction: Instruction, addresses: Array, bytes_each: int, lanes: int) -> list[Any]:
        """For each buffer that is meant: the buffer, which threads mean it, and the places of their elements."""
        width = bytes_each * lanes
        if (addresses % np.uint64(width)).any():
            raise PtxError(
                f"{instruction}: address {int(addresses[addresses % np.uint64(width) != 0][0]):#x} misaligned"
            )
        regions = addresses >> np.uint64(_REGION)
        found = []
        for region in np.unique(regions).tolist():
            buffer = self.regions.get(region)
            which = np.flatnonzero(regions == region)
            if buffer is None:
                raise PtxError(f"{instruction}: address {int(addresses[which[0]]):#x} is in no tensor")
            offsets = addresses[which].astype(np.int64) - buffer.base
            if bytes_each % buffer.size or (offsets % buffer.size).any():
                raise PtxError(f"{instruction}: touches part of an element of {buffer.size} bytes")
            outside = (offsets < 0) | (offsets + width > buffer.count * buffer.size)
            if outside.any():
                first = int(offsets[outside][0]) // buffer.size
                raise PtxError(f"{instruction}: element {first} of a tensor of {buffer.count}")
            places = (offsets // buffer.size)[:, None] + np.arange(width // buffer.size)
            found.append((buffer, which, places))
        return found

    def load(self, instruction: Instruction, addresses: Array, kind: Any, lanes: int) -> Array:
        """(threads, lanes) of a NumPy type."""
        made = np.empty((len(addresses), lanes), kind)
        for buffer, which, places in self._place(instruction, addresses, kind.itemsize, lanes):
            buffer.was_read = True
            made[which] = np.ascontiguousarray(buffer.get(places)).view(kind)
        return made

    def store(self, instruction: Instruction, addresses: Array, values: Array) -> None:
        for buffer, which, places in self._place(instruction, addresses, values.itemsize, values.shape[1]):
            buffer.written.append((instruction, places))
            buffer.put(places, np.ascontiguousarray(values[which]).view(np.dtype(f"u{buffer.size}")))


class _Shared:
    """The shared memory of some blocks, in words of 4 bytes, with who touched each word when.

    Time is counted in barriers. Two accesses are ordered if a barrier that both threads waited at lies between them:
    one of their warp, or one of their block.
    """

    def __init__(self, arrays: Iterable[SharedArray], blocks: int, threads: int) -> None:
        sizes = [array.size for array in arrays]
        self.sizes = np.array([0, *sizes], np.int64)
        self.starts = np.cumsum([0, 0, *sizes[:-1]]) if sizes else np.zeros(1, np.int64)
        words = sum(sizes) // 4
        self.threads = threads
        self.words = np.full((blocks, words), _UNWRITTEN, np.uint32)
        self.writer = np.zeros((blocks, words), np.int16)
        self.written_at = np.full((blocks, words), -1, np.int32)
        self.read_at = np.full((blocks, words, threads), -1, np.int32)
        self.warp_of = np.arange(threads) // WARP
        self.now = 0
        self.block_since = np.zeros(blocks, np.int32)
        self.warp_since = np.zeros((blocks, threads // WARP), np.int32)

    def barrier(self, block: int, warp: int | None = None) -> None:
        """All threads of the block, or of one warp of it, have waited."""
        self.now += 1
        if warp is None:
            self.block_since[block] = self.now
            self.warp_since[block] = self.now
        else:
            self.warp_since[block, warp] = self.now

    def _place(self, instruction: Instruction, addresses: Array, width: int) -> Array:
        """The words that each thread touches, (threads, width / 4)."""
        addresses = addresses.astype(np.int64)
        if (addresses % width).any():
            raise PtxError(f"{instruction}: address {int(addresses[addresses % width != 0][0]):#x} misaligned")
        which, offsets = addresses >> _ARRAY, addresses & ((1 << _ARRAY) - 1)
        known = (which > 0) & (which < len(self.sizes))
        sizes = self.sizes[np.where(known, which, 0)]
        if (offsets + width > sizes).any():
            outside = np.flatnonzero(offsets + width > sizes)[0]
            raise PtxError(f"{instruction}: byte {offsets[outside]} of a shared array of {sizes[outside]}")
        return ((self.starts[which] + offsets) // 4)[:, None] + np.arange(width // 4)

    def load(self, instruction: Instruction, threads: Array, addresses: Array, kind: Any, lanes: int) -> Array:
        words = self._place(instruction, addresses, kind.itemsize * lanes)
        block, thread = (each[:, None] for each in divmod(threads, self.threads))
        writer = self.writer[block, words]
        since = np.where(
            self.warp_of[writer] == self.warp_of[thread],
            self.warp_since[block, self.warp_of[thread]],
            self.block_since[block],
        )
        race = (self.written_at[block, words] >= since) & (writer != thread)
        if race.any():
            at = np.argwhere(race)[0]
            first, second = writer[tuple(at)], thread[at[0], 0]
            raise PtxError(f"{instruction}: thread {second} reads what thread {first} writes, with no barrier between")
        self.read_at[block, words, thread] = self.now
        return np.ascontiguousarray(self.words[block, words]).view(kind)

    def store(self, instruction: Instruction, threads: Array, addresses: Array, values: Array) -> None:
        words = self._place(instruction, addresses, values.itemsize * values.shape[1])
        block, thread = (each[:, None] for each in divmod(threads, self.threads))
        same_warp = self.warp_of == self.warp_of[thread]  # (threads, all threads of the block)
        since = np.where(same_warp, self.warp_since[block, self.warp_of[thread]], self.block_since[block])
        touched = self.read_at[block, words] >= since[:, None]
        writer = self.writer[block, words]
        touched[np.arange(len(words))[:, None], np.arange(words.shape[1]), writer] |= self.written_at[block, words] >= (
            np.take_along_axis(since, writer.astype(np.int64), 1)
        )
        touched[np.arange(len(words)), :, thread[:, 0]] = False
        if touched.any():
            at = np.argwhere(touched)[0]
            raise PtxError(
                f"{instruction}: thread {thread[at[0], 0]} writes what thread {at[2]} touches, with no barrier between"
            )
        everything = (block * self.words.shape[1] + words).ravel()
        if len(np.unique(everything)) != len(everything):
            raise PtxError(f"{instruction}: two threads write one place at once")
        self.words[block, words] = np.ascontiguousarray(values).view(np.uint32)
        self.writer[block, words] = thread
        self.written_at[block, words] = self.now


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _fma(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _quotient(a: Array, b: Array) -> Array:
    if (b == 0).any():
        raise PtxError("divides by zero")
    if a.dtype.kind == "u":
        return a // b
    made = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -made, made)  # towards zero


def _high(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    whole = (a.astype(object) * b.astype(object)) >> bits
    return whole.astype(a.dtype)


def _shift(direction: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def shift(value: Array, amount: Array) -> Array:
        bits = 8 * value.dtype.itemsize
        short = np.minimum(amount, bits - 1).astype(value.dtype)
        gone = np.where(value < 0, -1, 0) if direction is np.right_shift and value.dtype.kind == "i" else 0
        return np.where(amount >= bits, np.asarray(gone, value.dtype), direction(value, short))

    return shift


def _to_bfloat16(value: Array) -> Array:
    """float32 to nearest, ties to even; NaN to PTX's one NaN."""
    bits = value.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def _to_float16(value: Array) -> Array:
    return np.where(np.isnan(value), np.uint16(0x7FFF).view(np.float16), value.astype(np.float16))


def _unordered(compare: Callable[[Array, Array], Array], answer: bool) -> Callable[[Array, Array], Array]:
    def function(a: Array, b: Array) -> Array:
        nan = np.isnan(a) | np.isnan(b)
        return compare(a, b) | nan if answer else compare(a, b) & ~nan

    return function


_COMPARE: dict[str, Any] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_COMPARE_FLOATS: dict[str, Any] = {
    **{name: _unordered(function, False) for name, function in _COMPARE.items()},
    **{f"{name}u": _unordered(function, True) for name, function in _COMPARE.items()},
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
_ARITHMETIC: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "div": _quotient,
    "rem": lambda a, b: a - _quotient(a, b) * b,
}
_FLOAT_ARITHMETIC: dict[str, Any] = {
    **_ARITHMETIC,
    "min": np.fmin,
    "max": np.fmax,
    "div": np.divide,
    "sqrt": np.sqrt,
    "fma": _fma,
}
_LOGIC: dict[str, Any] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}
_ARITY = {"neg": 1, "abs": 1, "sqrt": 1, "not": 1, "fma": 3}


class Operation(NamedTuple):
    """What an instruction calculates: a function of vectors, the type of its result, those of its arguments."""

    function: Callable[..., Array]
    result: str
    arguments: list[str]


def _operation(opcode: str) -> Operation | None:
    """The meaning of an opcode that only calculates; None if there is none, or it is not known here."""
    parts = opcode.split(".")
    kind = parts[-1]
    match parts:
        case [("add" | "sub" | "mul" | "min" | "max" | "neg" | "abs") as name, _] if kind in _FLOATS:
            return Operation(_FLOAT_ARITHMETIC[name], kind, [kind] * _ARITY.get(name, 2))
        case [("add" | "sub" | "mul" | "div" | "sqrt" | "fma") as name, "rn", _] if kind in _FLOATS:
            return Operation(_FLOAT_ARITHMETIC[name], kind, [kind] * _ARITY.get(name, 2))
        case [("add" | "sub" | "min" | "max" | "div" | "rem" | "neg" | "abs") as name, _] if kind in _INTEGERS:
            if name in ("neg", "abs") and kind not in _SIGNED:
                return None
            return Operation(_ARITHMETIC[name], kind, [kind] * _ARITY.get(name, 2))
        case [("mul" | "mad") as name, ("lo" | "hi" | "wide") as part, _] if kind in _INTEGERS:
            return _product(name == "mad", part, kind)
        case [("and" | "or" | "xor" | "not") as name, _] if kind in _BITS or kind == "pred":
            return Operation(_LOGIC[name], kind, [kind] * _ARITY.get(name, 2))
        case ["shl", _] if kind in _BITS:
            return Operation(_shift(np.left_shift), kind, [kind, "u32"])
        case ["shr", _] if kind in _BITS | _INTEGERS:
            return Operation(_shift(np.right_shift), kind, [kind, "u32"])
        case ["setp", comparison, _]:
            function = (_COMPARE_FLOATS if kind in _FLOATS else _COMPARE).get(comparison)
            return Operation(function, "pred", [kind, kind]) if function and _comparable(kind, comparison) else None
        case ["setp", comparison, ("and" | "or" | "xor") as name, _]:
            compare = _operation(f"setp.{comparison}.{kind}")
            if compare is None:
                return None
            both, combine = compare.function, _LOGIC[name]
            return Operation(lambda a, b, c: combine(both(a, b), c), "pred", [kind, kind, "pred"])
        case ["selp", _] if kind in _DTYPES and kind != "pred":
            return Operation(lambda a, b, chosen: np.where(chosen, a, b), kind, [kind, kind, "pred"])
        case ["mov", _] if kind in _DTYPES:
            return Operation(lambda a: a, kind, [kind])
        case ["cvta", "to", "global", "u64"] | ["cvta", "to", "shared", "u64"]:
            return Operation(lambda a: a, kind, [kind])
        case ["cvt", *rounding, result, _]:
            function = _conversion(result, kind, rounding)
            return Operation(function, result, [kind]) if function else None
    return None


def _comparable(kind: str, comparison: str) -> bool:
    return kind in _FLOATS or kind in _INTEGERS or (kind in _BITS and comparison in ("eq", "ne"))


def _product(accumulate: bool, part: str, kind: str) -> Operation:
    multiply: Callable[[Array, Array], Array] = np.multiply
    result = kind
    if part == "hi":
        multiply = _high
    elif part == "wide":
        result = _wider(kind)
        wide = _DTYPES[result]
        multiply = lambda a, b: a.astype(wide) * b.astype(wide)  # noqa: E731
    if not accumulate:
        return Operation(multiply, result, [kind, kind])
    return Operation(lambda a, b, c: multiply(a, b) + c, result, [kind, kind, result])


def _conversion(result: str, kind: str, rounding: list[str]) -> Callable[[Array], Array] | None:
    if result in _INTEGERS and kind in _INTEGERS and not rounding:
        return lambda a: a.astype(_DTYPES[result])  # cuts off, or fills by the sign of the source
    if result in _FLOATS and kind in _INTEGERS and rounding == ["rn"]:
        return lambda a: a.astype(_DTYPES[result])
    if (result, kind) in (("f32", "f16"), ("f64", "f32")) and not rounding:
        return lambda a: a.astype(_DTYPES[result])
    if (result, kind) == ("f32", "f64") and rounding == ["rn"]:
        return lambda a: a.astype(np.float32)
    if (result, kind) == ("f16", "f32") and rounding == ["rn"]:
        return _to_float16
    if (result, kind) == ("bf16", "f32") and rounding == ["rn"]:
        return _to_bfloat16
    return None


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass
class Frame:
    """All that some blocks have while they run; a thread is an index into each register's vector."""

    threads: int  # of all these blocks
    registers: list[Array]
    defined: dict[int, Array]  # which threads have written a register; without an entry all have
    special: dict[str, Array]
    memory: _Memory
    shared: _Shared
    parameters: bytes


def _reader(kernel: _Reader, operand: Operand, kind: str) -> Callable[[Frame, Lanes], Array]:
    """What fetches an operand as a type."""
    dtype = _DTYPES[kind]
    if isinstance(operand, Register):
        if not _fits(operand.kind, kind):
            raise PtxError(f"a register of type {operand.kind} taken as {kind}")
        number = operand.number

        def read(frame: Frame, lanes: Lanes) -> Array:
            if number in frame.defined and not frame.defined[number][lanes].all():
                raise PtxError("reads a register before it is written")
            value = frame.registers[number][lanes]
            return value if kind == "pred" else value.view(dtype)

        return read
    if not isinstance(operand, Word):
        raise PtxError("cannot take this operand")
    word = operand.text
    if word in kernel.shared:
        return _constant(np.array([kernel.shared[word].base], dtype))
    if word in ("%tid.x", "%ctaid.x", "%ntid.x", "%nctaid.x"):
        if _bits(kind) != 32:
            raise PtxError(f"{word} taken as {kind}")
        return lambda frame, lanes: frame.special[word][lanes].view(dtype)
    if kind in _FLOATS:
        bits = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})" if kind == "f32" else r"0[dD]([0-9a-fA-F]{16})", word)
        if bits is None:
            raise PtxError(f"cannot take {word} as {kind}")
        return _constant(np.array([int(bits[1], 16)], _storage(kind)).view(dtype))
    if not re.fullmatch(r"-?(\d+|0[xX][0-9a-fA-F]+)U?", word):
        raise PtxError(f"cannot take {word}")
    number = int(word.rstrip("U"), 0)
    if kind == "pred":
        return _constant(np.array([bool(number)]))
    return _constant(np.array([number % 2 ** _bits(kind)], _storage(kind)).view(dtype))


def _constant(value: Array) -> Callable[[Frame, Lanes], Array]:
    return lambda frame, lanes: value


def _writer(operand: Operand, kind: str, loaded: bool = False) -> Callable[[Frame, Lanes, Array], None]:
    """What puts a result of a type into a register; what is loaded is extended where the register is wider."""
    if not isinstance(operand, Register):
        raise PtxError("the result does not go to a register")
    if not (_fits_memory if loaded else _fits)(operand.kind, kind):
        raise PtxError(f"a result of type {kind} for a register of type {operand.kind}")
    number, storage = operand.number, _storage(operand.kind)
    signed, narrow = _DTYPES[kind], _bits(kind) < _bits(operand.kind)

    def write(frame: Frame, lanes: Lanes, value: Array) -> None:
        bits = value.view(signed).astype(storage) if narrow else value
        frame.registers[number][lanes] = bits if kind == "pred" else bits.view(storage)
        if number in frame.defined:
            frame.defined[number][lanes] = True
            if frame.defined[number].all():
                del frame.defined[number]

    return write


def _translate(kernel: _Reader, instruction: Instruction) -> Callable[[Frame, Lanes], None]:
    """From an instruction to what does it. Branches and barriers are not done here."""
    base, *modifiers = instruction.opcode.split(".")
    operands = instruction.operands
    if base in ("ld", "st"):
        return _transfer(kernel, instruction, base, modifiers)
    if base == "mov" and any(isinstance(operand, tuple) for operand in operands):
        return _repack(kernel, operands, modifiers)
    operation = _operation(instruction.opcode)
    if operation is None:
        raise PtxError("this machine does not know the instruction")
    if len(operands) != 1 + len(operation.arguments):
        raise PtxError(f"{len(operands)} operands")
    write = _writer(operands[0], operation.result)
    reads = [_reader(kernel, *pair) for pair in zip(operands[1:], operation.arguments, strict=True)]
    function = operation.function

    def run(frame: Frame, lanes: Lanes) -> None:
        write(frame, lanes, function(*[read(frame, lanes) for read in reads]))

    return run


def _repack(kernel: _Reader, operands: list[Operand], modifiers: list[str]) -> Callable[[Frame, Lanes], None]:
    """``mov`` between a register and its parts, the lowest first."""
    if modifiers not in (["b32"], ["b64"]):
        raise PtxError("this machine does not know the instruction")
    target, source = operands
    whole, half = modifiers[0], f"b{_bits(modifiers[0]) // 2}"
    if isinstance(source, tuple):
        low, high = (_reader(kernel, part, half) for part in source)
        write = _writer(target, whole)

        def join(frame: Frame, lanes: Lanes) -> None:
            parts = np.stack([low(frame, lanes), high(frame, lanes)], axis=1)
            write(frame, lanes, parts.view(_DTYPES[whole])[:, 0])

        return join
    read = _reader(kernel, source, whole)
    assert isinstance(target, tuple)
    write_low, write_high = (_writer(part, half) for part in target)

    def split(frame: Frame, lanes: Lanes) -> None:
        parts = np.ascontiguousarray(read(frame, lanes)).view(_DTYPES[half]).reshape(-1, 2)
        write_low(frame, lanes, np.ascontiguousarray(parts[:, 0]))
        write_high(frame, lanes, np.ascontiguousarray(parts[:, 1]))

    return split


def _transfer(
    kernel: _Reader, instruction: Instruction, base: str, modifiers: list[str]
) -> Callable[[Frame, Lanes], None]:
    """Loads and stores."""
    *where, kind = modifiers
    count = {"v2": 2, "v4": 4}.get(where[-1], 1)
    where = where[:-1] if count > 1 else where
    if kind not in _DTYPES or kind == "pred" or count * _bits(kind) > 128:
        raise PtxError("this machine does not know the instruction")
    dtype, storage = _DTYPES[kind], _storage(kind)
    address, values = instruction.operands if base == "st" else instruction.operands[::-1]
    parts = values if isinstance(values, tuple) else (values,)
    if not isinstance(address, Address) or len(parts) != count:
        raise PtxError("the operands do not fit")
    if (base, where) == ("ld", ["param"]) and count == 1:
        return _load_parameter(kernel, address, parts[0], kind)
    find = _reader(kernel, address.base if isinstance(address.base, Register) else Word(address.base), "u64")
    offset = np.uint64(address.offset % 2**64)

    def addresses(frame: Frame, lanes: Lanes) -> Array:
        found = find(frame, lanes) + offset
        return np.broadcast_to(found, len(_indices(frame, lanes)))

    if base == "ld":
        writes = [_writer(part, kind, loaded=True) for part in parts]
        if where not in (["global"], ["global", "nc"], ["shared"]):
            raise PtxError("this machine does not know the instruction")

        def load(frame: Frame, lanes: Lanes) -> None:
            if where == ["shared"]:
                threads = _indices(frame, lanes)
                made = frame.shared.load(instruction, threads, addresses(frame, lanes), dtype, count)
            else:
                made = frame.memory.load(instruction, addresses(frame, lanes), dtype, count)
            for place, write in enumerate(writes):
                write(frame, lanes, np.ascontiguousarray(made[:, place]))

        return load
    reads = [_reader(kernel, part, _stored_as(part, kind)) for part in parts]
    if where not in (["global"], ["shared"]):
        raise PtxError("this machine does not know the instruction")

    def store(frame: Frame, lanes: Lanes) -> None:
        threads = _indices(frame, lanes)
        each = [np.broadcast_to(read(frame, lanes), len(threads)) for read in reads]
        each = [value.view(storage) if value.itemsize == storage.itemsize else value.astype(storage) for value in each]
        made = np.stack(each, axis=1)
        if where == ["shared"]:
            frame.shared.store(instruction, threads, addresses(frame, lanes), made)
        else:
            frame.memory.store(instruction, addresses(frame, lanes), made)

    return store


def _stored_as(operand: Operand, kind: str) -> str:
    """The type to read what is stored as: that of the register where it is wider, of which the low bits are stored."""
    if isinstance(operand, Register) and not _fits(operand.kind, kind) and _fits_memory(operand.kind, kind):
        return operand.kind
    return kind


def _load_parameter(kernel: _Reader, address: Address, target: Operand, kind: str) -> Callable[[Frame, Lanes], None]:
    name = address.base
    if name not in kernel.parameters:
        raise PtxError(f"no parameter {name}")
    declared, offset = kernel.parameters[name]
    size, storage = _bits(kind) // 8, _storage(kind)
    if address.offset % size or not 0 <= address.offset <= _bits(declared) // 8 - size:
        raise PtxError(f"a parameter of type {declared} read as {kind} from {address.offset}")
    write, start = _writer(target, kind, loaded=True), offset + address.offset

    def load(frame: Frame, lanes: Lanes) -> None:
        write(frame, lanes, np.frombuffer(frame.parameters[start : start + size], storage))

    return load


def _indices(frame: Frame, lanes: Lanes) -> Array:
    return np.arange(frame.threads) if isinstance(lanes, slice) else lanes


_RUNNING, _AT_BLOCK, _AT_WARP, _DONE = range(4)


class Kernel:
    """A kernel that is ready to run.

    Args:
        text: Of a module with one kernel.

    Raises:
        PtxError: There is something in it that this machine does not know.
    """

    def __init__(self, text: str) -> None:
        self.source = _Reader(text)
        self.instructions = self.source.instructions
        self.successors: dict[int, int] = {}  # of branches
        for number, instruction in enumerate(self.instructions):
            try:
                self._prepare(number, instruction)
            except PtxError as error:
                raise PtxError(f"{instruction}: {error}") from None
        starts = {0, *self.source.labels.values()}
        starts |= {number + 1 for number, each in enumerate(self.instructions) if each.run is None}
        self.ends: dict[int, int] = {}  # of the straight runs of instructions, by their first
        for start, end in zip(sorted(starts), [*sorted(starts)[1:], len(self.instructions)], strict=True):
            self.ends[start] = end

    def _prepare(self, number: int, instruction: Instruction) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in ("bra", "bra.uni"):
            (target,) = operands
            if not isinstance(target, Word) or target.text not in self.source.labels:
                raise PtxError("no such label")
            self.successors[number] = self.source.labels[target.text]
        elif opcode in ("ret", "bar.sync", "bar.warp.sync"):
            expected = {"ret": [], "bar.sync": [Word("0")], "bar.warp.sync": [Word("0xffffffff")]}[opcode]
            if operands != expected or instruction.guard:
                raise PtxError("this machine does not know the instruction")
        else:
            instruction.run = _translate(self.source, instruction)

    def run(
        self,
        blocks: Sequence[int],
        grid: int,
        threads: int,
        parameters: bytes,
        buffers: Sequence[Buffer],
        executed: Counter[Instruction] | None = None,
    ) -> None:
        """Runs some blocks of a launch.

        Args:
            blocks: Which.
            grid: How many the launch has.
            threads: Of a block.
            parameters: As they are packed for the driver.
            buffers: The tensors that the parameters point to.
            executed: Counts, for every instruction, the threads that did it.

        Raises:
            PtxError: See the module.
        """
        if self.source.most_threads is not None and threads > self.source.most_threads:
            raise PtxError(f"{threads} threads; compiled for {self.source.most_threads}")
        if threads % WARP or len(parameters) != self.source.parameters_size:
            raise PtxError(f"{threads} threads, {len(parameters)} bytes of {self.source.parameters_size} of parameters")
        memory = _Memory(buffers)
        counts: Counter[Instruction] = Counter() if executed is None else executed
        with np.errstate(all="ignore"):
            for first in range(0, len(blocks), _BATCH):
                _Run(self, blocks[first : first + _BATCH], grid, threads, memory, parameters, counts).go()
        for buffer in buffers:
            buffer.check()


class _Run:
    """Some blocks, from their start to their end."""

    def __init__(
        self,
        kernel: Kernel,
        blocks: Sequence[int],
        grid: int,
        threads: int,
        memory: _Memory,
        parameters: bytes,
        counts: Counter[Instruction],
    ) -> None:
        self.kernel, self.counts = kernel, counts
        self.shape = len(blocks), threads
        total = len(blocks) * threads
        special = {
            "%tid.x": np.tile(np.arange(threads, dtype=np.uint32), len(blocks)),
            "%ctaid.x": np.repeat(np.array(blocks, np.uint32), threads),
            "%ntid.x": np.full(total, threads, np.uint32),
            "%nctaid.x": np.full(total, grid, np.uint32),
        }
        self.frame = Frame(
            threads=total,
            registers=[np.zeros(total, _storage(kind)) for kind in kernel.source.kinds],
            defined={number: np.zeros(total, np.bool_) for number in range(len(kernel.source.kinds))},
            special=special,
            memory=memory,
            shared=_Shared(kernel.source.shared.values(), *self.shape),
            parameters=parameters,
        )
        self.at = np.zeros(total, np.int64)  # each thread's next instruction
        self.state = np.full(total, _RUNNING, np.int8)

    def go(self) -> None:
        while True:
            running = np.flatnonzero(self.state == _RUNNING)
            if len(running):
                here = self.at[running].min()
                self._straight(int(here), running[self.at[running] == here])
            elif (self.state == _DONE).all():
                return
            else:
                self._release()

    def _straight(self, start: int, threads: Array) -> None:
        """The instructions from ``start`` on, up to where threads may part or must wait."""
        end = self.kernel.ends[start]
        lanes: Lanes = slice(None) if len(threads) == self.frame.threads else threads
        for number in range(start, end):
            instruction = self.kernel.instructions[number]
            if instruction.run is None:
                return self._leave(number, instruction, threads, lanes)
            chosen = self._guarded(instruction, threads, lanes)
            some = _indices(self.frame, chosen)
            if not len(some):
                continue
            self.counts[instruction] += len(some)
            try:
                instruction.run(self.frame, chosen)
            except PtxError as error:
                message = str(error)
                raise PtxError(message if message.startswith("line ") else f"{instruction}: {message}") from None
        if end == len(self.kernel.instructions):
            raise PtxError("the threads run past the end")
        self.at[threads] = end

    def _guarded(self, instruction: Instruction, threads: Array, lanes: Lanes) -> Lanes:
        """The threads whose predicate lets them do it."""
        if instruction.guard is None:
            return lanes
        register, negated = instruction.guard
        try:
            chosen = _reader(self.kernel.source, register, "pred")(self.frame, lanes) != negated
        except PtxError as error:
            raise PtxError(f"{instruction}: {error}") from None
        return lanes if chosen.all() else threads[chosen]

    def _leave(self, number: int, instruction: Instruction, threads: Array, lanes: Lanes) -> None:
        """A branch, a barrier or the end."""
        self.counts[instruction] += len(threads)
        self.at[threads] = number + 1
        if instruction.opcode == "ret":
            self.state[threads] = _DONE
        elif instruction.opcode == "bar.sync":
            self.state[threads] = _AT_BLOCK
        elif instruction.opcode == "bar.warp.sync":
            self.state[threads] = _AT_WARP
        else:
            taken = _indices(self.frame, self._guarded(instruction, threads, lanes))
            self.at[taken] = self.kernel.successors[number]

    def _release(self) -> None:
        """Lets those go on that wait at a barrier that all have reached."""
        state, at = self.state.reshape(self.shape), self.at.reshape(self.shape)
        moved = False
        for block in range(self.shape[0]):
            if (state[block] == _AT_BLOCK).all() and (at[block] == at[block, 0]).all():
                state[block] = _RUNNING
                self.frame.shared.barrier(block)
                moved = True
            for warp in range(self.shape[1] // WARP):
                part = slice(warp * WARP, (warp + 1) * WARP)
                if (state[block, part] == _AT_WARP).all() and (at[block, part] == at[block, part][0]).all():
                    state[block, part] = _RUNNING
                    self.frame.shared.barrier(block, warp)
                    moved = True
        if not moved:
            waiting = np.flatnonzero((self.state == _AT_BLOCK) | (self.state == _AT_WARP))
            where = {str(self.kernel.instructions[number - 1]) for number in self.at[waiting].tolist()}
            raise PtxError(f"{' and '.join(sorted(where))}: not all threads come to this barrier")


# --- a stand-in for a GPU ---------------------------------------------------------------------------------------------


@functools.cache
def compiled(variant: Any, capability: tuple[int, int]) -> Kernel:
    """A kernel, compiled for an architecture."""
    from ddf_convert.cuda.codegen.ptx import compile_ptx

    return Kernel(compile_ptx(variant, capability))


def flat(tensor: Tensor) -> Array:
    """The elements of a dense tensor as they stand in memory, as unsigned integers."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    made = tensor.as_strided((tensor.numel(),), (1,)).view(words).numpy()
    return made.view(f"u{made.itemsize}")


def address(number: int, tensor: Tensor) -> int:
    """A made-up address for the tensor of this number: as far from a multiple of 4096 as it is on the CPU."""
    return ((number + 1) << _REGION) + tensor.data_ptr() % 4096


@dataclass
class Gpu:
    """Stands in for a GPU: ``run`` has the signature of ``dispatch._run``, for tensors of the CPU.

    Attributes:
        capability: Of the architecture that kernels are compiled for.
        executed: How many threads did each instruction.
        variants: What has run.
    """

    capability: tuple[int, int] = (9, 0)
    executed: Counter[Instruction] = field(default_factory=Counter)
    variants: list[Any] = field(default_factory=list)

    def run(self, variant: Any, device: torch.device, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Runs a kernel; it must write its outputs whole: what it sums up in, or its first argument."""
        buffers = {
            number: Buffer(address(number, argument), flat(argument))
            for number, argument in enumerate(arguments)
            if isinstance(argument, Tensor)
        }
        self.launch(variant, range(blocks), blocks, arguments, buffers)
        outputs = [number for number, letter in enumerate(variant.arguments) if letter == "c"] or [0]
        for number, buffer in buffers.items():
            written = len(buffer.check())
            if written != (buffer.count if number in outputs else 0):
                raise PtxError(f"{variant.name}: wrote {written} of {buffer.count} elements of argument {number}")
        self.variants.append(variant)

    def launch(
        self,
        variant: Any,
        chosen: Sequence[int],
        blocks: int,
        arguments: tuple[Any, ...],
        buffers: dict[int, Buffer],
    ) -> None:
        """Runs chosen blocks; ``buffers`` are the arguments that are tensors, by their number."""
        from ddf_convert.cuda.codegen.driver import parameter_format

        values = [buffers[at].base if at in buffers else each for at, each in enumerate(arguments)]
        format: struct.Struct = parameter_format(variant)
        kernel = compiled(variant, self.capability)
        kernel.run(chosen, blocks, variant.threads, format.pack(*values), list(buffers.values()), self.executed)
