"""How numbers are written, everywhere, and what they mean: 25.56 M, 4.09 G, 28.1 MiB, 0.450 ms, -34.1 %."""

from __future__ import annotations

import math
from collections.abc import Callable

NOTE = (
    "MACs are multiply-accumulates, which papers call FLOPs. Activations are what autograd keeps for the backward pass."
)

_COUNTS = ("", " k", " M", " G", " T", " P")
_BYTES = (" B", " KiB", " MiB", " GiB", " TiB")
_MOST_TICKS = 5


def count(number: int, beside: int = 0) -> str:
    """A total, to two decimals: ``25557032 -> "25.56 M"``.

    Beside a greater total it takes that one's unit, down to a tenth of it: 1.81 G -> 0.36 G, not 355.23 M.
    """
    if beside > number >= 1000:
        power = (len(str(beside)) - 1) // 3
        if 10 * number >= 1000**power:
            return f"{number / 1000**power:.2f}{_COUNTS[power]}"
    return _scaled(number, 1000, _COUNTS, lambda value: f"{value:.2f}")


def short(number: int) -> str:
    """A number among many, to three figures: ``36864 -> "36.9 k"``."""
    return _scaled(number, 1000, _COUNTS, _three_figures)


def size(number: int) -> str:
    """Bytes, to three figures: ``29502464 -> "28.1 MiB"``."""
    return _scaled(number, 1024, _BYTES, _three_figures)


def milliseconds(number: float) -> str:
    """A time, to three figures: ``"33.1 ms"``."""
    return f"{figure(number)} ms"


def figure(value: float | None) -> str:
    """Three figures, or all before the point; a dash for what is unknown."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return (
        f"{value:#.3g}".rstrip(".")
        if 0.001 <= abs(value) < 999.5
        else f"{value:,.0f}"
        if value >= 1
        else f"{value:.1e}"
    )


def count_axis(greatest: float) -> list[tuple[float, str]]:
    """Round numbers from 0 up to the greatest, and how an axis calls them: ``[(0, "0"), (50000000, "50 M"), ...]``."""
    return _axis(greatest, 1000, _COUNTS)


def size_axis(greatest: float) -> list[tuple[float, str]]:
    """The same in bytes."""
    return _axis(greatest, 1024, _BYTES)


def milliseconds_axis(greatest: float) -> list[tuple[float, str]]:
    """The same in milliseconds."""
    return _axis(greatest, math.inf, (" ms",))


def change(before: float, after: float) -> str:
    """The change from one number to another: ``"-34.1 %"``; a dash where there was nothing before."""
    if before == after:
        return "none"
    if before == 0:
        return "-"
    return f"{100 * (after - before) / before:+.1f} %"


def _axis(greatest: float, base: float, units: tuple[str, ...]) -> list[tuple[float, str]]:
    """Steps of 1, 2 or 5, and a few of them."""
    if greatest <= 0:
        return [(0, "0")]
    power = 0
    while power < len(units) - 1 and greatest >= base ** (power + 1):
        power += 1
    unit = base**power if power else 1
    decade = 10 ** math.floor(math.log10(greatest / unit / _MOST_TICKS))
    step = next(digit * decade for digit in (1, 2, 5, 10) if greatest / unit / (digit * decade) <= _MOST_TICKS)
    ticks = [number * step for number in range(int(greatest / unit / step) + 1)]
    return [(tick * unit, f"{tick:g}{units[power]}" if tick else "0") for tick in ticks]


def _three_figures(value: float) -> str:
    magnitude = abs(value)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{decimals}f}"


def _scaled(number: int, base: int, units: tuple[str, ...], written: Callable[[float], str]) -> str:
    """Divides by ``base`` until what is written is below it; numbers without a prefix are written whole."""
    if abs(number) < base:
        return f"{number}{units[0]}"
    power = 1
    while power < len(units) - 1 and abs(float(written(number / base**power))) >= base:
        power += 1
    return f"{written(number / base**power)}{units[power]}"
