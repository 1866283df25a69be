"""Comparisons as one HTML page."""

from __future__ import annotations

import re

import pytest
from support.html_tags import Tags, read_page_that_stands_alone
from support.report_plans import ODD, TIMED, make_plan, make_site

from ddf_convert.conversion import Plan, Site
from ddf_convert.report import Comparison, html


def page(plan: Plan, model: str | None = None) -> str:
    return html.page(Comparison.of(plan, model))


def test_the_page_stands_alone_and_names_every_site() -> None:
    found = read_page_that_stands_alone(page(ODD, "asked"))
    for name in ODD.names():
        assert name in found.text
    for expected in ("asked", "3 of 10 convolutions", "25.56 M", "36.9 k", "called 3 times"):
        assert expected in found.text


def test_the_page_of_an_untimed_plan_says_so_and_how_to_measure() -> None:
    text = Tags(page(ODD)).text
    assert "fewer MACs are not by themselves faster: --measure" in " ".join(text.split())
    assert "Latency not measured" in " ".join(text.split())
    assert "0 ms" not in text


def test_the_page_of_a_timed_plan() -> None:
    found = Tags(page(TIMED))
    for expected in (
        "16.9 ms",
        "20.0 ms",
        "an abacus",
        "The latency after is an estimate",
        "The model as a whole is odd",
        "More than before: latency of 1, out of 3 convolutions replaced",
        "may be looked at elsewhere",
        "layer1.0.conv2: 2.00 ms → 3.00 ms",
    ):
        assert expected in found.text
    assert "not measured" not in found.text


def test_charts_have_a_bar_for_every_layer_before_and_after() -> None:
    html = page(TIMED)
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        assert chart.count("<title>") == len(TIMED)
        assert chart.count('class="before"') == len(TIMED)
    latency = charts[3]
    assert latency.count('class="grown"') == 1  # the one layer that got slower
    assert latency.count('class="after"') == len(TIMED) - 1
    heights = [float(height) for height in re.findall(r'height="([\d.]+)"', latency)]
    assert heights[0] == max(heights) == pytest.approx(100 / 1.04, abs=0.01)
    assert heights[1] == pytest.approx(heights[0] * 1.125 / 5.25, abs=0.01)
    assert html.count(">layer1</span>") == html.count(">layer2</span>") == 4
    assert "5 ms" in html


def test_the_page_of_a_large_network_names_its_parts_and_folds_long_lists() -> None:
    names = [f"backbone.{part}.{number}" for part in ("stem", "body", "head") for number in range(60)]
    html = page(make_plan(*(make_site(name, reason="not today") for name in names)))
    found = Tags(html)
    for name in names:
        assert name in found.text
    for part in ("stem", "body", "head"):
        assert html.count(f">{part}</span>") == 3  # once for each of the charts, of which that of latency is missing
    assert "180 dense 3x3: not today" in found.text
    assert "One by one" in found.text


@pytest.mark.parametrize("evil", ['"><img src=x onerror=alert(1)>', "a & b {c} {{ d }} %s"])
def test_the_page_escapes_what_it_shows(evil: str) -> None:
    evil_plan = make_plan(make_site(evil, replaced=True, reason=evil), make_site(evil + "2", evil, evil), model=evil)
    found = Tags(page(evil_plan))
    assert not {"script", "img"} & found.tags
    assert found.text.count(evil) >= 5


@pytest.mark.parametrize("sites", [(), (make_site("a"),), (make_site("a", replaced=True),)])
def test_the_page_of_few_sites(sites: tuple[Site, ...]) -> None:
    assert "25.56 M" in Tags(page(make_plan(*sites))).text
