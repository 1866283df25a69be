"""Formats numbers for people: 25.56 M, 4.09 G, 28.1 MiB, 0.450 ms, -34.1 %."""

from __future__ import annotations

import math
from collections.abc import Callable

NOTE = (
    "MACs are multiply-accumulates, which papers call FLOPs. Activations are what autograd keeps for the backward pass."
)

_COUNTS = ("", " k", " M", " G", " T", " P")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")
_MAX_TICKS = 5


def count(number: int, beside: int = 0) -> str:
    """Formats a total to two decimals: ``25557032 -> "25.56 M"``.

    Beside a greater total it takes that total's unit if it is at least a tenth of it: 1.81 G -> 0.36 G, not 355.23 M.
    """
    if beside > number >= 1000:
        power = (len(str(beside)) - 1) // 3
        if 10 * number >= 1000**power:
            return f"{number / 1000**power:.2f}{_COUNTS[power]}"
    return _scaled(number, 1000, _COUNTS, lambda value: f"{value:.2f}")


def short(number: int) -> str:
    """Formats a count to three figures: ``36864 -> "36.9 k"``."""
    return _scaled(number, 1000, _COUNTS, _three_figures)


def size(number: int) -> str:
    """Formats bytes to three figures: ``29502464 -> "28.1 MiB"``."""
    return _scaled(number, 1024, _BYTES, _three_figures)


def milliseconds(number: float) -> str:
    """Formats a time to three figures: ``"33.1 ms"``."""
    return f"{figure(number)} ms"


def figure(value: float | None) -> str:
    """Formats a number to three figures, or to all before the point; None is a dash."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if 0.001 <= abs(value) < 999.5:
        return f"{value:#.3g}".rstrip(".")
    return f"{value:,.0f}" if value >= 1 else f"{value:.1e}"


def count_axis(greatest: float) -> list[tuple[float, str]]:
    """Returns an axis's ticks from 0 to at most the greatest number: ``[(0, "0"), (50000000, "50 M"), ...]``."""
    return _axis(greatest, 1000, _COUNTS)


def size_axis(greatest: float) -> list[tuple[float, str]]:
    """Returns the ticks of an axis in bytes."""
    return _axis(greatest, 1024, _BYTES)


def milliseconds_axis(greatest: float) -> list[tuple[float, str]]:
    """Returns the ticks of an axis in milliseconds."""
    return _axis(greatest, math.inf, (" ms",))


def change(before: float, after: float) -> str:
    """Formats the relative change: ``"-34.1 %"``; a dash where the number before is 0."""
    if before == after:
        return "none"
    if before == 0:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %"


def _axis(greatest: float, base: float, units: tuple[str, ...]) -> list[tuple[float, str]]:
    """Ticks in steps of 1, 2 or 5 times a power of ten."""
    if greatest <= 0:
        return [(0, "0")]
    power = 0
    while power < len(units) - 1 and greatest >= base ** (power + 1):
        power += 1
    unit = base**power if power else 1
    decade = 10 ** math.floor(math.log10(greatest / unit / _MAX_TICKS))
    step = next(digit * decade for digit in (1, 2, 5, 10) if greatest / unit / (digit * decade) <= _MAX_TICKS)
    ticks = [number * step for number in range(int(greatest / unit / step) + 1)]
    return [(tick * unit, f"{tick:g}{units[power]}" if tick else "0") for tick in ticks]


def _three_figures(value: float) -> str:
    magnitude = abs(value)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{decimals}f}"


def _scaled(number: int, base: int, units: tuple[str, ...], write: Callable[[float], str]) -> str:
    """Divides by ``base`` until the rounded number is below it; numbers without a prefix stay whole."""
    if abs(number) < base:
        return f"{number}{units[0]}"
    power = 1
    while power < len(units) - 1 and abs(float(write(number / base**power))) >= base:
        power += 1
    return f"{write(number / base**power)}{units[power]}"
