"""Layer types: what the baselines calculate and cost, users' own, and that they replace convolutions."""

from __future__ import annotations

import json
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from support.tolerances import far, near
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from torch import nn

import ddf_convert as ddf
from ddf_convert import cli
from ddf_convert.commands.completion import filter_names
from ddf_convert.conversion import registry as filters_module
from ddf_convert.layers import (
    ChannelFilter2d,
    CondConv2d,
    DwCondConv2d,
    DwWeightNet2d,
    SeparableFilter2d,
    SpatialFilter2d,
)
from ddf_convert.recipes.parameters import new_layers, trainable_names

IMAGE = torch.randn(2, 3, 32, 32)
FILTERS = tuple(filter_names(""))
GEOMETRIES = {
    "plain": {},
    "stride": {"stride": 2},
    "no padding": {"padding": 0},
    "wide padding": {"padding": 3, "stride": 2},
    "dilation": {"dilation": 2},
    "SAME": {"stride": 2, "padding": "same"},
    "reflect": {"padding_mode": "reflect"},
    "circular": {"padding_mode": "circular", "stride": 2},
    "5x5": {"kernel_size": 5},
    "bias": {"bias": True},
}
LAYERS = {
    "spatial": SpatialFilter2d,
    "channel": ChannelFilter2d,
    "dw-weightnet": DwWeightNet2d,
    "condconv": CondConv2d,
    "dw-condconv": DwCondConv2d,
}


def convolved(layer, image, weight, bias=None, groups=1):
    """One image, (C, H, W), by torch's convolution with the layer's geometry."""
    options = {"stride": layer.stride, "dilation": layer.dilation, "groups": groups}
    if layer.padding == "same":
        return conv2d_same(image[None], weight, bias, **options)[0]
    pad = layer.padding * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.conv2d(F.pad(image[None], pad, mode=mode), weight, bias, **options)[0]


def from_filters(layer, input, filters):
    """Outputs of filters (B, C, K, K), image by image."""
    groups = input.shape[1]
    return torch.stack(
        [convolved(layer, *each, groups=groups) for each in zip(input, filters[:, :, None], strict=True)]
    )


def spatial(layer, input):
    """By the definition: a window of the input for every pixel, times its filter."""
    size = layer.kernel_size[0]
    filters = layer.spatial_branch(layer.centers(input))
    taps = torch.eye(size**2, dtype=input.dtype).view(size**2, 1, size, size)
    output = torch.zeros(*input.shape[:2], *filters.shape[2:], dtype=input.dtype)
    for tap, picks in enumerate(taps):  # a depthwise convolution with one tap moves the input
        moved = from_filters(layer, input, picks.expand(*input.shape[:2], size, size))
        output += filters[:, tap, None] * moved
    return output


def channel(layer, input):
    return from_filters(layer, input, layer.channel_branch(input))


def weightnet(layer, input):
    size = layer.kernel_size[0]
    pooled = layer.excite(layer.squeeze(F.adaptive_avg_pool2d(input, 1).flatten(1))).sigmoid()
    grouped = F.conv2d(pooled[..., None, None], layer.expand.view(-1, 1, 1, 1), groups=input.shape[1])
    return from_filters(layer, input, grouped.view(*input.shape[:2], size, size))


def condconv(layer, input):
    experts, outputs = layer.experts, []
    for image in input:
        shares = torch.sigmoid(layer.routing(image.mean((1, 2))))
        weight = sum(share * each for share, each in zip(shares, experts.weight, strict=True)).view(
            experts.weight_shape
        )
        bias = None
        if experts.bias is not None:
            bias = sum(share * each for share, each in zip(shares, experts.bias, strict=True))
        outputs.append(convolved(layer, image, weight, bias, experts.groups))
    return torch.stack(outputs)


FORMULAS = {
    "spatial": spatial,
    "channel": channel,
    "dw-weightnet": weightnet,
    "condconv": condconv,
    "dw-condconv": condconv,
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_calculate_what_their_papers_say(name, geometry):
    torch.manual_seed(0)
    layer = LAYERS[name](8, **GEOMETRIES[geometry], dtype=torch.float64)
    if getattr(layer, "bias", None) is not None:
        nn.init.normal_(layer.bias)
    input = torch.randn(2, 8, 11, 8, dtype=torch.float64, requires_grad=True)
    output, expected = layer(input), FORMULAS[name](layer, input)
    if getattr(layer, "bias", None) is not None:
        expected = expected + layer.bias[:, None, None]
    torch.testing.assert_close(output, expected, **near(torch.float64, expected, terms=9 * 8))
    mine, theirs = (torch.autograd.grad(each.square().sum(), input)[0] for each in (output, expected))
    torch.testing.assert_close(mine, theirs, **far(torch.float64, theirs))


def test_condconv_of_other_widths_and_groups():
    layer = CondConv2d(8, 12, groups=4, num_experts=3, dtype=torch.float64)
    input = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(input), condconv(layer, input))
    with pytest.raises(ValueError, match="groups must divide"):
        CondConv2d(8, 12, groups=3)
    with pytest.raises(ValueError, match="num_experts must be 1 or more"):
        CondConv2d(8, num_experts=0)


# Paper, table 4 (and CondConv's own): parameters in millions, MACs in billions.
TABLE_4 = {
    "ddf": (16.8, 2.3),
    "condconv": (104.8, 4.2),
    "dw-condconv": (14.5, 2.3),
    "dw-weightnet": (14.4, 2.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE_4)
def test_resnet50_costs_what_the_papers_table_says(name):
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    plan = ddf.plan(model, torch.empty(1, 3, 224, 224, device="meta"), filter=name)
    assert len(plan.replaced) == 16
    assert (round(plan.after.params / 1e6, 1), round(plan.after.macs / 1e9, 1)) == TABLE_4[name]
    converted = ddf.convert(model, plan)
    assert ddf.count_parameters(converted) == plan.after.params


class Net(nn.Module):
    """A bottleneck, a change of width, a SAME padding, a grouped convolution, a depthwise one."""

    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(3, 16, 1)
        self.bottleneck = nn.Conv2d(16, 16, 3, padding=1)
        self.expand = nn.Conv2d(16, 32, 1)
        self.wide = nn.Conv2d(32, 48, 3, stride=2, padding=1)
        self.same = Conv2dSame(48, 48, 3, stride=2)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=3, padding_mode="reflect")
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)

    def forward(self, x):
        x = self.expand(self.bottleneck(self.reduce(x)).relu())
        return self.depthwise(self.grouped(self.same(self.wide(x).relu()).relu()).relu())


PLACES = {"bottleneck", "wide", "same", "grouped"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_every_layer_type_replaces_what_ddf_replaces(name, tmp_path):
    torch.manual_seed(0)
    net = Net()
    plan = ddf.plan(net, IMAGE, filter=name)
    # A depthwise convolution here has a bias that another one cannot save on; a grouped one still has much to save.
    assert {site.name for site in plan.replaced} == PLACES
    converted = ddf.convert(net, plan).eval()
    assert converted(IMAGE).shape == net(IMAGE).shape
    measured = ddf.measure(converted, IMAGE)
    assert (plan.after.params, plan.after.macs) == (measured.params, measured.macs)
    mixes = name == "condconv"
    assert isinstance(converted.wide, SeparableFilter2d) == (not mixes and name != "ddf")
    assert set(new_layers(converted)) == PLACES
    assert trainable_names(converted, ["new"]) == {
        f"{place}.{parameter}" for place in PLACES for parameter, _ in getattr(converted, place).named_parameters()
    }

    ddf.save(converted, tmp_path)
    again = ddf.restore(Net(), tmp_path).eval()
    assert torch.equal(again(IMAGE), converted(IMAGE))

    second = ddf.plan(converted, IMAGE)
    known = {site.name: site.reason for site in second}
    if name != "depthwise":  # which is torch's own layer, and told as such
        assert known["bottleneck"].startswith("already converted: ")
    assert not second.replaced
    if name != "ddf":
        with pytest.raises(ddf.UsageError, match="starts from random weights"):
            ddf.recipes.load("preserve").initialize(converted, net)
    before = [parameter.clone() for parameter in converted.parameters()]
    ddf.recipes.load("paper").initialize(converted)
    assert any(not torch.equal(*each) for each in zip(before, converted.parameters(), strict=True))


@pytest.mark.parametrize("name", ["ddf", "spatial", "condconv", "dw-weightnet"])
def test_layers_keep_the_dtype(name):
    net = ddf.convert(Net(), example_input=IMAGE, filter=name).bfloat16()
    assert net(IMAGE.bfloat16()).dtype == torch.bfloat16


class Blur2d(nn.Module):
    """A user's filter: the mean of each window, times a strength."""

    def __init__(self, in_channels, kernel_size, stride, padding, strength, device, dtype, **others):
        super().__init__()
        self.pool = nn.AvgPool2d(kernel_size, stride, 1 if padding == "same" else padding)
        self.weight = nn.Parameter(torch.full((in_channels, 1, 1), strength, device=device, dtype=dtype))

    def forward(self, x):
        return self.pool(x) * self.weight


BLUR = ddf.Filter("blur", Blur2d, "Blur", "A mean.", options={"strength": 0.5})


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(filters_module, "_layer_types", dict(filters_module._layer_types))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_timing")
def test_a_registered_layer_type_is_converted_saved_and_compared(registry, tmp_path):
    assert ddf.register_filter(BLUR) is BLUR
    assert [each.name for each in ddf.list_filters()] == [*FILTERS, "blur"]
    net = Net()
    converted = ddf.convert(net, example_input=IMAGE, filter="blur", filter_options={"strength": 2})
    assert isinstance(converted.bottleneck, Blur2d)
    assert converted.wide.filter.weight.flatten()[0] == 2.0
    ddf.save(converted, tmp_path)
    assert torch.equal(ddf.restore(Net(), tmp_path)(IMAGE), converted(IMAGE))
    comparison = ddf.compare(net, converted, IMAGE)
    assert "4 of 7 convolutions replaced" in str(comparison)
    assert {layer.kind_after for layer in comparison.layers if layer.changed} == {
        "Blur",
        "Blur + 1x1",
        "Blur + grouped 1x1",
    }

    del filters_module._layer_types["blur"]
    with pytest.raises(ddf.ArtifactError, match=r"no filter is called 'blur'.*register_filter"):
        ddf.restore(Net(), tmp_path)


WRONG = {
    "wrong shape": (lambda **options: nn.Conv2d(16, 16, 3, padding=0, device="meta"), "makes 2x16x30x30 of 2x16x32x32"),
    "takes no such argument": (lambda in_channels: nn.Identity(), "TypeError"),
    "raises": (lambda **options: 1 / 0, "ZeroDivisionError: division by zero"),
    "no module": (lambda **options: None, "TypeError"),
    "no tensor": (lambda **options: nn.LSTM(32, 32, device="meta"), "filter odd in the place of bottleneck"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_registered_layer_that_does_not_fit_is_refused_with_its_place(case, registry):
    layer, message = WRONG[case]
    ddf.register_filter(ddf.Filter("odd", layer))
    with pytest.raises(ddf.UsageError, match=message) as caught:
        ddf.plan(Net(), IMAGE, filter="odd")
    assert "filter odd in the place of bottleneck" in str(caught.value)


REFUSED = {
    "unknown": ({"filter": "condcov"}, "no filter is called 'condcov'; did you mean condconv.*Known: ddf, spatial"),
    "not its option": ({"filter": "condconv", "heads": 2}, "filter condconv has no heads"),
    "nor this": ({"filter": "spatial", "se_ratio": 0.5}, "filter spatial has no se_ratio"),
    "unknown option": (
        {"filter": "condconv", "filter_options": {"experts": 4}},
        "no option 'experts'; did you mean num_experts.*Its own are: num_experts \\(8\\)",
    ),
    "no options": ({"filter": "depthwise", "filter_options": {"experts": 4}}, "Its own are: none"),
    "option's type": (
        {"filter": "condconv", "filter_options": {"num_experts": "many"}},
        "num_experts is int, such as 8, and not 'many'",
    ),
    "upsampling": ({"filter": "channel", "upsample": True}, "replaced by DDF-Up"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_go_together_are_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ddf.UsageError, match=message):
        ddf.plan(Net(), IMAGE, **options)


def test_names_of_layer_types_are_checked():
    assert tuple(each.name for each in ddf.list_filters() if filters_module.is_built_in(each)) == FILTERS
    with pytest.raises(ddf.UsageError, match="give yours another name"):
        ddf.register_filter(ddf.Filter("ddf", Blur2d))
    for name in ("", "two words", "DDF2d"):
        with pytest.raises(ddf.UsageError, match="cannot be called"):
            ddf.Filter(name, Blur2d)
    with pytest.raises(ddf.UsageError, match="config names color, which is none of heads"):
        ddf.Filter("x", Blur2d, config=("color",))


def test_an_installed_package_brings_a_layer_type(registry, tmp_path, monkeypatch, capsys):
    (tmp_path / "blurring.py").write_text("from test_filters import BLUR\nTEXT = 'no filter'\n")
    info = tmp_path / "blurring-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: blurring\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[ddf_convert.filters]\nblur = blurring:BLUR\nother = blurring:TEXT\nmissing = nowhere:X\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "test_filters", sys.modules[__name__])
    command = ["inspect", "test_resnet", "--filter", "blur", "--filter-option", "strength=0.25", "--json"]
    assert cli.run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["filter_options"] == {"strength": 0.25}
    for name, message in (("other", "is not a ddf_convert.Filter of that name"), ("missing", "cannot be loaded")):
        assert cli.run(["inspect", "test_resnet", "--filter", name]) == 1
        assert message in " ".join(capsys.readouterr().err.split())


COMMANDS = {
    "form": (["--filter-option", "num_experts"], "write NAME=VALUE"),
    "recipe": (["--filter", "condconv", "--recipe", "preserve"], "--filter condconv cannot: leave one of the two out"),
    "unknown": (["--filter", "condcov"], "did you mean condconv"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_the_command_line_refuses_in_one_line(case, tmp_path, capsys):
    options, message = COMMANDS[case]
    assert cli.run(["convert", "test_resnet", "-o", str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_convert_and_load_from_the_command_line(tmp_path, capsys):
    options = ["--filter", "condconv", "--filter-option", "num_experts=2"]
    assert cli.run(["convert", "test_resnet", "-o", str(tmp_path / "out"), *options]) == 0
    assert "CondConv" in capsys.readouterr().out
    assert {
        module.experts.num_experts for module in ddf.load(tmp_path / "out").modules() if type(module) is CondConv2d
    } == {2}
    assert cli.run(["inspect", str(tmp_path / "out")]) == 0


def test_a_recipe_can_name_a_layer_type(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nconversion: {filter: condconv, filter_options: {num_experts: 3}}\n")
    recipe = ddf.recipes.load(str(file))
    converted = recipe.convert(Net(), IMAGE)
    recipe.initialize(converted)
    assert converted.wide.experts.num_experts == 3
    file.write_text("name: mine\nconversion: {filter: spatial, affine: true}\ninitialize: {method: preserve}\n")
    with pytest.raises(ddf.UsageError, match=r"'preserve' is for DDF, and conversion\.filter is 'spatial'"):
        ddf.recipes.load(str(file))
