"""Conversion: what changes, what does not, and that a failure changes nothing."""

import copy
import pickle

import pytest
import timm
import torch
from support import networks as net
from torch import fx, nn

from ddf_convert.conversion import Conversion, Replacement, convert, plan, recorded, tracer, verify
from ddf_convert.cost.count import measure
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d

IMAGE = torch.empty(1, 3, 20, 20)

FAMILIES = {
    "resnet10t": 64,
    "resnet26d": 64,
    "resnet50": 64,
    "seresnet50": 64,
    "regnetx_002": 64,
    "regnety_002": 64,
    "vgg11_bn": 32,
    "repvgg_a0": 64,
    "densenet121": 64,
    "mobilenetv2_050": 64,
    "efficientnet_b0": 64,
    "tf_efficientnetv2_b0": 63,
    "convnext_atto": 64,
}


# Each is near to one that stays, and `make zoo` has them all.
ALSO = {"resnet26d", "seresnet50", "regnetx_002", "densenet121", "tf_efficientnetv2_b0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in ALSO else []) for name in FAMILIES]
)
def test_families_keep_their_shapes_and_cost_what_the_plan_says(name):
    size = FAMILIES[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    image = torch.empty(1, 3, size, size, device="meta")
    decided = plan(model, image, depthwise=True, stem=True, allow_growth=True)
    assert decided.replaced or name == "convnext_atto"  # which has no 3x3
    converted = convert(model, decided)
    cost = measure(converted, image)
    assert (cost.params, cost.macs) == (decided.after.params, decided.after.macs)
    before, after = model.eval().forward_features(image), converted.eval().forward_features(image)
    assert before.shape == after.shape
    assert converted(image).shape == model(image).shape


@pytest.mark.slow
def test_a_real_model_runs_and_trains():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=5)
    converted = convert(model, example_input=torch.empty(1, 3, 64, 64)).train()
    converted(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


@pytest.mark.slow
def test_the_model_keeps_its_class_its_methods_and_its_other_parameters():
    model = timm.create_model("resnet18", num_classes=5)
    converted = convert(model, example_input=torch.empty(1, 3, 64, 64))
    assert type(converted) is type(model)
    replaced = {step.names[0] for step in converted.ddf_conversion.replaced}
    kept = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in replaced}
    after = converted.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in kept.items())
    assert all(name.startswith(tuple(f"{path}." for path in replaced)) for name in after if name not in kept)
    converted.reset_classifier(3)
    assert converted(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert not any(isinstance(module, DDF2d) for module in model.modules())


def test_in_place_changes_the_model_itself():
    model = net.bottleneck(net.conv())
    assert convert(model, example_input=IMAGE, inplace=True) is model
    assert isinstance(model[3], DDF2d)


def test_every_name_of_a_shared_convolution_gets_the_same_layer():
    converted = convert(net.TwoNames(), example_input=IMAGE)
    assert isinstance(converted.a, DDFConv2d)
    assert converted.b["same"] is converted.a
    assert converted.ddf_conversion.replaced[0].names == ("a", "b.same")


@pytest.mark.parametrize(
    ("dtype", "trainable", "training"),
    [(torch.float64, True, True), (torch.bfloat16, False, True), (torch.bfloat16, True, False)],
)
def test_new_layers_take_dtype_and_mode_and_are_trainable(dtype, trainable, training):
    model = net.bottleneck(net.conv()).to(dtype).requires_grad_(trainable).train(training)
    layer = convert(model, example_input=IMAGE.to(dtype))[3]
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert {parameter.requires_grad for parameter in layer.parameters()} == {True}
    assert {module.training for module in layer.modules()} == {training}


def test_meta_models_stay_on_meta():
    converted = convert(net.bottleneck(net.conv()).to("meta"), example_input=IMAGE)
    assert {parameter.device.type for parameter in converted.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("layer", "alone"),
    [
        (net.conv(bias=True), True),
        (net.conv(bias=False), True),
        (net.conv(32, 48, bias=True), False),
        (net.conv(32, 48, bias=False), False),
    ],
)
def test_a_bias_is_kept(layer, alone):
    last = nn.Conv2d(layer.out_channels, 8, 1)
    converted = convert(nn.Sequential(nn.Conv2d(3, 32, 1), layer, last), example_input=IMAGE)[1]
    biased = layer.bias is not None
    if alone:
        assert (converted.bias is not None) == biased
    else:
        assert (converted.mix.bias is not None, converted.ddf.bias is not None) == (biased, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (net.conv(stride=2), {"padding": 1, "stride": 2, "dilation": 1, "padding_mode": "zeros"}),
        (net.conv(padding=0), {"padding": 0, "stride": 1}),
        (net.conv(padding="valid"), {"padding": 0}),
        (net.conv(padding="same", dilation=3), {"padding": 3, "dilation": 3}),
        (net.conv(padding=2, padding_mode="circular"), {"padding": 2, "padding_mode": "circular"}),
        (net.same, {"padding": "same", "stride": 2, "out_channels": 64}),
    ],
)
def test_geometry_is_kept(layer, expected):
    model = net.around(layer)
    options = plan(model, IMAGE)["1"].replacement.options
    assert {key: options[key] for key in expected} == expected
    for size in (19, 20, 21):
        image = torch.randn(1, 3, size, size)
        assert convert(model, example_input=image)(image).shape == model(image).shape


def test_the_random_state_is_left_alone_and_decides_the_weights():
    model, weights = net.bottleneck(net.conv()), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        weights.append(convert(model, example_input=IMAGE)[3].channel_branch[1].weight)
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_converting_again_is_safe_and_appends():
    once = convert(net.bottleneck(net.conv(), net.conv()), example_input=IMAGE, include="3")
    same = convert(once, example_input=IMAGE, exclude="4")
    assert [step.names for step in same.ddf_conversion.replaced] == [("3",)]
    twice = convert(once, example_input=IMAGE, se_ratio=0.5)
    assert [step.names for step in recorded(twice).replaced] == [("3",), ("4",)]
    assert [config.se_ratio for config in recorded(twice).configs] == [0.2, 0.5]
    assert torch.equal(twice[3].ddf.channel_branch[1].weight, once[3].ddf.channel_branch[1].weight)
    assert len(recorded(once).replaced) == 1


def test_the_record_survives_copies_and_pickle():
    converted = convert(net.bottleneck(net.conv()), example_input=IMAGE)
    record = recorded(converted)
    assert isinstance(record, Conversion)
    assert recorded(copy.deepcopy(converted)) == record
    assert recorded(pickle.loads(pickle.dumps(converted))) == record
    assert Conversion.model_validate_json(record.model_dump_json()) == record
    assert recorded(net.bottleneck(net.conv())) is None


def test_as_graph_returns_a_graph_module_with_the_layers_as_nodes():
    converted = convert(net.Gated(), example_input=IMAGE, as_graph=True)
    assert isinstance(converted, fx.GraphModule)
    assert [node.target for node in converted.graph.nodes if node.op == "call_module"] == [
        "first",
        "conv",
        "gate",
        "last",
    ]
    assert isinstance(converted.conv, DDF2d)
    assert recorded(converted).replaced[0].names == ("conv",)
    assert converted(torch.randn(1, 3, 20, 20)).shape == (1, 8, 11, 11)


@pytest.mark.parametrize(("functional", "times"), [(False, 1), (True, 2)])
def test_how_often_a_model_is_traced(monkeypatch, functional, times):
    """Once for the plan and its trial; once more only for the GraphModule that replaces a model."""
    traces = []
    trace = tracer.Tracer.trace
    monkeypatch.setattr(
        tracer.Tracer, "trace", lambda self, *args, **kwargs: traces.append(1) or trace(self, *args, **kwargs)
    )
    converted = convert(net.Functions(), example_input=IMAGE, functional=functional)
    assert isinstance(converted, fx.GraphModule) == functional
    assert len(traces) == times


def two_bottlenecks():
    return nn.Sequential(net.bottleneck(net.conv()), nn.Conv2d(8, 32, 1), net.conv(), nn.Conv2d(32, 8, 1))


def break_name(model):
    model[0] = nn.Sequential()


def break_channels(model):
    model[2] = net.conv(32, 16)


def break_kind(model):
    model[2] = nn.ReLU()


def break_stride(model):
    model[2] = net.conv(stride=2)


def break_hooks(model):
    model[2] = net.hooked()


MISFITS = {
    break_name: r"it has no 0\.3",
    break_channels: "has out_channels 16, where the record has 32",
    break_kind: "2: ReLU is not a 2D convolution",
    break_stride: "has stride 2, where the record has 1",
    break_hooks: "2: has hooks",
}


@pytest.mark.parametrize("change", MISFITS)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_plan_that_does_not_fit_changes_nothing(change, inplace):
    decided = plan(two_bottlenecks(), IMAGE)
    assert len(decided.replaced) == 2
    model = two_bottlenecks()
    change(model)
    before = dict(model.named_modules())
    with pytest.raises(UsageError, match=f"does not fit Sequential: .*{MISFITS[change]}"):
        convert(model, decided, inplace=inplace)
    assert dict(model.named_modules()) == before
    assert recorded(model) is None


def test_a_replacement_that_cannot_be_built_changes_nothing():
    model = two_bottlenecks()
    decided = plan(model, IMAGE)
    wrong = {**decided["2"].replacement.options, "heads": 7}
    decided["2"].replacement = Replacement(layer="DDF2d", options=wrong)
    with pytest.raises(UsageError, match="cannot be built: DDF2d: heads must divide in_channels"):
        convert(model, decided, inplace=True)
    assert not any(isinstance(module, DDF2d) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a plan, or an example_input"),
        ({"plan": True, "se_ratio": 0.5}, "given a plan and also se_ratio"),
        ({"plan": True, "example_input": IMAGE}, "given a plan and also example_input"),
    ],
)
def test_contradicting_arguments_are_refused(options, message):
    model = net.bottleneck(net.conv())
    if "plan" in options:
        options = {**options, "plan": plan(model, IMAGE)}
    with pytest.raises(UsageError, match=message):
        convert(model, **options)


def test_a_model_that_cannot_be_copied_is_converted_in_place():
    model = net.bottleneck(net.conv())
    decided = plan(model, IMAGE)
    model.handle = (item for item in ())  # a generator cannot be copied
    with pytest.raises(UsageError, match="inplace=True"):
        convert(model, decided)
    assert isinstance(model[3], nn.Conv2d)
    assert isinstance(convert(model, decided, inplace=True)[3], DDF2d)


# --- what breaks the forward pass is found before ---

# what a block asks of its convolution: a part of the reason
BREAKING = {
    net.weight_of_the_convolution: "'weight' (in 2, Asks)",
    net.counts_parameters: "a convolution has two parameters (in 2, Asks)",
    net.is_a_convolution: "AssertionError (in 2, Asks)",
    net.does_without: "it is not called any more",
    net.other_shape: "the model returns 1x32x20x19, and not 1x32x20x20",
    net.on_values: "a convolution (in 2, Asks)",
}


def asking(ask, blocks=1):
    return nn.Sequential(nn.Conv2d(3, 32, 1), net.conv(), *(net.Asks(ask) for _ in range(blocks)), net.conv())


@pytest.mark.slow
@pytest.mark.parametrize("ask", BREAKING, ids=lambda ask: ask.__name__)
def test_a_site_whose_replacement_breaks_the_model_is_left_alone(ask):
    model = asking(ask)
    image = torch.randn(1, 3, 20, 20)
    decided = plan(model, image)
    site = decided["2.conv"]
    assert site.reason.startswith("its replacement breaks the forward pass: ")
    assert BREAKING[ask] in site.reason
    assert [each.name for each in decided.replaced] == ["1", "2.other", "3"]
    assert convert(model, decided)(image).shape == model(image).shape
    assert site.after == site.before
    with pytest.raises(UsageError, match=r"2\.conv cannot be replaced: its replacement breaks the forward pass"):
        site.replace()
    with pytest.raises(UsageError, match="cannot be replaced"):
        type(decided).from_json(decided.to_json())["2.conv"].replace()


def test_only_the_blocks_that_break_are_left_alone():
    model = asking(net.is_a_convolution, blocks=3)
    model[3].ask = lambda block, x: None
    names = [site.name for site in plan(model, IMAGE).replaced]
    assert names == ["1", "2.other", "3.conv", "3.other", "4.other", "5"]


@pytest.mark.slow
def test_many_blocks_that_break_take_few_runs(monkeypatch):
    runs = []
    run = verify._Rehearsal.failure
    monkeypatch.setattr(verify._Rehearsal, "failure", lambda self, chosen: runs.append(1) or run(self, chosen))
    model = asking(net.counts_parameters, blocks=24)
    decided = plan(model, IMAGE)
    assert [site.name for site in decided.replaced] == ["1", *(f"{block}.other" for block in range(2, 26)), "26"]
    assert len(runs) < 24


def test_a_broken_site_does_not_count_for_a_budget():
    model = asking(net.is_a_convolution)
    whole = plan(model, IMAGE)
    need = whole.before.macs - min(site.before.macs - site.after.macs for site in whole.replaced)
    decided = plan(model, IMAGE, target_macs=need)
    assert len(decided.replaced) == 1
    assert decided["2.conv"].reason.startswith("its replacement breaks")


def test_broken_upsampling_is_left_alone():
    class Reads(net.Shuffles):
        def forward(self, x):
            assert isinstance(self.conv, nn.Conv2d), "asserted"
            return super().forward(x)

    decided = plan(Reads(), IMAGE, upsample=True)
    assert decided["shuffle"].reason.startswith("its replacement breaks the forward pass: assert")
    assert decided["conv"].reason == "part of shuffle, whose replacement breaks the forward pass"
    assert not decided.replaced


def test_what_functional_replacement_breaks_is_left_alone():
    """A GraphModule has only what the graph names: an argument that is not its default is one that it lacks."""

    class Scaled(net.Functions):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale

    decided = plan(Scaled(), (IMAGE, 2.0), functional=True)
    assert all("its replacement breaks the forward pass" in decided[f"{name}.conv2d()"].reason for name in NAMES)
    assert convert(Scaled(), decided)(IMAGE, 2.0) is not None


NAMES = ("twice", "once")


def test_a_model_that_fails_now_and_then_is_planned_all_the_same():
    class Moody(net.Residual):
        runs = 0

        def forward(self, x):
            Moody.runs += 1
            assert Moody.runs < 2
            return super().forward(x)

    assert plan(Moody(), IMAGE)["conv"].replacement is not None
