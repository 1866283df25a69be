"""Numbers in words, and plans as data, tables and a page."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from rich.console import Console
from support.html_tags import Tags

from ddf_convert.conversion import Action, ConvertConfig, Plan, Replacement, Site
from ddf_convert.conversion.plan import FoundBy, Timed
from ddf_convert.cost.count import Cost
from ddf_convert.report import Comparison, html, report, tables, units
from ddf_convert.report.data import count_kinds


def site(
    name: str,
    kind: str = "dense 3x3",
    reason: str = "",
    replaced: bool = False,
    calls: int = 1,
    ms: tuple[float | None, float | None] = (None, None),
    **more: Any,
) -> Site:
    before = Cost(params=36_864, macs=115_605_504, activation_bytes=800, latency_ms=ms[0])
    after = Cost(params=9_000, macs=3_600_000, latency_ms=ms[1])
    options = {"in_channels": 64}
    return Site(
        name=name,
        kind=kind,
        in_channels=64,
        out_channels=64,
        stride=(1, 1),
        input_shape=(1, 64, 56, 56),
        output_shape=(1, 64, 56, 56),
        calls=calls,
        action=Action.REPLACE if replaced else Action.SKIP,
        reason=reason,
        replacement=Replacement(layer="DDF2d", options=options) if replaced else None,
        before=before,
        after=after if replaced else before,
        **more,
    )


def plan(*sites: Site, model: str = "net", ms: float | None = None, **more: Any) -> Plan:
    before = Cost(params=25_557_032, macs=4_089_184_256, activation_bytes=85_000_000, latency_ms=ms)
    config = ConvertConfig()
    return Plan(model=model, input_size=(3, 224, 224), config=config, before=before, sites=list(sites), **more)


ODD = plan(
    site("layer1.0.conv2", reason="bottleneck: 1x1 convolutions on both sides mix channels", replaced=True),
    site("a_rather_deep.path_of_modules.that_goes.on_and_on.until_it_passes.eighty_columns.conv", replaced=True),
    site("shared", reason="DDF + 1x1: nothing else mixes channels", replaced=True, calls=3),
    site("stem", reason="stem: 3 input channels (stem=True replaces it)"),
    site("depthwise", "depthwise 3x3", "DDF would add 5 parameters to it (depthwise=True replaces it)"),
    site("conv2d", "functional", "called as a function, has no module to swap"),
    site("one", "pointwise 1x1", "1x1 kernel; DDF replaces 3x3"),
    site("two", "pointwise 1x1", "1x1 kernel; DDF replaces 3x3"),
    site("wide", "grouped 1x7", "1x7 kernel; DDF replaces 3x3"),
    site("done", "DDF", "already converted: DDF"),
    model="odd",
)


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
        (units.figure(0.0123456), "0.0123"),
        (units.change(25_557_032, 16_843_748), "-34.1 %"),
        (units.change(100, 137), "+37.0 %"),
        (units.change(100, 100), "none"),
        (units.change(0, 5), "-"),
    ],
)
def test_numbers_in_words(written: str, expected: str) -> None:
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


def test_the_report_is_json_whose_sites_add_up_to_its_totals() -> None:
    found = json.loads(json.dumps(report(ODD, "asked")))
    assert found["model"] == "asked"
    assert found["input_size"] == [3, 224, 224]
    assert found["config"]["se_ratio"] == 0.2
    assert set(found["versions"]) == {"ddf_convert", "torch", "timm", "python"}
    assert [site["name"] for site in found["sites"]] == list(ODD.names())
    assert {"name", "kind", "action", "reason", "before", "after"} <= set(found["sites"][0])
    for number in ("params", "macs", "activation_bytes"):
        saved = sum(site["before"][number] - site["after"][number] for site in found["sites"])
        assert found["before"][number] - found["after"][number] == saved > 0
    assert report(ODD)["model"] == "odd"


TIMED = plan(
    site("layer1.0.conv1", reason="DDF + 1x1: nothing else mixes channels", replaced=True, ms=(5.25, 1.125)),
    site("layer1.0.conv2", reason="DDF + 1x1: nothing else mixes channels", replaced=True, ms=(2.0, 3.0)),
    site("layer2.0.conv1", "pointwise 1x1", "1x1 kernel; DDF replaces 3x3", ms=(0.5, 0.5)),
    site("layer2.0.conv2", reason="is odd", ms=(1.0, 1.0), found_by=FoundBy.HOOKS),
    site("layer2.0.conv3", replaced=True, ms=(4.0, 4.0), found_by=FoundBy.PIECES, caution="may be looked at elsewhere"),
    ms=20.0,
    timed=Timed(machine="an abacus", replaced=("somebody", "else"), after_ms=1.0),
    notes=["The model as a whole is odd"],
)


def test_every_convolution_is_in_exactly_one_group() -> None:
    shown = Comparison.of(ODD)
    groups = [shown.changed, shown.left_alone, shown.others]
    assert [layer.name for layer in groups[0]] == [site.name for site in ODD.replaced]
    assert [[layer.name for layer in group] for group in groups[1:]] == [
        ["stem", "depthwise", "conv2d"],
        ["one", "two", "wide", "done"],
    ]
    assert sorted(layer.name for group in groups for layer in group) == sorted(ODD.names())
    assert count_kinds(groups[2]) == "2 of 1x1, 1 of 1x7, 1 DDF"


def page(plan: Plan, model: str | None = None) -> str:
    return html.page(Comparison.of(plan, model))


def printed(plan: Plan, width: int = 80, everything: bool = False) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(tables.tables(Comparison.of(plan), everything))
    return capture.get()


@pytest.mark.parametrize("width", [50, 80, 200])
@pytest.mark.parametrize("everything", [False, True])
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
        ((site("a", "pointwise 1x1"),), "1 convolution left alone: 1 of 1x1"),
        ((site("a", replaced=True),), "1 of 1 convolution replaced"),
    ],
)
def test_tables_of_few_sites(sites: tuple[Site, ...], expected: str) -> None:
    assert expected in printed(plan(*sites))


def test_the_page_stands_alone_and_names_every_site() -> None:
    html = page(ODD, "asked")
    found = Tags(html)
    assert not {"script", "link", "img", "iframe", "object"} & found.tags
    assert not {"src", "href", "onclick", "onload"} & {name for name, _ in found.attributes}
    assert not re.search(r"https?:|url\(|@import", html)
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
    html = page(plan(*(site(name, reason="not today") for name in names)))
    found = Tags(html)
    for name in names:
        assert name in found.text
    for part in ("stem", "body", "head"):
        assert html.count(f">{part}</span>") == 3  # once for each of the charts, of which that of latency is missing
    assert "180 dense 3x3: not today" in found.text
    assert "One by one" in found.text


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b {c} %s"])
def test_the_page_escapes_what_it_shows(evil: str) -> None:
    evil_plan = plan(site(evil, replaced=True, reason=evil), site(evil + "2", evil, evil), model=evil)
    found = Tags(page(evil_plan))
    assert not {"script", "img"} & found.tags
    assert found.text.count(evil) >= 5


@pytest.mark.parametrize("sites", [(), (site("a"),), (site("a", replaced=True),)])
def test_the_page_of_few_sites(sites: tuple[Site, ...]) -> None:
    assert "25.56 M" in Tags(page(plan(*sites))).text
