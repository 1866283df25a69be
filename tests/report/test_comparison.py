"""Plans, and two models side by side, as data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.html_tags import Tags, read_page_that_stands_alone
from support.report_plans import ODD
from timm import create_model
from torch import nn

import ddf_convert as ddf
from ddf_convert.cost.count import measure
from ddf_convert.report import Comparison, compare, report
from ddf_convert.report.data import count_kinds

IMAGE = torch.randn(1, 3, 64, 64)


class Net(nn.Module):
    """A network of the user's own."""

    def __init__(self, *, neck: bool = False, tail: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.neck = nn.Conv2d(32, 32, 1) if neck else nn.Identity()
        self.body = nn.Conv2d(32, 64, 3, stride=2, padding=1, groups=2)
        self.tail = nn.Conv2d(64, 8, 1) if tail else nn.Identity()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.tail(self.body(self.neck(self.stem(image).relu())).relu()).mean((2, 3))


@pytest.fixture(scope="module")
def resnet() -> Comparison:
    model = create_model("resnet18")
    return compare(model, ddf.convert(model, example_input=IMAGE, se_ratio=0.5), IMAGE, latency=False)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_plan(resnet: Comparison) -> None:
    plan = ddf.plan(create_model("resnet18"), IMAGE, se_ratio=0.5)
    shown = Comparison.of(plan)
    assert (resnet.model, resnet.input_size) == ("resnet18", (3, 64, 64))
    assert resnet.before == plan.before
    assert (resnet.after.params, resnet.after.macs) == (plan.after.params, plan.after.macs)
    assert [layer.name for layer in resnet.layers] == list(plan.names())
    for layer, planned, site in zip(resnet.layers, shown.layers, plan, strict=True):
        assert (layer.before, layer.after) == (site.before, site.after)
        assert (layer.kind_before, layer.kind_after) == (planned.kind_before, planned.kind_after)
        assert (layer.input_shape, layer.output_shape, layer.calls) == (site.input_shape, site.output_shape, site.calls)
        assert layer.changed == (site.action is ddf.Action.REPLACE)
        assert layer.reason == ("" if layer.changed else site.reason)
    assert {layer.kind_after for layer in resnet.changed} == {"DDF + 1x1"}
    assert resnet.configs == (plan.config,)


@pytest.mark.slow
def test_the_whole_model_is_measured_and_not_summed(resnet: Comparison) -> None:
    model = create_model("resnet18")
    assert resnet.after == measure(ddf.convert(model, example_input=IMAGE, se_ratio=0.5), IMAGE)


def test_json_holds_everything(resnet: Comparison) -> None:
    found = json.loads(resnet.to_json())
    assert found["format"] == "ddf_convert comparison"
    assert found["format_version"] == 1
    assert set(found["versions"]) == {"ddf_convert", "torch", "timm", "python"}
    assert found["model"] == "resnet18"
    assert found["input_size"] == [3, 64, 64]
    assert found["machine"] is None
    assert found["before"] == resnet.before.model_dump()
    assert found["after"] == resnet.after.model_dump()
    assert found["notes"] == list(resnet.notes)
    assert found["configs"][0]["se_ratio"] == 0.5
    for layer, written in zip(resnet.layers, found["layers"], strict=True):
        assert written["before"] == (layer.before and layer.before.model_dump())
        for name in ("name", "kind_before", "kind_after", "reason", "calls", "found_by", "caution"):
            assert written[name] == getattr(layer, name)
        assert written["input_shape"] == list(layer.input_shape)


def test_the_page_stands_alone_and_is_written_whole(resnet: Comparison, tmp_path: Path) -> None:
    resnet.to_html(str(tmp_path / "page.html"))
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = read_page_that_stands_alone(html)
    for layer in resnet.layers:
        assert layer.name in found.text
    assert "16 of 20 convolutions replaced" in found.text
    with pytest.raises(ddf.UsageError, match="is a folder"):
        resnet.to_html(tmp_path)


def test_it_prints_as_a_table(resnet: Comparison) -> None:
    text = str(resnet)
    assert text.startswith("resnet18, one 3x64x64 input: 16 of 20 convolutions replaced\n")
    assert max(map(len, text.splitlines())) <= 80
    assert "latency=True measures it" in text
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(resnet)
    assert [line.rstrip() for line in capture.get().splitlines()] == text.splitlines()


@pytest.mark.usefixtures("quick_timing")
def test_times_are_of_both_models_and_every_layer() -> None:
    net = Net()
    state = net.training, {name: tensor.clone() for name, tensor in net.state_dict().items()}, torch.get_rng_state()
    found = compare(net, ddf.convert(net, example_input=IMAGE), IMAGE)
    assert found.machine is not None
    assert f"torch {torch.__version__}" in found.machine
    costs = [found.before, found.after, *(cost for layer in found.layers for cost in (layer.before, layer.after))]
    assert all(cost is not None and cost.latency_ms is not None and cost.latency_ms > 0 for cost in costs)
    assert found.notes == ()
    assert {layer.name: layer.kind_after for layer in found.layers} == {
        "stem": "dense 3x3",
        "body": "DDF + grouped 1x1",
    }
    assert net.training == state[0]
    assert all(torch.equal(tensor, state[1][name]) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[2])
    assert f"one forward pass on {found.machine}" in " ".join(str(found).split())


def test_layers_that_only_one_of_the_models_has() -> None:
    found = compare(Net(neck=True), Net(tail=True), IMAGE, latency=False)
    assert [layer.name for layer in found.layers] == ["stem", "neck", "body", "tail"]
    (gone,), (new,) = found.only_before, found.only_after
    assert (gone.name, gone.kind_before, gone.kind_after, gone.after) == ("neck", "pointwise 1x1", None, None)
    assert (new.name, new.kind_before, new.kind_after, new.before) == ("tail", None, "pointwise 1x1", None)
    assert gone.before is not None
    assert gone.before.params == 32 * 32 + 32
    assert new.input_shape == (1, 64, 32, 32)
    assert found.changed == []
    text = " ".join(str(found).split())
    assert "0 of 4 convolutions replaced, 1 only before, 1 only after" in text
    assert "1 convolution only after name kind parameters MACs" in text
    json.loads(found.to_json())


def test_models_that_have_nothing_to_do_with_ddf(tmp_path: Path) -> None:
    wide = Net()
    wide.body = nn.Conv2d(32, 64, 5, stride=2, padding=2)
    found = compare(Net(), wide, IMAGE, latency=False)
    assert [layer.name for layer in found.changed] == ["body"]
    assert "1 of 2 convolutions changed" in str(found)
    assert "grouped 3x3 -> dense 5x5" in " ".join(str(found).split())
    assert "More than before: parameters of 1, MACs of 1, out of 1 convolution changed" in " ".join(str(found).split())
    found.to_html(tmp_path / "page.html")
    assert "grouped 3x3 -> dense 5x5" in Tags((tmp_path / "page.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize("sides", [("meta", "meta"), ("cpu", "meta"), ("meta", "cpu")])
def test_what_cannot_be_timed_is_noted(sides: tuple[str, str]) -> None:
    before, after = (Net().to(device) for device in sides)
    found = compare(before, after, IMAGE)
    assert found.machine is None
    assert found.before.latency_ms is None
    assert found.after.latency_ms is None
    assert found.before.params == found.after.params > 0
    assert any("on the meta device there is nothing to run" in note for note in found.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "example", "words"),
    [
        ("resnet18", Net(), IMAGE, "before: expected a torch.nn.Module, got str"),
        (Net(), None, IMAGE, "after: expected a torch.nn.Module, got NoneType"),
        (Net(), Net(), torch.randn(1, 5, 64, 64), "before: Net does not accept"),
        (nn.Conv2d(5, 8, 3), Net(), torch.randn(1, 5, 64, 64), "after: Net does not accept"),
        (Net(), Net(), "an image", "before: "),
    ],
)
def test_nonsense(before: object, after: object, example: object, words: str) -> None:
    with pytest.raises(ddf.UsageError, match=words):
        compare(before, after, example)  # type: ignore[arg-type]


@pytest.mark.slow
def test_rich_and_jinja_are_imported_when_something_is_rendered_and_not_before() -> None:
    code = "import sys, ddf_convert.report; sys.exit(bool({'rich', 'jinja2'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
    shown = Comparison.of(ODD)
    groups = [shown.changed, shown.left_alone, shown.others]
    assert [layer.name for layer in groups[0]] == [site.name for site in ODD.replaced]
    assert [[layer.name for layer in group] for group in groups[1:]] == [
        ["stem", "depthwise", "conv2d"],
        ["one", "two", "wide", "done"],
    ]
    assert sorted(layer.name for group in groups for layer in group) == sorted(ODD.names())
    assert count_kinds(groups[2]) == "2 of 1x1, 1 of 1x7, 1 DDF"
