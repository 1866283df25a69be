"""What is saved as timm's is the same network, or it is saved as the user's own and a warning says why."""

import copy
import functools
import itertools
import logging
import operator
import re
import types
import weakref

import numpy
import pytest
import timm
import torch
from torch import nn

from ddf_convert.artifacts.artifact import OwnSource, TimmSource, load, read_manifest, restore, save
from ddf_convert.artifacts.module_diff import diff_modules
from ddf_convert.artifacts.provenance import find_source
from ddf_convert.conversion import Conversion, convert, plan
from ddf_convert.errors import ArtifactError, UsageError
from ddf_convert.utils import logging as notices

SMALL = "test_resnet"
IMAGE = torch.empty(1, 3, 64, 64)


def built(**kwargs):
    return timm.create_model(SMALL, **kwargs)


def unconverted(model):
    """The record of a model that was not converted."""
    return Conversion(source=type(model).__name__)


@pytest.fixture
def warned(caplog, monkeypatch):
    """What the package says, again even if it was said before."""
    monkeypatch.setattr(notices, "_warned", set())
    caplog.set_level(logging.WARNING, logger="ddf_convert")
    return caplog


# --- arguments of timm ---

ARGUMENTS = [
    {},
    {"drop_rate": 0.3},
    {"drop_path_rate": 0.3},
    {"drop_rate": 0.1, "drop_path_rate": 0.2, "num_classes": 3},
    {"act_layer": "silu"},
    {"act_layer": nn.SiLU},
    {"global_pool": "max"},
    {"num_classes": 0},
    {"num_classes": 0, "global_pool": ""},
    {"in_chans": 1},
    {"features_only": True},
    {"features_only": True, "out_indices": (1, 2)},
    {"features_only": True, "feature_cls": "dict"},
]


def in_training(model, image):
    """An output in training mode, with dropout; and the random numbers that it drew."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output = copy.deepcopy(model).train()(image)
        outputs = output.values() if isinstance(output, dict) else output if isinstance(output, list) else [output]
        return [*outputs, torch.get_rng_state()]


@pytest.mark.slow
@pytest.mark.parametrize("noted", [True, False], ids=["noted by timm", "found out"])
@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=str)
def test_arguments_are_recorded_and_the_same_network_comes_back(kwargs, noted, tmp_path):
    model = built(**kwargs)
    if not noted:  # as timm was before it noted them
        vars(model).pop("_model_args", None)
    source = save(model, tmp_path / "out").source
    assert source.kind == "timm"
    again = load(tmp_path / "out")
    image = torch.randn(2, kwargs.get("in_chans", 3), 64, 64)
    for mine, theirs in zip(in_training(model, image), in_training(again, image), strict=True):
        assert torch.equal(mine, theirs)
    assert save(again, tmp_path / "again").source == source


def test_arguments_of_converted_models(tmp_path):
    kwargs = {"drop_rate": 0.3, "drop_path_rate": 0.1, "features_only": True, "out_indices": [1, 3]}
    model = convert(built(**kwargs), example_input=IMAGE).eval()
    assert save(model, tmp_path / "out").source == TimmSource(SMALL, kwargs)
    image = torch.randn(1, 3, 64, 64)
    for mine, theirs in zip(model(image), load(tmp_path / "out")(image), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_efficientnet", {"bn_eps": 1e-4, "drop_path_rate": 0.2}),
        ("test_vit", {"attn_drop_rate": 0.1, "class_token": False, "global_pool": "avg"}),
        ("test_vit", {"img_size": 96, "qkv_bias": False, "init_values": 0.1}),
        ("coatnet_pico_rw_224", {"img_size": 96, "drop_path_rate": 0.1}),  # with tables that no state dict holds
    ],
)
def test_arguments_of_other_families(name, kwargs):
    model = timm.create_model(name, **kwargs)
    assert find_source(model, unconverted(model)) == TimmSource(name, kwargs)


def test_the_weights_tag_is_recorded_where_it_decides():
    """timm's default for the architecture has other classes, and pixels in another range."""
    tagged = timm.list_pretrained("convnext_tiny.*")
    other = next(name for name in tagged if timm.get_pretrained_cfg(name).num_classes == 21841)
    for name in ("convnext_tiny", other):
        with torch.device("meta"):
            model = timm.create_model(name)
        assert find_source(model, unconverted(model)) == TimmSource(name)


def test_a_rate_that_was_changed_later_is_an_argument_too(tmp_path):
    model = built()
    model.drop_rate = 0.5
    assert save(model, tmp_path / "out").source == TimmSource(SMALL, {"drop_rate": 0.5})
    assert load(tmp_path / "out").drop_rate == 0.5


# --- what timm does not build ---


def replace(path, name, value):
    def change(model):
        setattr(model.get_submodule(path), name, value)

    return change


def tie(model):
    model.layer3[0].bn1.weight = model.layer3[0].bn2.weight


def share(model):
    model.layer1[0].act2 = model.layer1[0].act1


EDITS = {
    "epsilon": (replace("layer1.0.bn1", "eps", 1e-3), r"layer1\.0\.bn1\.eps 0\.001 where timm builds 1e-05"),
    "momentum": (replace("bn1", "momentum", 0.01), r"bn1\.momentum 0\.01 where timm builds 0\.1"),
    "activation": (replace("layer1.0", "act1", nn.SiLU()), r"layer1\.0\.act1 SiLU\(\) where timm builds ReLU"),
    "forward": (replace("layer1.0", "forward", lambda x: x), r"layer1\.0\.forward .*<lambda> where timm builds"),
    "rate inside": (replace("layer1.0", "drop_path", nn.Dropout(0.1)), r"layer1\.0\.drop_path"),
    "one activation at two places": (share, r"layer1\.0\.act2 .*layer1\.0\.act1"),
    "tied weights": (tie, r"layer3\.0\.bn2\.weight .*layer3\.0\.bn1\.weight"),
    "a constant": (
        lambda model: model.layer1.register_buffer("scale", torch.ones(1), persistent=False),
        r"layer1\.scale",
    ),
    "a layer more": (
        lambda model: model.layer1.append(nn.Identity()) and None,
        r"layer1\.1 Identity\(\) where timm builds nothing",
    ),
    "synchronized batch norm": (nn.SyncBatchNorm.convert_sync_batchnorm, "SyncBatchNorm where timm builds BatchNorm2d"),
    "another class": (lambda model: setattr(model, "__class__", type("Mine", (type(model),), {})), "the class Mine"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_changed_network_is_the_users_own_and_save_says_why(edit, tmp_path, warned):
    change, reason = EDITS[edit]
    model = built()
    model = change(model) or model
    manifest = save(model, tmp_path / "out")
    assert isinstance(manifest.source, OwnSource)
    assert read_manifest(tmp_path / "out").source == manifest.source
    (record,) = warned.records
    with pytest.raises(ArtifactError) as at_load:
        load(tmp_path / "out")
    with pytest.raises(UsageError) as asked:
        save(model, tmp_path / "asked", source=TimmSource(SMALL))
    for text in (record.getMessage(), manifest.source.reason, str(at_load.value), str(asked.value)):
        assert "\n" not in text
        assert re.search(reason, text), text
    for text in (record.getMessage(), str(at_load.value)):
        assert "restore(fresh_model, folder)" in text
        assert "source=TimmSource(name, kwargs)" in text
    assert not (tmp_path / "asked").exists()


HARMLESS = {
    "a note": lambda model: setattr(model, "class_names", ["cat", "dog"]),
    "checkpointing": lambda model: model.set_grad_checkpointing(),
    "training mode": lambda model: model.train(),
    "a hook": lambda model: model.layer1.register_forward_hook(lambda *args: None) and None,
    "frozen": lambda model: model.requires_grad_(False) and None,
    "another dtype": lambda model: model.half() and None,
    "timm's description": lambda model: model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3)),
    "compiled": lambda model: model.compile(),
}


@pytest.mark.slow
@pytest.mark.parametrize("edit", HARMLESS)
def test_what_leaves_the_function_as_it_is_leaves_it_timms(edit, tmp_path, warned):
    model = built()
    HARMLESS[edit](model)
    assert save(model, tmp_path / "out").source == TimmSource(SMALL)
    assert not warned.records


def test_models_of_ones_own_are_saved_without_a_word(tmp_path, warned):
    save(nn.Sequential(built()), tmp_path / "out")
    assert not warned.records
    with pytest.raises(ArtifactError, match=r"holds a model of your own \(\S*Sequential\), which only you can build"):
        load(tmp_path / "out")


def test_the_same_reason_is_said_once_in_a_training_run(tmp_path, warned):
    model = built()
    model.bn1.eps = 0.1
    for name in ("best", "last", "best"):
        save(model, tmp_path / name)
    assert len(warned.records) == 1


def test_a_graph_of_timms_model(tmp_path, warned):
    """As a GraphModule it is another thing than timm builds; and can be restored from what timm builds."""
    graph = convert(timm.create_model(SMALL), example_input=IMAGE, as_graph=True).eval()
    assert isinstance(save(graph, tmp_path / "out").source, OwnSource)
    assert len(warned.records) == 1
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(restore(timm.create_model(SMALL), tmp_path / "out").eval()(image), graph(image))


# --- sources that are given ---


def test_sources_that_are_given(tmp_path):
    model = built(features_only=True, out_indices=(1, 3), drop_path_rate=0.1)
    source = TimmSource(name=SMALL, kwargs={"features_only": True, "out_indices": (1, 3), "drop_path_rate": 0.1})
    assert source == TimmSource(SMALL, {"features_only": True, "out_indices": [1, 3], "drop_path_rate": 0.1})
    assert save(model, tmp_path / "out", source=source).source == source
    assert read_manifest(tmp_path / "out").source == source
    assert len(load(tmp_path / "out")(torch.randn(1, 3, 64, 64))) == 2
    assert save(model, tmp_path / "named", source=SMALL).source == source


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), r"TimmSource: name: Input should be a valid string"),
        (("resnet18", {"act_layer": nn.SiLU}), "TimmSource: kwargs: act_layer is type, which JSON does not have"),
        (("resnet18", {"drop_rate": float("nan")}), "TimmSource: kwargs: drop_rate is float"),
        (("resnet18", [1]), "TimmSource: kwargs: "),
        ((), "TimmSource: name: Field required"),
    ],
)
def test_sources_that_cannot_be_written_are_refused_in_one_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        TimmSource(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (TimmSource("resnet5O"), "timm has no model 'resnet5O'"),
        (TimmSource(SMALL, {"color": 1}), "cannot build test_resnet"),
        (TimmSource(SMALL, {"pretrained": True}), "pretrained is not an argument"),
        (TimmSource(SMALL, {"drop_rate": 0.2}), r"it has drop_rate 0\.0 where timm builds 0\.2"),
        (TimmSource(SMALL, {"num_classes": 2}), r"2 of another shape \(fc"),
        (TimmSource("test_vit"), "80 missing"),
    ],
)
def test_sources_that_build_another_network_are_refused(source, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        save(built(), tmp_path / "out", source=source)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- how values are compared ---


class Plain:
    def __init__(self, **values):
        vars(self).update(values)


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def holding(make):
    module = nn.Linear(1, 1)
    module.value = make()
    return module


def adder(number):
    return lambda x: x + number


def cyclic(number):
    values = [number]
    values.append(values)
    return values


SAME = {
    "NaN": lambda: float("nan"),
    "numbers of two types": itertools.cycle([1, 1.0]).__next__,
    "list and tuple": itertools.cycle([[1, (2,)], (1, [2])]).__next__,
    "closure": lambda: adder(3),
    "partial": lambda: functools.partial(nn.LayerNorm, eps=1e-6),
    "object": lambda: Plain(a=Plain(b=[1, {2}])),
    "slots": lambda: Slots(3),
    "array": lambda: numpy.arange(3),
    "tensor": lambda: torch.arange(3.0),
    "cycle": lambda: cyclic(1),
    "module outside of the tree": lambda: [nn.Dropout(0.1)],
    "class of a function": lambda: type("Inner", (), {}),
    "device": itertools.cycle([torch.device("cpu"), torch.device("meta")]).__next__,
    "dtype": lambda: torch.float16,
    "nothing inside": Plain,
}
OTHER = {
    "number": (1, 2),
    "flag": (True, False),
    "text": ("a", "b"),
    "None": (None, 0),
    "text and number": ("1", 1),
    "longer": ([1], [1, 2]),
    "key": ({"a": 1}, {"b": 1}),
    "value": ({"a": [1]}, {"a": [2]}),
    "set": ({1}, {2}),
    "closure": (adder(1), adder(2)),
    "default": (lambda x=1: x, lambda x=2: x),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "object": (Plain(a=Plain(b=1)), Plain(a=Plain(b=2))),
    "slots": (Slots(1), Slots(2)),
    "class": (nn.ReLU, nn.SiLU),
    "instance": (Plain(), Slots(1)),
    "array": (numpy.arange(3), numpy.arange(3) + 1),
    "tensor": (torch.arange(3.0), torch.arange(3.0) + 1),
    "shape": (torch.ones(3), torch.ones(1, 3)),
    "infinite": (torch.tensor([1.0, float("inf")]), torch.tensor([2.0, float("inf")])),
    "dtype": (torch.float16, torch.float32),
    "method": (Plain(a=1).__eq__, Plain(a=2).__eq__),
    "cycle": (cyclic(1), cyclic(2)),
    "module": ([nn.Dropout(0.1)], [nn.Dropout(0.2)]),
    "reference": (weakref.ref(Slots), weakref.ref(Plain)),
    "namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
}


@pytest.mark.parametrize("case", SAME)
def test_values_that_are_the_same(case):
    found = diff_modules(holding(SAME[case]), holding(SAME[case]))
    assert not found.differences
    assert not found.undecided


@pytest.mark.parametrize("case", OTHER)
def test_values_that_are_not(case):
    first, second = OTHER[case]
    (difference,) = diff_modules(holding(lambda: first), holding(lambda: second)).differences
    assert difference.name == "value"
    assert all("\n" not in text and len(text) < 100 for text in difference.describe_values())


def test_tensors_without_contents_and_opaque_objects_are_left_open():
    found = diff_modules(holding(lambda: torch.ones(2)), holding(lambda: torch.ones(2, device="meta")))
    assert (found.differences, found.without_values) == ([], ["value"])
    found = diff_modules(holding(object), holding(object))
    assert (found.differences, found.undecided) == ([], ["value"])


class Opaque(nn.Module):
    """A network with an attribute into which Python does not see."""

    def __init__(self, method="tanh"):
        super().__init__()
        self.pretrained_cfg = {"architecture": SMALL, "input_size": (3, 8, 8)}
        self.conv, self.method = nn.Conv2d(3, 2, 1), operator.methodcaller(method)

    def forward(self, x):
        return self.method(self.conv(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_cannot_be_compared_is_decided_by_outputs(dtype, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: Opaque())
    same, other = Opaque().to(dtype), Opaque("sigmoid").to(dtype)
    before = copy.deepcopy(same.state_dict())
    assert isinstance(find_source(same, unconverted(same)), TimmSource)
    assert all(torch.equal(value, before[name]) for name, value in same.state_dict().items())
    assert same.training
    source = find_source(other, unconverted(other))
    assert isinstance(source, OwnSource)
    assert source.reason.startswith("method cannot be compared with what timm builds (Tensor-likes are not close")


def test_a_plan_that_is_applied_leaves_the_source_alone(tmp_path):
    model = timm.create_model(SMALL, drop_rate=0.25)
    made = plan(model, IMAGE)
    assert save(convert(model, made, inplace=True), tmp_path / "out").source == TimmSource(SMALL, {"drop_rate": 0.25})
