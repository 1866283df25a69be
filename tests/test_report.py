"""Numbers in words, and plans as data, tables and a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ddf_convert.accounting import Cost
from ddf_convert.graph import Action, ConvertConfig, Plan, Replacement, Site
from ddf_convert.report import page, report, units
from ddf_convert.report.groups import counted, left_alone, others
from ddf_convert.report.tables import plan_tables


def site(name: str, kind: str = "dense 3x3", reason: str = "", replaced: bool = False, calls: int = 1) -> Site:
    before, after = Cost(params=36_864, macs=115_605_504, activation_bytes=800), Cost(params=9_000, macs=3_600_000)
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
    )


def plan(*sites: Site, model: str = "net") -> Plan:
    before = Cost(params=25_557_032, macs=4_089_184_256, activation_bytes=85_000_000)
    return Plan(model=model, input_size=(3, 224, 224), config=ConvertConfig(), before=before, sites=list(sites))


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
    site("done", "DDF", "already a DDF layer"),
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
        (units.change(25_557_032, 16_843_748), "-34.1 %"),
        (units.change(100, 137), "+37.0 %"),
        (units.change(100, 100), "none"),
        (units.change(0, 5), "-"),
    ],
)
def test_numbers_in_words(written: str, expected: str) -> None:
    assert written == expected


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


def test_every_convolution_is_in_exactly_one_group() -> None:
    groups = [ODD.replaced, left_alone(ODD), others(ODD)]
    assert [[site.name for site in group] for group in groups[1:]] == [
        ["stem", "depthwise", "conv2d"],
        ["one", "two", "wide", "done"],
    ]
    assert sorted(site.name for group in groups for site in group) == sorted(ODD.names())
    assert counted(others(ODD)) == "2 of 1x1, 1 of 1x7, 1 DDF"


def printed(plan: Plan, width: int = 80, everything: bool = False) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(plan_tables(plan, everything=everything))
    return capture.get()


@pytest.mark.parametrize("width", [50, 80, 200])
@pytest.mark.parametrize("everything", [False, True])
def test_tables_keep_to_the_width(width: int, everything: bool) -> None:
    text = printed(ODD, width, everything)
    assert max(map(len, text.splitlines())) <= width
    assert "stem=True" not in text
    assert ("already a DDF layer" in " ".join(text.split())) == everything


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


class Tags(HTMLParser):
    """Checks that tags nest, and keeps the text and the attributes."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


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


@pytest.mark.parametrize("evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b {c} %s"])
def test_the_page_escapes_what_it_shows(evil: str) -> None:
    evil_plan = plan(site(evil, replaced=True, reason=evil), site(evil + "2", evil, evil), model=evil)
    found = Tags(page(evil_plan))
    assert not {"script", "img"} & found.tags
    assert found.text.count(evil) >= 5


@pytest.mark.parametrize("sites", [(), (site("a"),), (site("a", replaced=True),)])
def test_the_page_of_few_sites(sites: tuple[Site, ...]) -> None:
    assert "25.56 M" in Tags(page(plan(*sites))).text
