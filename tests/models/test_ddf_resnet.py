"""DDF-ResNets in timm: the authors' names and shapes, the paper's figures, and timm's own ways of using a model."""

import subprocess
import sys

import pytest
import timm
import torch
from support.paths import DATA
from torch import nn

import ddf_convert
from ddf_convert.cost.count import measure
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d

NAMES = [f"ddf_{combine}_resnet{depth}" for combine in ("mul", "add") for depth in (18, 50, 101, 152)]
KEYS = DATA / "ddf_mul_resnet50_keys.tsv"


def on_meta(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def test_timm_lists_them():
    assert set(timm.list_models("ddf_*resnet*")) == set(NAMES)
    assert timm.models.get_pretrained_cfg("ddf_mul_resnet50").input_size == (3, 224, 224)


def test_names_and_shapes_are_those_of_the_authors_checkpoint():
    expected = dict(line.split("\t") for line in KEYS.read_text().splitlines() if line)
    state = on_meta("ddf_mul_resnet50").state_dict()
    found = {name: "x".join(map(str, value.shape)) for name, value in state.items()}
    ours = {name: shape for name, shape in found.items() if not name.endswith("num_batches_tracked")}
    wanted = {name: shape for name, shape in expected.items() if not name.endswith("num_batches_tracked")}
    assert ours == wanted
    assert len(wanted) > 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("ddf_mul_resnet18", 7_691_032, 0.36),
        ("ddf_mul_resnet50", 16_843_748, 2.27),
        ("ddf_add_resnet50", 16_843_748, 2.27),
        ("ddf_mul_resnet101", 28_146_912, 4.03),
    ],
)
def test_figures_of_the_paper(name, params, gmacs):
    cost = measure(on_meta(name), torch.empty(1, 3, 224, 224))
    assert cost.params == params
    assert round(cost.macs / 1e9, 2) == gmacs


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_3x3_convolution_of_the_stages_is_replaced(name):
    model = on_meta(name)
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    layers = [module for module in model.modules() if isinstance(module, DDF2d)]
    base = on_meta(name.rpartition("_")[2])
    convolutions = [m for m in base.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert plain == []
    assert len(layers) == len(convolutions)
    assert {layer.combine for layer in layers} == {name.split("_")[1]}
    assert {layer.se_ratio for layer in layers} == {0.5 if name.endswith("18") else 0.2}
    assert any(isinstance(module, DDFConv2d) for module in model.modules()) == name.endswith("18")


@pytest.mark.slow
def test_planning_the_base_model_leads_to_the_same_model():
    for name, options in (("resnet18", {"se_ratio": 0.5}), ("resnet50", {})):
        converted = ddf_convert.convert(on_meta(name), example_input=torch.empty(1, 3, 64, 64), **options)
        assert repr(converted) == repr(on_meta(f"ddf_mul_{name}"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddf_mul_resnet18", "ddf_add_resnet50"])
def test_timms_ways_of_using_a_model(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_path_rate=0.1).eval()
    image = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        assert model(image).shape == (1, 7)
        features = model.forward_features(image)
        assert features.shape == (1, model.num_features, 2, 2)
        assert torch.equal(model.forward_head(features), model(image))
    model.reset_classifier(3)
    assert model(image).shape == (1, 3)
    model.set_grad_checkpointing()
    model.train()(torch.randn(2, 1, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.pretrained_cfg["architecture"] == name


def test_features_only_and_dilated_stages():
    model = timm.create_model("ddf_mul_resnet18", features_only=True, output_stride=16).eval()
    shapes = [tuple(feature.shape[1:]) for feature in model(torch.randn(1, 3, 64, 64))]
    assert shapes == [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 4, 4)]


def test_pretrained_weights_do_not_exist():
    with pytest.raises(UsageError, match="ddf_mul_resnet50 has no pretrained weights"):
        timm.create_model("ddf_mul_resnet50", pretrained=True)


@pytest.mark.slow
def test_a_checkpoint_of_ones_own_is_loaded_by_timm(tmp_path):
    model = timm.create_model("ddf_mul_resnet18", num_classes=2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pth")
    again = timm.create_model("ddf_mul_resnet18", num_classes=2, checkpoint_path=str(tmp_path / "own.pth"))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_they_are_saved_and_loaded(tmp_path):
    model = timm.create_model("ddf_add_resnet18", num_classes=2).eval()
    ddf_convert.save(model, tmp_path / "out")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ddf_convert.load(tmp_path / "out")(image), model(image))


def test_seeds_decide_the_weights():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(timm.create_model("ddf_mul_resnet18").layer1[0].conv1.ddf.channel_branch[1].weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


@pytest.mark.slow
def test_importing_is_cheap_and_loads_nothing_heavy():
    script = (
        "import sys, time, torch, timm\n"
        "start = time.perf_counter()\n"
        "import ddf_convert\n"
        "seconds = time.perf_counter() - start\n"
        "heavy = [name for name in ('numba', 'rich', 'typer', 'matplotlib') if name in sys.modules]\n"
        "print(seconds, *heavy)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    seconds, *heavy = result.stdout.split()
    assert heavy == []
    assert float(seconds) < 2  # 0.3 s on a quiet machine; the aim is 0.5
    assert result.stderr == ""


def test_public_names_exist():
    assert all(hasattr(ddf_convert, name) for name in ddf_convert.__all__)
