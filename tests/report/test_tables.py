"""Comparisons as tables for a terminal."""

from __future__ import annotations

import pytest
from rich.console import Console
from support.report_plans import ODD, TIMED, make_plan, make_site

from ddf_convert.conversion import Plan, Site
from ddf_convert.conversion.plan import Timed
from ddf_convert.report import Comparison, tables


def printed(plan: Plan, width: int = 80, everything: bool = False) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(tables.tables(Comparison.of(plan), everything))
    return capture.get()


@pytest.mark.parametrize(("width", "everything"), [(50, True), (80, False), (200, True)])
def test_tables_keep_to_the_width(width: int, everything: bool) -> None:
    text = printed(ODD, width, everything)
    assert max(map(len, (text + printed(TIMED, width, everything)).splitlines())) <= width
    assert "stem=True" not in text
    assert ("already converted: DDF" in " ".join(text.split())) == everything


def test_tables_say_what_matters() -> None:
    text = printed(ODD)
    for expected in (
        "odd, one 3x224x224 input: 3 of 10 convolutions replaced",
        "25.56 M",
        "4.09 G",
        "36.9 k -> 9.00 k",
        "116 M -> 3.60 M",
        "shared (called 3 times)",
        "bottleneck: 1x1 convolutions on both sides mix channels (1)",
        "To replace these too: --stem (1), --depthwise (1)",
        "4 other convolutions left alone: 2 of 1x1, 1 of 1x7, 1 DDF",
    ):
        assert expected in text
    assert "multiply-accumulates" in text


def test_tables_say_what_was_not_measured() -> None:
    text = " ".join(printed(ODD).split())
    assert "latency - - not measured" in text
    assert "fewer MACs are not by themselves faster: --measure" in text
    assert " ms" not in text


def test_tables_of_a_timed_plan() -> None:
    lines = printed(TIMED).splitlines()
    text = " ".join(" ".join(lines).split())
    assert "latency 20.0 ms 16.9 ms -15.6 %" in text
    assert "on an abacus" in text
    assert "The latency after is an estimate" in text
    assert "The model as a whole is odd" in text
    assert "More than before: latency of 1, out of 3 convolutions replaced" in text
    assert next(line.split() for line in lines if line.startswith("layer1.0.conv2"))[-3:] == ["2.00", "->", "3.00"]
    assert "may be looked at elsewhere (1)" in text
    assert "not measured" not in text


def test_the_converted_models_own_time_is_shown_while_the_plan_is_as_it_was_timed() -> None:
    timed = TIMED.model_copy(deep=True)
    timed.timed = Timed(machine="an abacus", replaced=tuple(site.name for site in timed.replaced), after_ms=5.0)
    text = " ".join(printed(timed).split())
    assert "latency 20.0 ms 5.00 ms -75.0 %" in text
    assert "estimate" not in text
    timed.replaced[0].skip()
    assert "estimate" in printed(timed)


@pytest.mark.parametrize(
    ("sites", "expected"),
    [
        ((), "no convolutions"),
        ((make_site("a", "pointwise 1x1"),), "1 convolution left alone: 1 of 1x1"),
        ((make_site("a", replaced=True),), "1 of 1 convolution replaced"),
    ],
)
def test_tables_of_few_sites(sites: tuple[Site, ...], expected: str) -> None:
    assert expected in printed(make_plan(*sites))
