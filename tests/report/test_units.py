"""How numbers are written."""

from __future__ import annotations

from typing import Any

import pytest

from ddf_convert.report import units


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.count(25_557_032), "25.56 M"),
        (units.count(4_089_184_256), "4.09 G"),
        (units.count(355_229_696, beside=1_814_073_344), "0.36 G"),
        (units.count(99_999_999, beside=1_814_073_344), "100.00 M"),
        (units.count(2_000_000_000, beside=1_814_073_344), "2.00 G"),
        (units.count(0), "0"),
        (units.count(0, beside=5_000_000), "0"),
        (units.count(999), "999"),
        (units.count(999_994), "999.99 k"),
        (units.count(999_996), "1.00 M"),
        (units.short(36_864), "36.9 k"),
        (units.short(9_432), "9.43 k"),
        (units.short(9_996), "10.0 k"),
        (units.short(999_600), "1.00 M"),
        (units.size(29_502_464), "28.1 MiB"),
        (units.size(1023), "1023 B"),
        (units.size(1024), "1.00 KiB"),
        (units.size(1023 * 1024 + 900), "1.00 MiB"),
        (units.milliseconds(33.14), "33.1 ms"),
        (units.figure(None), "-"),
        (units.figure(0), "0"),
        (units.figure(0.0123456), "0.0123"),
        (units.figure(1.5), "1.50"),
        (units.figure(99.96), "100"),
        (units.figure(12345.6), "12,346"),
        (units.figure(2e-5), "2.0e-05"),
        (units.change(25_557_032, 16_843_748), "-34.1 %"),
        (units.change(100, 137), "+37.0 %"),
        (units.change(100, 100), "none"),
        (units.change(0, 5), "-"),
    ],
)
def test_numbers_are_written_with_their_units(written: str, expected: str) -> None:
    assert written == expected


@pytest.mark.parametrize(
    ("axis", "greatest", "expected"),
    [
        (units.count_axis, 118e6, ["0", "50 M", "100 M"]),
        (units.count_axis, 999, ["0", "200", "400", "600", "800"]),
        (units.count_axis, 0, ["0"]),
        (units.size_axis, 3.1 * 2**20, ["0", "1 MiB", "2 MiB", "3 MiB"]),
        (units.size_axis, 1024, ["0", "0.2 KiB", "0.4 KiB", "0.6 KiB", "0.8 KiB", "1 KiB"]),
        (units.milliseconds_axis, 0.9, ["0", "0.2 ms", "0.4 ms", "0.6 ms", "0.8 ms"]),
        (units.milliseconds_axis, 2500, ["0", "500 ms", "1000 ms", "1500 ms", "2000 ms", "2500 ms"]),
    ],
)
def test_axes_have_a_few_round_numbers(axis: Any, greatest: float, expected: list[str]) -> None:
    ticks = axis(greatest)
    assert [text for _, text in ticks] == expected
    assert all(0 <= number <= greatest for number, _ in ticks)
