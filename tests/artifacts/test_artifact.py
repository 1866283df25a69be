"""Save, load, restore: equal outputs in a new process, of whole models, parts and extra states."""

import copy
import io
import json
import operator
import os
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from support import networks as net
from support.artifacts import IMAGE, SMALL, same_state, shaken
from support.paths import ROOT
from support.tolerances import far
from torch import nn

from ddf_convert import layers
from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.artifact import TimmSource, load, read_manifest, restore, save
from ddf_convert.conversion import convert, plan, recorded
from ddf_convert.errors import ArtifactError, UsageError

# --- round trips ---


@pytest.mark.slow
def test_a_new_process_gives_equal_outputs(model, saved, tmp_path):
    image = torch.randn(2, 3, 64, 64)
    torch.save(image, tmp_path / "image.pt")
    script = (
        "import sys, torch, ddf_convert\n"
        "model = ddf_convert.load(sys.argv[1])\n"
        "assert not model.training\n"
        "with torch.no_grad(): torch.save(model(torch.load(sys.argv[2])), sys.argv[3])\n"
    )
    arguments = [saved, tmp_path / "image.pt", tmp_path / "output.pt"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    with torch.no_grad():
        assert torch.equal(model(image), torch.load(tmp_path / "output.pt"))


def test_what_is_in_the_folder(model, saved):
    assert sorted(os.listdir(saved)) == ["manifest.json", "model.safetensors", "report.json"]
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["format"] == "ddf_convert"
    assert manifest["format_version"] == artifact.FORMAT_VERSION
    assert manifest["source"] == {"kind": "timm", "name": SMALL, "kwargs": {"num_classes": 5}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["dtype"] == "float32"
    assert json.loads((saved / "report.json").read_text()) == {"model": SMALL}
    assert read_manifest(saved).conversion == recorded(model)
    assert set(safetensors.torch.load_file(saved / "model.safetensors")) == set(model.state_dict())


def test_loading_and_saving_again_keeps_everything(model, saved, tmp_path):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    loaded = load(saved)
    assert torch.equal(state, torch.get_rng_state())
    assert same_state(loaded, model)
    assert recorded(loaded) == recorded(model)
    save(loaded, tmp_path / "again")
    assert read_manifest(tmp_path / "again").weights == read_manifest(saved).weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda model: model.half()),
        ({}, lambda model: model.to(torch.float64)),
        ({}, lambda model: model.to(memory_format=torch.channels_last)),
        ({}, lambda model: model.reset_classifier(7) or model),
    ],
)
def test_timm_models_are_recognized(tmp_path, options, change):
    image = torch.randn(1, options.get("in_chans", 3), 64, 64)
    base = timm.create_model(SMALL, **{"num_classes": 5, **options})
    model = change(shaken(convert(base, example_input=image))).eval()
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert same_state(loaded, model)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        # Another memory format adds up in another order.
        expected = model(image.to(dtype))
        torch.testing.assert_close(loaded(image.to(dtype)), expected, **far(dtype, expected))


@pytest.mark.slow
def test_a_model_converted_twice(tmp_path):
    once = convert(timm.create_model(SMALL, num_classes=5), example_input=IMAGE, include="layer1.*")
    twice = shaken(convert(once, example_input=IMAGE, combine="add"))
    save(twice, tmp_path / "out")
    assert same_state(load(tmp_path / "out"), twice)


class MixedDtypes(net.Residual):
    """A float64 parameter among float32 ones."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        return super().forward(x) + self.offset.to(x.dtype)


OWN = {
    "bottleneck": lambda: net.bottleneck(net.conv()),
    "two names": net.TwoNames,
    "shared": net.Shared,
    "tied": net.TiedWeights,
    "gated": net.Gated,
    "bfloat16": lambda: net.bottleneck(net.conv()).to(torch.bfloat16),
    "mixed dtypes": lambda: MixedDtypes(),
}


@pytest.mark.parametrize("name", OWN)
def test_restore(name, tmp_path):
    build = OWN[name]
    image = torch.randn(1, 3, 20, 20)
    first = build()
    model = shaken(convert(first, example_input=image.to(list(first.parameters())[-1].dtype)))
    save(model, tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"a model of your own .*restore"):
        load(tmp_path / "out")
    fresh = build().train()
    assert restore(fresh, tmp_path / "out") is fresh
    assert fresh.training
    assert same_state(fresh, model)
    assert recorded(fresh) == recorded(model)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    model = shaken(net.TiedWeights())
    save(model, tmp_path / "out")
    assert "b.weight" not in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    fresh = restore(net.TiedWeights(), tmp_path / "out")
    assert fresh.b.weight is fresh.a.weight
    assert torch.equal(fresh.b.weight, model.a.weight)


def test_views_of_one_memory_are_saved(tmp_path):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            memory = torch.randn(40)
            self.a, self.b = nn.Parameter(memory[:10]), nn.Parameter(memory[10:30].view(4, 5).t())
            self.register_buffer("c", torch.randn(1).expand(6))

    model = Flat()
    save(model, tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())


# --- parts ---


class Around(nn.Module):
    """A network of one's own around others."""

    def __init__(self, *parts):
        super().__init__()
        self.parts, self.head = nn.ModuleList(parts), nn.Conv2d(32, 2, 1)

    def forward(self, x):
        return self.head(sum(part(x) for part in self.parts))


class ByHand(nn.Module):
    """A network that its author built with a DDF layer."""

    def __init__(self):
        super().__init__()
        self.first, self.ddf, self.conv = nn.Conv2d(3, 32, 1), layers.DDF2d(32), net.conv()

    def forward(self, x):
        return self.conv(self.ddf(self.first(x)))


class Upsampling(nn.Module):
    """Every way of upsampling; one part of it interpolates, and so does what is around it."""

    def __init__(self, inner=None):
        super().__init__()
        self.first, self.up, self.inner = nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2), inner or nn.Identity()
        self.conv, self.shuffle, self.last = nn.Conv2d(8, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.shuffle(self.conv(self.up(self.first(x))))
        return self.inner(self.last(F.interpolate(x, scale_factor=2)))


def pickled(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


def loop(**options):
    return convert(net.Loop(), example_input=torch.empty(1, 3, 12, 12), **options)


def kernels():
    return nn.Sequential(nn.Conv2d(3, 32, 1), net.Kernel())


def functional():
    return convert(kernels(), example_input=torch.empty(1, 3, 12, 12), functional=True)


def upsampling(model):
    return convert(model, example_input=torch.empty(1, 3, 8, 8), upsample=True, allow_growth=True)


def same_twice(part):
    return Around(part, part)


def converted_later():
    """A part was converted, then what is around it."""
    around = Around(loop(include="convs.0"), net.Loop())
    return convert(around, example_input=torch.empty(1, 3, 12, 12))


PARTS = {  # the model, a fresh one, and how many layers were replaced
    "a part": (lambda: Around(loop()), lambda: Around(net.Loop()), 2),
    "a part that the constructor converts": (lambda: Around(loop()), lambda: Around(loop()), 2),
    "one part at two places": (lambda: same_twice(loop()), lambda: same_twice(net.Loop()), 2),
    "a part and its copy": (
        lambda: (lambda part: Around(part, copy.deepcopy(part)))(loop()),
        lambda: Around(net.Loop(), net.Loop()),
        4,
    ),
    "copied": (lambda: copy.deepcopy(Around(loop())), lambda: Around(net.Loop()), 2),
    "pickled": (lambda: pickled(Around(loop())), lambda: Around(net.Loop()), 2),
    "on top": (converted_later, lambda: Around(net.Loop(), net.Loop()), 4),
    "on top, and a part alone": (lambda: converted_later().parts[0], net.Loop, 2),
    "a part of a part": (
        lambda: nn.Sequential(net.conv(3), *loop().convs),
        lambda: nn.Sequential(net.conv(3), net.conv(), net.conv()),
        2,
    ),
    "a part in DataParallel": (
        lambda: Around(nn.DataParallel(loop())),
        lambda: Around(nn.DataParallel(net.Loop())),
        2,
    ),
    "built by hand": (ByHand, ByHand, 0),
    "built by hand, and a part": (lambda: Around(ByHand(), loop()), lambda: Around(ByHand(), net.Loop()), 2),
    "functions": (lambda: Around(functional()), lambda: Around(kernels()), 1),
    "functions that the constructor converts": (lambda: Around(functional()), lambda: Around(functional()), 1),
    "functions and modules": (lambda: Around(functional(), loop()), lambda: Around(kernels(), net.Loop()), 3),
    "upsampling": (lambda: nn.Sequential(upsampling(Upsampling())), lambda: nn.Sequential(Upsampling()), 3),
    "upsampling inside": (
        lambda: nn.Sequential(upsampling(Upsampling(Upsampling()))),
        lambda: nn.Sequential(Upsampling(Upsampling())),
        6,
    ),
    "upsampling, the inner one alone": (lambda: upsampling(Upsampling(Upsampling())).inner, Upsampling, 3),
    "upsampling, pickled": (
        lambda: pickled(nn.Sequential(upsampling(Upsampling()))),
        lambda: nn.Sequential(Upsampling()),
        3,
    ),
    "replaced by hand again": (
        lambda: (lambda model: setattr(model.convs, "0", net.conv()) or model)(loop()),
        net.Loop,
        1,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PARTS)
def test_conversions_of_parts_are_saved(case, tmp_path):
    build, fresh, count = PARTS[case]
    model = shaken(build())
    manifest = save(model, tmp_path / "out")
    assert len(manifest.conversion.replaced) == count
    again = restore(fresh(), tmp_path / "out").eval()
    assert same_state(again, model)
    image = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))
    assert recorded(again) == manifest.conversion
    assert save(again, tmp_path / "again").conversion == manifest.conversion


def test_parts_with_half_of_what_was_replaced_together_are_refused(tmp_path):
    up, graph = upsampling(Upsampling()), functional()
    for part, message in [
        (nn.Sequential(up.conv), "0 was replaced together with a pixel shuffle that is not in it; save a module"),
        (nn.Sequential(up.shuffle), "0 was replaced together with a convolution that is not in it"),
        (nn.Sequential(*graph.children()), "replaces a call of a function, and the code that calls it is not in it"),
        (nn.Sequential(up.ddf_interpolate), "0 replaces a call of a function"),
    ]:
        with pytest.raises(UsageError, match=message):
            save(part, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_constructor_that_converts_otherwise_is_refused(tmp_path):
    save(Around(loop()), tmp_path / "out")
    other = Around(loop(combine="add"))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ArtifactError, match=r"parts\.0\.convs\.0: already converted"):
        restore(other, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_the_record_of_a_whole_has_options_and_recipe_of_its_parts():
    part = loop(combine="add")
    part.ddf_conversion = part.ddf_conversion.model_copy(update={"recipe": {"name": "mine"}})
    found = recorded(Around(part, net.Loop()))
    assert found.source == "Around"
    assert [config.combine for config in found.configs] == ["add"]
    assert found.recipe == {"name": "mine"}
    assert [step.names for step in found.replaced] == [("parts.0.convs.0",), ("parts.0.convs.1",)]
    assert recorded(Around(ByHand(), net.Loop())) is None


@pytest.mark.slow
def test_a_converted_backbone_is_restored_in_a_new_process(tmp_path):
    (tmp_path / "mynet.py").write_text(
        "import timm\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        f"        self.backbone = timm.create_model({SMALL!r}, features_only=True, out_indices=(2,))\n"
        "        self.head = nn.Conv2d(128, 3, 1)\n\n"
        "    def forward(self, x):\n"
        "        return self.head(self.backbone(x)[0])\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        from mynet import Net
    finally:
        sys.path.remove(str(tmp_path))
    model = Net()
    model.backbone = convert(model.backbone, example_input=IMAGE)
    shaken(model)
    assert len(save(model, tmp_path / "out").conversion.replaced) == 6
    image = torch.randn(1, 3, 64, 64)
    torch.save(image, tmp_path / "image.pt")
    script = (
        "import torch, ddf_convert, mynet\n"
        "model = ddf_convert.restore(mynet.Net(), 'out').eval()\n"
        "with torch.no_grad(): torch.save(model(torch.load('image.pt')), 'output.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)
    with torch.no_grad():
        assert torch.equal(model(image), torch.load(tmp_path / "output.pt"))


# --- extra states ---


class Counting(nn.Module):
    """A module with an extra state, which it computes from contents."""

    def __init__(self, state=None):
        super().__init__()
        self.seen = nn.Parameter(torch.ones(1))
        self.state = state

    def get_extra_state(self):
        return {"state": self.state, "seen": self.seen.item()} if isinstance(self.state, list) else self.state

    def set_extra_state(self, state):
        self.state = state["state"] if isinstance(state, dict) and "seen" in state else state


EXTRA = {
    "number": 3,
    "text": "a\n\N{SNOWMAN}",
    "nothing": None,
    "computed": [1, 2.5, True],
    "nested": {"a": [None, {"b": 2**70}], "c": 0.1},
    "tensor": torch.arange(5.0),
}


@pytest.mark.parametrize("name", EXTRA)
def test_extra_states_come_back(name, tmp_path):
    shared = Counting(EXTRA[name])
    model = nn.ModuleDict({"first": shared, "again": shared, "other": nn.Sequential(Counting(7))})
    save(model, tmp_path / "out", original=model)
    fresh = Counting()
    fresh = nn.ModuleDict({"first": fresh, "again": fresh, "other": nn.Sequential(Counting())})
    original = copy.deepcopy(fresh)
    restore(fresh, tmp_path / "out")
    artifact.load_original(tmp_path / "out", original)
    for again in (fresh, original):
        assert (torch.equal if name == "tensor" else operator.eq)(again["first"].state, EXTRA[name])
        assert again["other"][0].state == 7


NOT_JSON = {"a tuple": (1, 2), "a set": {1}, "numbers as keys": {1: 2}, "NaN": float("nan"), "an object": object()}


@pytest.mark.parametrize("name", [*NOT_JSON, "a tensor inside"])
def test_extra_states_that_json_would_change_are_refused(name, tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), Counting(NOT_JSON.get(name, {"a": torch.ones(2)})))
    with pytest.raises(UsageError, match=r"1\._extra_state is not a tensor and not JSON") as caught:
        save(model, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_extra_states_that_could_not_be_set_or_are_missing_are_refused(tmp_path):
    class Mute(nn.Module):
        def get_extra_state(self):
            return 1

    with pytest.raises(UsageError, match=r"0\._extra_state could not be loaded again, since Mute has"):
        save(nn.Sequential(Mute()), tmp_path / "out")
    assert os.listdir(tmp_path) == []
    save(nn.Sequential(Counting(1)), tmp_path / "with")
    save(nn.Sequential(nn.ParameterDict({"seen": torch.ones(1)})), tmp_path / "without")
    fresh = nn.Sequential(Counting(5))
    with pytest.raises(ArtifactError, match=r"1 missing \(0\._extra_state\)"):
        restore(fresh, tmp_path / "without")
    assert fresh[0].state == 5
    with pytest.raises(ArtifactError, match=r"1 not in the model \(0\._extra_state\)"):
        restore(nn.Sequential(nn.ParameterDict({"seen": torch.ones(1)})), tmp_path / "with")


# --- the rest ---


def test_the_plan_is_not_needed_to_load(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("loading decided something")

    monkeypatch.setattr("ddf_convert.conversion.planner.trace", refuse)
    with pytest.raises(AssertionError):
        plan(timm.create_model(SMALL), IMAGE)
    load(saved)


def test_a_graph_module_is_restored_from_the_model_that_it_was(tmp_path):
    image = torch.randn(1, 3, 20, 20)
    graph = convert(net.Functions(), example_input=image, functional=True).eval()
    manifest = save(graph, tmp_path / "functions")
    assert manifest.source.model_class == "Functions"
    fresh = net.Functions()
    again = restore(fresh, tmp_path / "functions").eval()
    assert isinstance(again, torch.fx.GraphModule)
    assert torch.equal(again(image), graph(image))
    with pytest.raises(ArtifactError, match=r"does not fit Loop: it has no twice\.conv2d\(\)"):
        restore(net.Loop(), tmp_path / "functions")


def test_what_data_parallel_wraps_is_saved_and_restored(tmp_path):
    image = torch.randn(1, 3, 20, 20)
    wrapped = convert(nn.DataParallel(net.Loop()), example_input=image).eval()
    save(wrapped, tmp_path / "loop")
    for fresh in (net.Loop(), nn.DataParallel(net.Loop())):
        again = restore(fresh, tmp_path / "loop").eval()
        assert again is fresh
        assert torch.equal(again(image), wrapped(image))


@pytest.mark.slow
def test_a_model_that_folds_pixels_into_channels_is_timms_too(tmp_path):
    folded = convert(timm.create_model("tresnet_m", num_classes=3), example_input=IMAGE, include="body.layer4.0.conv2*")
    assert save(folded, tmp_path / "folded").source == TimmSource(name="tresnet_m", kwargs={"num_classes": 3})
