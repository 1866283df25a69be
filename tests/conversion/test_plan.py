"""Planning: what happens to each convolution and why, selection, errors, and the plan as data."""

import functools
import json
import re

import pytest
import timm
import timm.layers
import torch
from support import networks as net
from torch import nn

from ddf_convert.conversion import Action, ConvertConfig, FoundBy, Operation, Plan, convert, plan
from ddf_convert.conversion.plan import override_hint
from ddf_convert.cost.count import measure
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d

IMAGE = torch.empty(1, 3, 20, 20)
ALONE, MIXED, SKIP = "DDF2d", "DDFConv2d", None

# name: (model, site, what happens, part of the reason, options)
TABLE = {
    "bottleneck": (net.bottleneck(net.conv()), "3", ALONE, "1x1 convolutions on both sides", {}),
    "bottleneck, norms and pools between": (
        net.bottleneck(
            nn.ReflectionPad2d(1), net.conv(padding=0), nn.BatchNorm2d(32), nn.SiLU(), nn.Dropout(), nn.AvgPool2d(2)
        ),
        "4",
        ALONE,
        "both sides",
        {},
    ),
    "bottleneck, timm's layers between": (
        net.bottleneck(
            net.conv(),
            timm.layers.BatchNormAct2d(32),
            timm.layers.BlurPool2d(32),
            timm.layers.DropPath(0.1),
            timm.layers.SEModule(32),
            timm.layers.EcaModule(32),
        ),
        "3",
        ALONE,
        "both sides",
        {},
    ),
    "bottleneck with gates": (net.Gated(), "conv", ALONE, "both sides", {}),
    "bottleneck, mixing always": (net.bottleneck(net.conv()), "3", MIXED, "always on", {"mixing": "always"}),
    "bottleneck, grouped 1x1 after": (
        nn.Sequential(nn.Conv2d(3, 32, 1), net.conv(), nn.Conv2d(32, 32, 1, groups=2)),
        "1",
        MIXED,
        "nothing else mixes",
        {},
    ),
    "residual": (net.Residual(), "conv", MIXED, "nothing else mixes channels", {}),
    "concatenated": (net.Concatenated(), "conv", MIXED, "nothing else mixes channels", {}),
    "two consumers": (net.TwoConsumers(), "conv", MIXED, "nothing else mixes channels", {}),
    "foreign gate": (net.ForeignGate(), "conv", MIXED, "nothing else mixes channels", {}),
    "two in a row": (net.bottleneck(net.conv(), net.conv()), "4", MIXED, "nothing else mixes channels", {}),
    "residual, mixing never": (net.Residual(), "conv", ALONE, "mixing is off", {"mixing": "never"}),
    "widens": (net.around(net.conv(32, 48)), "1", MIXED, "turns 32 channels into 48", {}),
    "widens, mixing never": (net.around(net.conv(32, 48)), "1", SKIP, "turn 32 channels into 48", {"mixing": "never"}),
    "grouped": (net.around(net.conv(groups=2)), "1", MIXED, "DDF + grouped 1x1", {}),
    "heads": (net.around(net.conv()), "1", MIXED, "nothing else", {"heads": 4}),
    "heads that do not divide": (net.around(net.conv()), "1", SKIP, "5 heads do not divide its 32", {"heads": 5}),
    "subclass, same forward": (net.around(net.SameForward(32, 32, 3)), "1", MIXED, "nothing else", {}),
    "timm's SAME": (net.around(net.same), "1", MIXED, "turns 32 channels into 64", {}),
    "reflect padding": (net.around(net.conv(padding_mode="reflect")), "1", MIXED, "nothing else", {}),
    "padding by name": (net.around(net.conv(padding="same", dilation=2)), "1", MIXED, "nothing else", {}),
    "optional arguments": (net.Optional(), "conv", MIXED, "nothing else", {}),
    "shared": (net.Shared(), "shared", MIXED, "nothing else", {}),
    "two names": (net.TwoNames(), "a", MIXED, "nothing else", {}),
    "1x1": (net.bottleneck(net.conv()), "0", SKIP, "1x1 kernel; DDF replaces 3x3", {}),
    "1x3": (net.around(nn.Conv2d(32, 32, (1, 3))), "1", SKIP, "1x3 kernel", {}),
    "stem": (nn.Sequential(net.conv(3)), "0", SKIP, "stem: 3 input channels (stem=True", {}),
    "stem asked for": (nn.Sequential(net.conv(3)), "0", MIXED, "turns 3 channels into 32", {"stem": True}),
    "depthwise": (net.around(net.conv(groups=32)), "1", SKIP, "add 2,511 parameters to a depthwise", {}),
    "depthwise asked for": (net.around(net.conv(groups=32)), "1", ALONE, "mixes no channels", {"depthwise": True}),
    "no saving": (net.bottleneck(net.conv(groups=16)), "3", SKIP, "parameters would become", {}),
    "growth asked for": (net.bottleneck(net.conv(groups=16)), "3", ALONE, "both sides", {"allow_growth": True}),
    "already DDF": (net.around(DDF2d(32)), "1", SKIP, "already converted: DDF", {}),
    "already DDF + 1x1": (net.around(DDFConv2d(32, 8)), "1", SKIP, "already converted: DDF + 1x1", {}),
    "transposed": (net.around(nn.ConvTranspose2d(32, 32, 3)), "1", SKIP, "transposed", {}),
    "forward of its own": (net.around(net.OwnForward(32, 32, 3)), "1", SKIP, "has a forward of its own", {}),
    "forward of the instance": (net.around(net.overridden()), "1", SKIP, "has a forward of its own", {}),
    "standardised": (net.around(timm.layers.StdConv2d(32, 32, 3)), "1", MIXED, "nothing else", {}),
    "standardised, SAME": (net.around(timm.layers.StdConv2dSame(32, 48, 3, stride=2)), "1", MIXED, "32 channels", {}),
    "scaled and standardised": (net.bottleneck(timm.layers.ScaledStdConv2d(32, 32, 3)), "3", ALONE, "both sides", {}),
    "scaled and standardised, SAME": (
        *(net.around(timm.layers.ScaledStdConv2dSame(32, 32, 3, stride=2)), "1", MIXED, "nothing else", {}),
    ),
    "standardised, a subclass with a forward of its own": (
        *(net.around(net.OwnStandard(32, 32, 3)), "1", SKIP, "OwnStandard has a forward of its own", {}),
    ),
    "parametrised": (net.around(net.parametrised()), "1", SKIP, "its weight is parametrised", {}),
    "weight_norm as a hook": (
        *(net.around(net.old_weight_norm()), "1", SKIP, "weights are computed before each call (WeightNorm)", {}),
    ),
    "pruned": (net.around(net.pruned()), "1", SKIP, "weights are computed before each call (Identity)", {}),
    "hooks": (net.around(net.hooked()), "1", SKIP, "has hooks that would be lost", {}),
    "complex": (nn.Sequential(net.conv(3, dtype=torch.complex64)), "0", SKIP, "its weights are torch.complex64", {}),
    "strides differ": (net.around(net.conv(stride=(1, 2))), "1", SKIP, "stride 1x2", {}),
    "paddings differ": (net.around(net.conv(padding=(1, 2))), "1", SKIP, "padding 1x2", {}),
    "dilations differ": (net.around(net.conv(dilation=(1, 2))), "1", SKIP, "dilation 1x2", {}),
    "functional": (net.Functional(), "conv2d()", SKIP, "called as a function: replacing it makes", {}),
    "functional asked for": (net.Functional(), "conv2d()", MIXED, "3 channels", {"functional": True, "stem": True}),
    "functional, called twice": (net.Functions(), "twice.conv2d()", MIXED, "nothing else", {"functional": True}),
    "functional, strided": (net.Functions(), "once.conv2d()", MIXED, "nothing else", {"functional": True}),
    "functional, used elsewhere": (net.Functions(), "conv2d()", SKIP, "uses elsewhere too", {"functional": True}),
    "functional, computed": (net.Functions(), "conv2d_1()", SKIP, "pass computes", {"functional": True}),
    "functional, transposed": (net.SameNames(), "conv_transpose2d()", SKIP, "transposed", {"functional": True}),
    "in a loop": (net.Loop(), "convs.1", MIXED, "nothing else", {}),
    "5x5 asked for": (net.around(nn.Conv2d(32, 32, 5)), "1", MIXED, "nothing else", {"kernel_size": (3, 5)}),
    "7x7, and not 3x3": (net.around(net.conv()), "1", SKIP, "3x3 kernel; DDF replaces 7x7", {"kernel_size": 7}),
    "circular padding": (net.around(net.conv(padding_mode="circular", stride=2)), "1", MIXED, "nothing else", {}),
    "untraceable, in a piece": (net.Untraceable(), "blocks.1.conv", ALONE, "both sides", {}),
    "untraceable, its own": (net.Untraceable(), "conv", MIXED, "nothing else is known to mix", {}),
    "not called": (net.Uncalled(), "unused", SKIP, "not called in the forward pass", {}),
    "tied weights": (net.TiedWeights(), "a", SKIP, "shares its weights with b", {}),
    "weights read directly": (net.ReadDirectly(), "conv", SKIP, "also reads its weights", {}),
    "the model itself": (nn.Conv2d(3, 32, 3), "conv2d()", SKIP, "called as a function", {}),
}


@pytest.mark.parametrize("case", TABLE)
def test_every_kind_of_convolution_has_its_decision_and_its_reason(case):
    model, name, layer, reason, options = TABLE[case]
    dtype = next(model.parameters()).dtype
    site = plan(model, IMAGE.to(dtype), **options)[name]
    assert reason in site.reason
    assert site.action is (Action.SKIP if layer is None else Action.REPLACE)
    if layer is not None:
        assert site.replacement.layer == layer


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in TABLE if TABLE[case][2] is not None])
def test_the_converted_model_costs_what_the_plan_said_and_gives_the_same_shape(case):
    model, _, _, _, options = TABLE[case]
    decided = plan(model, IMAGE, **options)
    converted = convert(model, decided)
    cost = measure(converted, IMAGE)
    assert (cost.params, cost.macs) == (decided.after.params, decided.after.macs)
    image = torch.randn(2, 3, 20, 20)
    before, after = model.eval()(image), converted.eval()(image)
    shapes = [[t.shape for t in (value if isinstance(value, tuple) else (value,))] for value in (before, after)]
    assert shapes[0] == shapes[1]


def test_calls_of_a_shared_convolution_add_up():
    site = plan(net.Shared(), IMAGE)["shared"]
    assert site.calls == 3
    assert site.before.params == 32 * 32 * 9 + 32
    assert site.before.macs == (400 + 400 + 100) * 32 * 32 * 9


@pytest.mark.slow
def test_every_convolution_is_listed_once_in_the_order_of_the_forward_pass():
    assert list(plan(net.TwoNames(), IMAGE).names()) == ["first", "a"]
    assert list(plan(net.Uncalled(), IMAGE).names()) == ["used", "unused"]
    assert plan(net.Uncalled(), IMAGE)["unused"].calls == 0
    assert list(plan(net.Functional(), IMAGE).names()) == ["conv2d()"]
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(plan(model, torch.empty(1, 3, 64, 64)).names()) == sorted(convolutions)


def test_a_functional_call_costs_what_the_module_would():
    functional = plan(net.Functional(), IMAGE)["conv2d()"]
    module = plan(nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False)), IMAGE)["0"]
    assert functional.before == module.before
    assert functional.stride == module.stride == (2, 2)


def test_functional_calls_and_modules_of_one_name_are_told_apart():
    decided = plan(net.SameNames(), IMAGE)
    assert list(decided.names()) == ["conv2d()", "conv2d", "conv_transpose2d()"]
    assert decided["conv2d"].action is Action.REPLACE
    whole = measure(net.SameNames(), IMAGE)
    assert sum(site.before.macs for site in decided) == whole.macs
    assert sum(site.before.params for site in decided) == whole.params


def test_a_convolution_inside_an_untraced_module_is_replaced_with_a_caution():
    class Opaque(timm.layers.BatchNormAct2d):
        def __init__(self):
            super().__init__(32)
            self.conv = net.conv()

        def forward(self, x):
            return self.conv(x)

    site = plan(net.around(Opaque()), IMAGE)["1.conv"]
    assert site.action is Action.REPLACE
    assert site.found_by is FoundBy.PIECES
    assert site.caution.startswith("inside 1 (Opaque), which is one node for torch.fx")
    assert site.calls == 1


FIGURES = {
    "resnet50": ({}, 16_843_748, 2.27, 16),
    "resnet18": ({"se_ratio": 0.5}, 7_691_032, 0.36, 16),
    "resnet101": ({}, 28_146_912, 4.03, 33),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_models_cost_what_the_paper_says(name):
    options, params, gmacs, replaced = FIGURES[name]
    with torch.device("meta"):
        model = timm.create_model(name)
    decided = plan(model, torch.empty(1, 3, 224, 224), **options)
    assert decided.model == name
    assert decided.input_size == (3, 224, 224)
    assert decided.after.params == params
    assert round(decided.after.macs / 1e9, 2) == gmacs
    assert len(decided.replaced) == replaced


@pytest.mark.slow
def test_mobilenet_leaves_depthwise_convolutions_alone():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv2_100")
    sites = [site for site in plan(model, torch.empty(1, 3, 64, 64)) if site.kind == "depthwise 3x3"]
    assert len(sites) == 17
    assert all("a depthwise convolution (depthwise=True" in site.reason for site in sites)


# --- selection ---


def chain():
    return nn.Sequential(nn.Conv2d(3, 32, 1), nn.Sequential(net.conv(), net.conv()), nn.Sequential(net.conv()))


SELECTIONS = {
    "all": ({}, {"1.0", "1.1", "2.0"}),
    "exact": ({"include": "1.1"}, {"1.1"}),
    "several": ({"include": ["1.1", "2.0"]}, {"1.1", "2.0"}),
    "glob": ({"include": "1.*"}, {"1.0", "1.1"}),
    "regular expression": ({"include": r"re:\d\.0"}, {"1.0", "2.0"}),
    "exclude": ({"exclude": "*.0"}, {"1.1"}),
    "exclude wins": ({"include": "1.*", "exclude": ["1.0"]}, {"1.1"}),
    "filter": ({"filter_fn": lambda module, name: name != "2.0" and module.in_channels == 32}, {"1.0", "1.1"}),
    "filter within include": ({"include": "1.*", "filter_fn": lambda _, fqn: fqn != "1.0"}, {"1.1"}),
}


@pytest.mark.parametrize("case", SELECTIONS)
def test_include_exclude_and_filter_fn_select(case):
    options, expected = SELECTIONS[case]
    assert {site.name for site in plan(chain(), IMAGE, **options).replaced} == expected


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"include": "1.1"}, "1.0", "outside include"),
        ({"exclude": "1.*"}, "1.0", "excluded by '1.*'"),
        ({"filter_fn": lambda module, name: False}, "1.0", "filter_fn said no"),
    ],
)
def test_what_is_not_selected_has_its_reason_and_can_be_replaced_after_all(options, name, reason):
    site = plan(chain(), IMAGE, **options)[name]
    assert site.reason == reason
    site.replace("after all")
    assert site.after == site.replacement_cost != site.before


PRECEDENCE = [
    ({"exclude": "1"}, "excluded by '1'"),
    ({"include": "2"}, "outside include"),
    ({"filter_fn": lambda module, name: name != "1"}, "filter_fn said no"),
    ({}, "stem: 3 input channels"),
    ({"keep_first": 1}, "kept: among the first 1"),
    ({"target_macs": "1T"}, "not needed for target_macs"),
]


@pytest.mark.parametrize("place", range(len(PRECEDENCE)))
def test_which_option_wins(place):
    """Each step of docs/planning.md wins over all that follow it."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), net.conv(3), net.conv())
    following = {name: value for options, _ in PRECEDENCE[place:] for name, value in options.items()}
    site = plan(model, IMAGE, **following, stem=place > 3)["1"]  # or the fourth would win over what follows it
    assert PRECEDENCE[place][1] in site.reason


def bracketed():
    model = nn.Sequential(nn.Conv2d(3, 32, 1))
    for name in ("conv1", "conv[1]", "conv*", "re:x"):
        model.add_module(name, net.conv())
    model.add_module("stage[1]", nn.Sequential(net.conv(), net.conv()))
    return model


EXACT = {
    "brackets": ("conv[1]", {"conv[1]"}),
    "a star": ("conv*", {"conv*"}),
    "a prefix": ("re:x", {"re:x"}),
    "a glob all the same": ("conv[1-9]", {"conv1"}),
    "escaped, as the hint has it": ("stage[[]1].*", {"stage[1].0", "stage[1].1"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_name_given_exactly_is_no_glob(case, option):
    pattern, expected = EXACT[case]
    decided = plan(bracketed(), IMAGE, **{option: pattern})
    replaced = {site.name for site in decided.replaced}
    everything = {site.name for site in plan(bracketed(), IMAGE).replaced}
    assert replaced == (expected if option == "include" else everything - expected)


def test_a_hint_for_a_name_with_brackets_is_a_pattern_that_works():
    with pytest.raises(UsageError, match=re.escape("write 'stage[[]1].*'")):
        plan(bracketed(), IMAGE, include="stage[1]")


class Chooses:
    """A callable with a method's signature."""

    def __call__(self, name: str, module: nn.Module) -> bool:
        return True


def annotated(a: str, b: "nn.Module") -> bool:
    return True


OLD_ORDER = {
    "names": lambda name, module: True,
    "a name alone": lambda fqn, _: True,
    "a module alone": lambda _, module: module.in_channels > 3,
    "an object": Chooses(),
    "annotations": annotated,
    "found by the call": lambda a, b: a.startswith("1"),
    "found by the other argument": lambda a, b: b.in_channels > 3,
    "one argument": lambda module: True,
    "its own mistake": lambda module, name: 1 / 0,
}


@pytest.mark.parametrize("case", OLD_ORDER)
def test_a_filter_function_with_the_arguments_the_other_way_round(case):
    with pytest.raises(UsageError, match=r"filter_fn\(module, name\)") as caught:
        plan(chain(), IMAGE, filter_fn=OLD_ORDER[case])
    if "found" in case or case == "its own mistake":
        assert "filter_fn failed for 1.0 (Conv2d): " in str(caught.value)
    assert "\n" not in str(caught.value)


TORCHAO = [
    lambda module, fqn: False,
    lambda a, b: False,
    lambda *both: False,
    functools.partial(lambda key, module, name: name == key, "absent"),
]


@pytest.mark.parametrize("chosen", TORCHAO)
def test_filter_functions_in_torchaos_order(chosen):
    assert {site.reason for site in plan(chain(), IMAGE, filter_fn=chosen) if site.name != "0"} == {"filter_fn said no"}


def test_a_pattern_can_name_either_name_of_a_shared_convolution():
    assert [site.name for site in plan(net.TwoNames(), IMAGE, include="b.same").replaced] == ["a"]


def test_include_does_not_overrule_the_stem_rule_but_its_flag_is_named():
    model = nn.Sequential(net.conv(3))
    assert "stem=True" in plan(model, IMAGE, include="0")["0"].reason
    assert plan(model, IMAGE, include="0", stem=True).replaced


# --- errors ---

ERRORS = {
    "include matches nothing": (
        chain(),
        {"include": "1.O"},
        r"include: '1\.O' matches no convolution; did you mean 1\.\d",
    ),
    "include names a container": (chain(), {"include": "1"}, r"write '1\.\*'"),
    "exclude matches nothing": (chain(), {"exclude": ["1.0", "absent"]}, "exclude: 'absent' matches no convolution"),
    "not a regular expression": (chain(), {"include": "re:("}, r"'re:\(' is not a regular expression"),
    "unknown option": (chain(), {"se_ration": 0.5}, "se_ration.*did you mean se_ratio"),
    "bad option": (chain(), {"se_ratio": 0}, "se_ratio: Input should be greater than 0"),
    "a size in words": (chain(), {"target_macs": "2.5 giga"}, "target_macs: .*write a number such as 2.5G"),
    "an even kernel": (chain(), {"kernel_size": 4}, "kernel_size: .*odd sizes from 3 on"),
    "lazy": (nn.Sequential(nn.LazyConv2d(3, 3)), {}, r"0\.weight is lazy"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_options_and_patterns_are_refused_in_one_line(case):
    model, options, message = ERRORS[case]
    with pytest.raises(UsageError, match=message) as caught:
        plan(model, IMAGE, **options)
    assert "\n" not in str(caught.value)


def test_an_input_of_another_dtype_is_refused():
    with pytest.raises(
        UsageError, match=r"first \(Conv2d\) failed: .*it takes torch.float32 and was given torch.float64"
    ):
        plan(net.Residual(), IMAGE.double())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vgg11", (3, 16, 16), r"vgg11 does not accept an input of 3x16x16: features\.\d+ \(MaxPool2d\) failed"),
        ("resnet18", (1, 64, 64), r"1x64x64: conv1 \(Conv2d\) failed: .*takes 3 channels and was given 1"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_with_advice(name, shape, message):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=message) as caught:
        plan(model, torch.empty(1, *shape))
    assert "larger --input-size" in str(caught.value) or "channels" in str(caught.value)


# --- the plan itself ---


def test_plans_round_trip_through_json_and_can_be_edited():
    decided = plan(chain(), IMAGE, se_ratio=0.5)
    again = Plan.from_json(decided.to_json())
    assert again == decided
    assert again["1.0"].replacement.options == decided["1.0"].replacement.options
    full = again.after
    again["1.0"].skip("keep")
    assert again.after.params == full.params + again["1.0"].before.params - again["1.0"].replacement_cost.params
    again["1.0"].replace()
    assert again.after == full
    again["1.1"].skip()
    model = chain()
    converted = convert(model, Plan.from_json(again.to_json()))
    kinds = [type(converted.get_submodule(name)) for name in ("1.0", "1.1", "2.0")]
    assert kinds == [DDFConv2d, nn.Conv2d, DDFConv2d]


@pytest.mark.slow
def test_plans_saved_before_sites_had_an_operation_load():
    cases = [
        (net.around(DDF2d(32), nn.ConvTranspose2d(32, 32, 3), net.conv(groups=2)), {}),
        (nn.Sequential(net.conv(3), nn.Conv2d(32, 32, 5), DDFConv2d(32, 8)), {}),
        (net.Functions(), {"functional": True}),
        (net.SameNames(), {}),
        (net.Untraceable(), {}),
        (net.Pyramid(), {"upsample": True}),
        (net.Shuffles(), {"upsample": True}),
        (convert(net.Pyramid(), example_input=IMAGE, upsample=True), {"upsample": True}),
    ]
    for model, options in cases:
        decided = plan(model, IMAGE, **options)
        saved = json.loads(decided.to_json())
        for site in saved["sites"]:
            del site["operation"], site["kernel_size"], site["override"]
        assert Plan.from_json(json.dumps(saved)) == decided


def test_a_site_has_fields_for_what_its_words_say():
    def fields(site):
        return site.operation, site.kernel_size, site.functional, site.override

    decided = plan(nn.Sequential(net.conv(3), DDF2d(32), nn.ConvTranspose2d(32, 8, 2)), IMAGE)
    assert fields(decided["0"]) == (Operation.CONV, (3, 3), False, "stem")
    assert fields(decided["1"]) == (Operation.CONVERTED, None, False, "")
    assert fields(decided["2"]) == (Operation.CONV_TRANSPOSE, (2, 2), False, "")
    assert decided["0"].reason == f"stem: 3 input channels{override_hint('stem')}"
    decided["0"].replace()
    assert decided["0"].override == ""
    upsampling = plan(nn.Sequential(net.Pyramid()), IMAGE, upsample=True)
    assert fields(upsampling["0.interpolate()"]) == (Operation.INTERPOLATE, None, True, "")
    assert fields(plan(net.Functional(), IMAGE)["conv2d()"]) == (Operation.CONV, (3, 3), True, "functional")


def test_a_plan_names_near_sites_and_refuses_what_cannot_be():
    decided = plan(chain(), IMAGE)
    with pytest.raises(KeyError, match=r"'1\.7'; did you mean 1\.\d"):
        decided["1.7"]
    with pytest.raises(UsageError, match="0 cannot be replaced: 1x1 kernel"):
        decided["0"].replace()
    with pytest.raises(UsageError, match="not a plan of ddf_convert"):
        Plan.from_json('{"model": 3}')
    assert len(decided) == len(list(decided)) == 4
    assert "1.0: dense 3x3: replace: DDF + 1x1" in str(decided)


def test_planning_changes_nothing_and_needs_no_weights():
    model = chain().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    on_cpu = plan(model, IMAGE)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(generator, torch.get_rng_state())
    assert plan(model.to("meta"), IMAGE.to("meta")) == on_cpu


def test_single_options_change_a_config():
    config = ConvertConfig(combine="add", heads=2)
    assert plan(chain(), (IMAGE,), config, se_ratio=0.5).config == ConvertConfig(combine="add", heads=2, se_ratio=0.5)
