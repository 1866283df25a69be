"""Save, load, restore: equal outputs in a new process; every damage refused; interrupted at any moment, old or new."""

import argparse
import collections
import copy
import datetime
import gzip
import io
import json
import operator
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from support import networks as net
from support.paths import ROOT
from support.tolerances import far
from torch import nn

from ddf_convert import layers
from ddf_convert.artifacts import artifact, atomic
from ddf_convert.artifacts.artifact import TimmSource, load, load_checkpoint, read_manifest, restore, save
from ddf_convert.conversion import convert, plan, recorded
from ddf_convert.errors import ArtifactError, DDFError, UsageError

IMAGE = torch.empty(1, 3, 64, 64)
SMALL = "resnet10t"


def shaken(model):
    """Every parameter and buffer moved off its initial value, batch norm statistics included."""
    generator = torch.Generator().manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor) * 0.1)
        else:
            tensor.add_(3)
    return model.eval()


def converted(name=SMALL, **options):
    torch.manual_seed(0)
    return shaken(convert(timm.create_model(name, **{"num_classes": 5, **options}), example_input=IMAGE))


@pytest.fixture(scope="module")
def model():
    return converted()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "out"
    save(model, path, report={"model": SMALL})
    return path


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of a good artifact, to damage."""
    return shutil.copytree(saved, tmp_path / "damaged")


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


# --- round trips ---


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


def test_folders_of_the_first_format_are_read(model, saved, tmp_path):
    old = shutil.copytree(saved, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["format_version"] = 1
    del manifest["original"], manifest["original_shared"], manifest["conversion"]["recipe"]
    for config in manifest["conversion"]["configs"]:
        del config["affine"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    assert same_state(load(old), model)


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


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, lambda model: model.half()),
        ({}, lambda model: model.to(torch.float64)),
        ({}, lambda model: model.to(memory_format=torch.channels_last)),
        ({"in_chans": 1}, lambda model: model),
        ({"num_classes": 0}, lambda model: model),
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


def test_a_model_converted_twice(tmp_path):
    once = convert(timm.create_model(SMALL, num_classes=5), example_input=IMAGE, include="layer1.*")
    twice = shaken(convert(once, example_input=IMAGE, combine="add"))
    save(twice, tmp_path / "out")
    assert same_state(load(tmp_path / "out"), twice)


def test_a_changed_timm_model_is_the_users_own(tmp_path):
    model = converted()
    model.layer1[0].act1 = nn.SiLU()  # no weight tells
    save(model, tmp_path / "out")
    assert read_manifest(tmp_path / "out").source.kind == "own"
    with pytest.raises(UsageError, match=r"it has .*SiLU.* where timm builds .*ReLU"):
        save(model, tmp_path / "other", source=SMALL)
    assert not (tmp_path / "other").exists()


def test_a_source_can_be_given(tmp_path):
    model = shaken(convert(timm.create_model(SMALL, num_classes=5, drop_rate=0.2), example_input=IMAGE))
    save(model, tmp_path / "out", source=TimmSource(name=SMALL, kwargs={"num_classes": 5, "drop_rate": 0.2}))
    assert same_state(load(tmp_path / "out"), model)
    with pytest.raises(UsageError, match="cannot be saved as timm's resnet5O: timm has no model"):
        save(model, tmp_path / "other", source="resnet5O")


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
    "two parts": (lambda: Around(loop(), loop()), lambda: Around(net.Loop(), net.Loop()), 4),
    "one part at two places": (lambda: same_twice(loop()), lambda: same_twice(net.Loop()), 2),
    "a part and its copy": (
        lambda: (lambda part: Around(part, copy.deepcopy(part)))(loop()),
        lambda: Around(net.Loop(), net.Loop()),
        4,
    ),
    "in a sequence": (lambda: nn.Sequential(loop(), nn.ReLU()), lambda: nn.Sequential(net.Loop(), nn.ReLU()), 2),
    "copied": (lambda: copy.deepcopy(Around(loop())), lambda: Around(net.Loop()), 2),
    "copied flat": (lambda: copy.copy(Around(loop())), lambda: Around(net.Loop()), 2),
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
    "functions deeper": (lambda: nn.Sequential(Around(functional())), lambda: nn.Sequential(Around(kernels())), 1),
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


# --- refusals ---


def edit(**changes):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        content.update(changes)
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def write(name, data):
    return lambda path: (path / name).write_bytes(data)


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(path):
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def other_weights(path):
    """Weights of another model, under a manifest that vouches for them."""
    safetensors.torch.save_file({"fc.weight": torch.zeros(3)}, path / "model.safetensors")
    edit(weights=atomic.FileRecord.of(path / "model.safetensors").model_dump())(path)


def not_weights(path):
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    edit(weights=atomic.FileRecord.of(path / "model.safetensors").model_dump())(path)


def edit_step(**changes):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        step = content["conversion"]["replaced"][0]
        step["replacement"]["options"].update(changes)
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def edit_record(**changes):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        content["conversion"]["replaced"][0] |= changes
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def recast(name, dtype):
    """One tensor of the weights in another dtype, under a manifest that vouches for the file."""

    def change(path):
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        tensors[name] = tensors[name].to(dtype)
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        edit(weights=atomic.FileRecord.of(path / "model.safetensors").model_dump())(path)

    return change


def edit_replacement(layer, options):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        content["conversion"]["replaced"][0]["replacement"] |= {"layer": layer, "options": options, "mix": None}
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def repeat_steps(count):
    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        step = content["conversion"]["replaced"][0]
        content["conversion"]["replaced"] = [
            step if count == 2 else {**step, "names": [f"layer{number}"]} for number in range(count)
        ]
        (path / "manifest.json").write_text(json.dumps(content))

    return change


PADDING = {"padding": 1, "padding_mode": "zeros"}
GEOMETRY = {"in_channels": 24, "out_channels": 32, "kernel_size": 3, "stride": 1, "dilation": 1, "bias": False}


def timm_source(**fields):
    return edit(source={"kind": "timm", "name": SMALL, "kwargs": {}, **fields})


DAMAGE = {
    "no folder": (shutil.rmtree, "no such folder"),
    "a file": (lambda path: shutil.rmtree(path) or path.write_text(""), "is a file, not a folder"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "not an artifact of ddf_convert"),
    "manifest cut off": (write("manifest.json", b'{"format": "ddf'), "is not JSON"),
    "manifest is binary": (write("manifest.json", b"\xff\xfe\x00"), "is not JSON"),
    "manifest nested deeply": (write("manifest.json", b"[" * 100_000), "is not JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "is not a manifest of ddf_convert"),
    "manifest of something else": (edit(format="other"), "is not a manifest of ddf_convert"),
    "newer version": (
        edit(format_version=artifact.FORMAT_VERSION + 1),
        r"written by a newer ddf_convert \(format \d+, this one reads \d+\); upgrade",
    ),
    "version that never was": (edit(format_version=0), "format_version"),
    "unknown field": (edit(surprise=1), "surprise: Extra inputs"),
    "no conversion": (edit(conversion=None), "conversion: "),
    "weights missing": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights truncated": (truncate, "it is incomplete"),
    "weights damaged": (flip, "SHA-256"),
    "weights of another model": (other_weights, r"\d+ missing \(conv1.*\); 1 of another shape \(fc\.weight is 3 and"),
    "weights are no safetensors": (not_weights, "model.safetensors is damaged"),
    "shared with nothing": (edit(shared={"a": "b"}), "b is not among the weights"),
    "unknown timm model": (timm_source(name="resnet5O"), "has no model 'resnet5O'"),
    "a model from the network": (timm_source(name="hf-hub:someone/something"), "has no model"),
    "reads a file": (timm_source(kwargs={"checkpoint_path": "x.pth"}), "checkpoint_path is not an argument"),
    "downloads": (timm_source(kwargs={"pretrained": True}), "pretrained is not an argument"),
    "unknown argument": (timm_source(kwargs={"color": 1}), "cannot build resnet10t"),
    "another width": (timm_source(kwargs={"num_classes": 6}), "2 of another shape"),
    "no such layer": (edit_step(color=1), "cannot be built"),
    "other channels": (edit_step(in_channels=10**9), "has in_channels"),
    "other kernel": (edit_step(kernel_size=10**6 + 1), "has kernel_size 3"),
    "other padding": (edit_step(padding=10**9), "has padding 1, where the record has 1000000000"),
    "other dilation": (edit_step(dilation=2), "has dilation 1, where the record has 2"),
    "other padding mode": (edit_step(padding_mode="reflect"), "has padding_mode zeros, where the record has reflect"),
    "huge squeeze": (edit_step(se_ratio=1e30), "cannot be built"),
    "wrong type": (edit_step(heads="many"), "cannot be built"),
    "weights that are integers": (recast("fc.weight", torch.int32), "fc.weight is int32 and should be float32"),
    "weights that are complex": (recast("fc.bias", torch.complex64), "fc.bias is complex64 and should be float32"),
    "weights of 8 bits": (recast("fc.bias", torch.float8_e4m3fn), "fc.bias is float8_e4m3fn and should be"),
    "weights that are truths": (recast("fc.bias", torch.bool), "fc.bias is bool and should be float32"),
    "a counter that is none": (
        recast("bn1.num_batches_tracked", torch.float32),
        "tracked is float32 and should be int64",
    ),
    "no padding": (
        edit_replacement("depthwise", GEOMETRY),
        "has padding 1, where the record has None",
    ),
    "a million experts": (
        edit_replacement("condconv", {**GEOMETRY, **PADDING, "groups": 1, "num_experts": 10**6}),
        "would become much larger than its weights are",
    ),
    "a million blocks": (timm_source(kwargs={"layers": [10**6]}), r"layers \[1000000\] is more than"),
    "many blocks": (timm_source(kwargs={"layers": [2500, 2500, 2500, 2500]}), "would become much larger"),
    "many blocks in all": (timm_source(kwargs={"layers": [2500] * 100}), "is more than a model of these weights"),
    "many classes": (timm_source(kwargs={"num_classes": 10**7}), "num_classes 10000000 is more than"),
    "a number that is none": (timm_source(kwargs={"drop_rate": float("nan")}), "which JSON does not have"),
    "a layer twice": (repeat_steps(2), "is replaced twice"),
    "a flag that is a number": (edit_step(bias=2**63), "bias must be true or false, got 9223372036854775808"),
    "a layer that is kept apart for nothing": (
        edit_record(apart=["conv1.0"]),
        "are kept apart from others, not conv1.0",
    ),
    "a call of two names": (edit_record(names=["layer1.interpolate()", "conv1.0"]), "has 2 names for it"),
    "very many layers": (repeat_steps(5_000), "it names 5,000 layers"),
    "a long option": (edit_step(combine="x" * 10**5), r"characters\)"),
    "a long name": (timm_source(name="x " * 10**5), r"characters\)"),
    "a long key": (edit(**{"x" * 10**5: 1}), r"characters\)"),
    "a number of very many digits": (write("manifest.json", b"9" * 10**5), "is not JSON"),
    "a version of many digits": (edit(format_version=10**4000), r"characters\)"),
    "a size of many digits": (
        edit(weights={"size": 10**4000, "sha256": "x"}),
        r"weights\.size",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_in_one_line(damaged, case):
    change, message = DAMAGE[case]
    change(damaged)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(damaged)
    assert "\n" not in str(caught.value)
    assert "damaged" in str(caught.value)  # the folder's name
    assert len(str(caught.value)) < 4500


def test_restore_is_all_or_nothing_with_foreign_weights(tmp_path):
    model, _ = small(1.0, None)
    for dtype in (torch.int32, torch.complex64, torch.float8_e5m2):
        save(model, tmp_path / "out")
        recast("0.bias", dtype)(tmp_path / "out")
        fresh = small(5.0, None)[0]
        before = Seen(fresh)
        with pytest.raises(ArtifactError, match="another dtype"):
            restore(fresh, tmp_path / "out")
        before.check(fresh)
        shutil.rmtree(tmp_path / "out")


class Seen:
    """All of a model: modules by identity, values by their bits, attributes, hooks and modes."""

    def __init__(self, model):
        self.parts = [(name, part, type(part)) for name, part in model.named_modules(remove_duplicate=False)]
        self.attributes = [copy.copy(vars(part)) for _, part, _ in self.parts]
        self.inner = [
            {key: list(value.items()) for key, value in vars(part).items() if isinstance(value, dict)}
            for _, part, _ in self.parts
        ]
        tensors = [*model.parameters(), *model.buffers()]
        self.tensors = [(t, t.data_ptr(), t.dtype, t.stride(), t.requires_grad, t.detach().clone()) for t in tensors]
        self.notes = copy.deepcopy([getattr(part, "notes", None) for _, part, _ in self.parts])

    def check(self, model):
        now = Seen(model)
        assert [(name, id(part), kind) for name, part, kind in now.parts] == [
            (name, id(part), kind) for name, part, kind in self.parts
        ]
        for one, other in zip(now.attributes, self.attributes, strict=True):
            assert list(one) == list(other)
            assert all(one[name] is other[name] for name in one)
        for one, other in zip(now.inner, self.inner, strict=True):
            assert {key: [(name, id(value)) for name, value in items] for key, items in one.items()} == {
                key: [(name, id(value)) for name, value in items] for key, items in other.items()
            }
        assert now.notes == self.notes
        for one, other in zip(now.tensors, self.tensors, strict=True):
            assert one[0] is other[0]
            assert one[1:5] == other[1:5]
            assert torch.equal(one[5].reshape(-1).view(torch.uint8), other[5].reshape(-1).view(torch.uint8))


class Noted(nn.Module):
    """With everything that a restore could leave changed; its own part of loading can be made to fail."""

    def __init__(self, fails=False):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1))
        self.up = nn.Upsample(scale_factor=2)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.notes = {"seen": [1, {"deep": 2}]}
        self.fails = fails
        self.body[1].train(False)
        self.body[0].weight.requires_grad_(False)
        self.body[0].register_forward_hook(print)

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        self.notes["seen"][1]["deep"] = 3
        self.notes["more"] = True
        self.attribute = 5
        if self.fails:
            raise KeyError("mine")

    def forward(self, x):
        return torch.nn.functional.interpolate(self.up(self.body(x)), scale_factor=2)


def fails_in(name, after=0):
    """Makes a step of restoring fail, once what comes before it is done."""

    def change(patch):
        target, attribute = name
        original = getattr(target, attribute)

        def failing(*args, **kwargs):
            if after:
                original(*args, **kwargs)
            raise RuntimeError("in the middle")

        patch.setattr(target, attribute, failing)

    return change


MIDDLE = {
    "set_extra_state": lambda patch: None,
    "replacement": fails_in((artifact, "apply_replacements")),
    "after the replacement": fails_in((artifact, "_cast")),
    "after the dtypes": fails_in((artifact, "_cast"), after=1),
    "load_state_dict": fails_in((nn.Module, "load_state_dict")),
    "after load_state_dict": fails_in((nn.Module, "load_state_dict"), after=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", MIDDLE)
def test_restore_that_fails_in_the_middle_changes_nothing(tmp_path, monkeypatch, place, dtype):
    image = torch.randn(1, 3, 20, 20)
    model = shaken(convert(Noted(), example_input=image, upsample=True)).to(dtype)
    assert len(recorded(model).replaced) == 3
    save(model, tmp_path / "out")
    fresh = Noted(fails=place == "set_extra_state")
    before = Seen(fresh)
    with monkeypatch.context() as patch:
        if place == "replacement":  # the sketch is converted too, and before
            calls, apply = [], artifact.apply_replacements

            def second(*args):
                calls.append(apply(*args))
                if len(calls) == 2:
                    raise RuntimeError("in the middle")
                return calls[-1]

            patch.setattr(artifact, "apply_replacements", second)
        else:
            MIDDLE[place](patch)
        with pytest.raises(ArtifactError, match=r"out: what it records cannot be done to Noted: (Runtime|Key)Error: "):
            restore(fresh, tmp_path / "out")
    before.check(fresh)
    if place != "set_extra_state":
        assert same_state(restore(fresh, tmp_path / "out"), model)


def test_a_ctrl_c_in_the_middle_changes_nothing(tmp_path, monkeypatch):
    save(small(1.0, None)[0], tmp_path / "out")
    fresh = small(5.0, None)[0]
    before = Seen(fresh)

    def interrupted(*args, **kwargs):
        nn.init.zeros_(fresh[0].weight)
        raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "load_state_dict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(fresh, tmp_path / "out")
    before.check(fresh)


def test_load_original_is_all_or_nothing(tmp_path, monkeypatch):
    save(small(1.0, None)[0], tmp_path / "out", original=small(1.0, None)[0].half())
    fresh = small(5.0, None)[0]
    before = Seen(fresh)
    with monkeypatch.context() as patch:
        fails_in((nn.Module, "load_state_dict"), after=1)(patch)
        with pytest.raises(ArtifactError, match="in the middle"):
            artifact.load_original(tmp_path / "out", fresh)
    before.check(fresh)
    assert artifact.load_original(tmp_path / "out", fresh)[0].weight.dtype == torch.float16


def test_a_damaged_report_stands_in_no_models_way(damaged, model):
    (damaged / "report.json").write_text("?")
    assert same_state(load(damaged), model)


def test_random_damage_to_the_manifest_is_refused_or_harmless(damaged, model):
    generator = random.Random(0)
    original = (damaged / "manifest.json").read_bytes()
    refused = 0
    for _ in range(60):
        data = bytearray(original)
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.choice(b'0179"{}[],:az\xff ')
        (damaged / "manifest.json").write_bytes(data)
        try:
            loaded = load(damaged)
        except ArtifactError:
            refused += 1
        else:
            assert same_state(loaded, model)
    assert refused > 20


@pytest.mark.parametrize("change", ["another model", "already converted", "meta device"])
def test_restore_into_the_wrong_model_changes_nothing(saved, change):
    wrong = timm.create_model("resnet14t" if change == "another model" else SMALL, num_classes=5)
    if change == "already converted":
        wrong = convert(wrong, example_input=IMAGE)
    if change == "meta device":
        wrong = wrong.to("meta")
    modules, state = dict(wrong.named_modules()), {k: v.clone() for k, v in wrong.state_dict().items()}
    message = {"another model": "not fit", "already converted": "already converted", "meta device": "meta device"}
    with pytest.raises(ArtifactError, match=message[change]):
        restore(wrong, saved)
    assert dict(wrong.named_modules()) == modules
    assert change == "meta device" or all(torch.equal(state[k], v) for k, v in wrong.state_dict().items())


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(UsageError, match="weight is on the meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "out")
    assert os.listdir(tmp_path) == []


# --- places that cannot be written ---


def place_file(path):
    path.write_text("")
    return path


def place_under_file(path):
    path.write_text("")
    return path / "deeper" / "out"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (place_file, "is a file"),
        (place_under_file, "is a file"),
        (lambda path: path / ("x" * 300), "cannot write to .*name too long"),
        (lambda path: path / "nul\0byte", "cannot write to"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, place, message, model):
    path = place(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (artifact.check_writable, lambda path: save(model, path)):
        with pytest.raises(ArtifactError, match=f"(?i){message}"):
            attempt(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_permission(tmp_path, model, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuse)  # root may write anywhere, so chmod proves nothing
    for attempt in (artifact.check_writable, lambda path: save(model, path)):
        with pytest.raises(ArtifactError, match=r"cannot write to .*out: Permission denied; choose another folder"):
            attempt(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_check_writable_leaves_nothing_and_save_makes_parents(tmp_path, model):
    artifact.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    save(model, tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]


# --- interruptions ---


class Killed(BaseException):
    """As if the power went."""


def killed_at(count, monkeypatch):
    """Makes the ``count``-th step of writing the last one, with no cleaning up after it."""
    steps = {"left": count}

    def interrupted(call):
        def wrapped(*args, **kwargs):
            if steps["left"] == 0:
                raise Killed
            steps["left"] -= 1
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(atomic.os, "replace", interrupted(os.replace))
    monkeypatch.setattr(atomic.os, "rename", interrupted(os.rename))
    monkeypatch.setattr(atomic.os, "fsync", interrupted(os.fsync))
    monkeypatch.setattr(artifact.safetensors.torch, "save_file", interrupted(safetensors.torch.save_file))
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *args, **kwargs: None)


def small(value, report):
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    nn.init.constant_(model[0].weight, value)
    return model, {"value": report}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("second_report", [True, False])
def test_interrupted_at_any_moment_it_is_old_or_new(tmp_path, existing, second_report):
    """Killed at each step in turn; read after it; and saved again after it."""
    old, new, third = 1.0, 2.0, 3.0
    seen = set()
    for count in range(100):
        path = tmp_path / str(count)
        if existing:
            model, report = small(old, old)
            save(model, path, report=report)
        model, report = small(new, new)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(count, patch)
            try:
                save(model, path, report=report if second_report else None)
                done = True
            except Killed:
                done = False
        copied = shutil.copytree(path, tmp_path / f"{count} again") if path.exists() else None
        if not path.exists():
            assert not existing
            found = None
        else:
            found = restore(nn.Sequential(nn.Conv2d(3, 2, 1)), path)[0].weight.mean().item()
            manifest = read_manifest(path)
            if manifest.report is not None:
                assert json.loads((path / "report.json").read_text()) == {"value": found}
        assert found in ({old, new} if existing else {None, new})
        seen.add(found)
        if copied:  # a save that meets an interrupted one, and is interrupted in turn before its own manifest
            with pytest.MonkeyPatch.context() as patch:
                killed_at(1, patch)
                with pytest.raises(Killed):
                    save(small(third, third)[0], copied)
            assert restore(nn.Sequential(nn.Conv2d(3, 2, 1)), copied)[0].weight.mean().item() in (found, third)
            save(small(third, third)[0], copied)
            assert restore(nn.Sequential(nn.Conv2d(3, 2, 1)), copied)[0].weight.mean().item() == third
        if done:
            break
    assert done
    assert found == new
    assert len(seen) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, model, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", full)
    with pytest.raises(DDFError, match=r"could not write .*out: No space left on device"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_files_are_as_readable_as_any_other(tmp_path, model):
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    save(model, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_saving_over_an_artifact_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        model, report = small(value, value)
        save(model, tmp_path / "out", report=report)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors", "report.json"]
    save(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


# --- foreign weights ---


class Trap:
    """Pickled, it runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def with_prefix(state, prefix="module."):
    return {f"{prefix}{name}": value for name, value in state.items()}


def zeros(state):
    """Other weights that fit as well."""
    return {name: torch.zeros_like(value) for name, value in state.items()}


def adam(state):
    """An optimizer's state: by number, with tensors of the weights' shapes under names of its own."""
    moments = {
        number: {"step": torch.tensor(1.0), "exp_avg": value} for number, value in enumerate(zeros(state).values())
    }
    return {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]}


def averaged_model(state):
    """What torch.optim.swa_utils.AveragedModel writes."""
    return {"n_averaged": torch.tensor(5), **with_prefix(state)}


def lightning(state):
    return {
        "pytorch-lightning_version": "2.6.0",
        "state_dict": {**with_prefix(state, "model."), "loss.weight": torch.ones(7)},
        "optimizer_states": [adam(state)],
        "hyper_parameters": {"lr": 0.1, "data": Path("images"), "arguments": argparse.Namespace(seed=0)},
        "callbacks": {"checkpoint": {"best": torch.tensor(0.5), "history": collections.deque([1, 2])}},
    }


# What a checkpoint is made of, and what a warning says of it; None: it says nothing.
WRAPPINGS = {
    "plain": (lambda state: state, None),
    "state_dict": (
        lambda state: {"state_dict": state, "epoch": 3},
        "took the weights under 'state_dict'; left out epo",
    ),
    "model": (lambda state: {"model": state}, "under 'model'"),
    "module.": (with_prefix, "took 'module.' off"),
    "both": (lambda state: {"state_dict": with_prefix(state)}, "under 'state_dict'; took 'module.' off"),
    "epoch": (
        lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": adam(state)},
        "took the weights under 'model_state_dict'; left out epoch, optimizer_state_dict",
    ),
    "net": (lambda state: {"net": state, "acc": 93.1}, "under 'net'"),
    "params": (lambda state: {"params": state}, "under 'params'"),
    "params_ema": (lambda state: {"params": zeros(state), "params_ema": state}, "'params' would fit too"),
    "state_dict_ema": (lambda state: {"state_dict": zeros(state), "state_dict_ema": state}, "under 'state_dict_ema'"),
    "model_ema": (lambda state: {"model": zeros(state), "model_ema": state}, "under 'model_ema'"),
    "an EMA of another model": (
        lambda state: {"model": state, "model_ema": {"odd": torch.ones(2)}},
        "took the weights under 'model'; left out model_ema",
    ),
    "teacher": (lambda state: {"teacher": state, "student": {"small": torch.ones(2)}}, "under 'teacher'"),
    "timm's order": (lambda state: {"best": zeros(state), "state_dict": state}, "'best' would fit too"),
    "the same twice": (lambda state: {"a": state, "b": copy.deepcopy(state)}, "under 'a'"),
    "nested": (lambda state: {"run": {"model": {"weights": state}}}, "under 'run.model.weights'"),
    "in a tuple": (lambda state: (state, 3), "under '0'"),
    "itself": (lambda state: holding_itself({"model": state}), "under 'model'"),
    "compiled": (lambda state: with_prefix(state, "_orig_mod."), "took '_orig_mod.' off"),
    "compiled DDP": (lambda state: with_prefix(state, "module._orig_mod."), "took 'module._orig_mod.' off"),
    "parts compiled": (
        lambda state: {name.replace(".", "._orig_mod.", 1): value for name, value in state.items()},
        "took '_orig_mod.' off",
    ),
    "SWA": (averaged_model, "took 'module.' off"),
    "lightning": (lightning, "under 'state_dict'; took 'model.' off their names; left out pytorch-lightning_version"),
    "lightning with EMA": (
        lambda state: {"state_dict": {**with_prefix(zeros(state), "net."), **with_prefix(state, "ema.module.")}},
        "took 'ema.module.' off",
    ),
    "momentum by name": (lambda state: {"model": state, "momentum": zeros(state)}, "left out momentum"),
    "a NumPy scalar": (
        lambda state: {"net": state, "acc": np.float64(93.1), "epoch": np.int64(3), "ok": np.bool_(True)},
        "left out acc, epoch, ok",
    ),
    "a NumPy scalar among them": (lambda state: {**state, "acc": np.float32(93.1)}, "left out acc"),
    "a NumPy array": (lambda state: {"net": state, "curve": np.ones(3)}, "left out curve"),
    "dates and counts": (
        lambda state: {
            "net": state,
            "date": datetime.datetime(2026, 1, 1),
            "counts": collections.defaultdict(list, {"a": [1]}),
            "names": {"a", "b"},
        },
        "left out date, counts, names",
    ),
}


def holding_itself(content):
    content["self"] = content
    return content


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_checkpoints_of_torch(wrapping, form, tmp_path, caplog):
    source, target = shaken(net.bottleneck(net.conv())), net.bottleneck(net.conv())
    make, message = WRAPPINGS[wrapping]
    allowed = set(torch.serialization.get_safe_globals())
    file = tmp_path / "weights.pth.tar"
    torch.save(make(source.state_dict()), file, _use_new_zipfile_serialization=form == "zip")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(target, file)
    assert same_state(source, target)
    if message is None:
        assert not caplog.messages
    else:
        assert len(caplog.messages) == 1
        assert message in caplog.messages[0]
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_old_checkpoints_lack_the_counters_of_batch_norm(tmp_path):
    source, target = net.bottleneck(net.conv()), net.bottleneck(net.conv())
    old = {name: value for name, value in source.state_dict().items() if "num_batches_tracked" not in name}
    assert len(old) < len(source.state_dict())
    torch.save(old, tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    assert same_state(source, target)


def test_a_wrapped_model_takes_the_weights_of_a_bare_one(tmp_path):
    source, target = shaken(net.bottleneck(net.conv())), nn.DataParallel(net.bottleneck(net.conv()))
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    assert same_state(source, target.module)


def test_what_repeats_itself_without_end_is_looked_at_once(tmp_path):
    source = shaken(nn.Conv2d(3, 4, 3))
    bomb = {}
    for _ in range(60):
        bomb = {"a": bomb, "b": bomb}
    torch.save({"bomb": bomb, "model": source.state_dict()}, tmp_path / "weights.pth")
    target = nn.Conv2d(3, 4, 3)
    load_checkpoint(target, tmp_path / "weights.pth")
    assert same_state(source, target)


@pytest.mark.parametrize("name", ["weights.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_checkpoints_in_safetensors(name, prefix, tmp_path, caplog):
    source, target = shaken(net.bottleneck(net.conv())), net.bottleneck(net.conv())
    safetensors.torch.save_file(with_prefix(source.state_dict(), prefix), tmp_path / name)
    load_checkpoint(target, str(tmp_path / name))
    assert same_state(source, target)
    assert [f"took {prefix!r} off" in message for message in caplog.messages] == ([True] if prefix else [])


def zip_bomb(path):
    """A checkpoint of some hundred kilobytes that takes hundreds of megabytes once it is read."""
    torch.save({"weight": torch.zeros(1)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
                for _ in range(64 if name.endswith("data/0") else 0):
                    member.write(bytes(2**20))


def overlapping(path):
    """Stored, but two entries of the directory share the same bytes."""
    torch.save({"weight": torch.zeros(10**5)}, path)
    content = path.read_bytes()
    start = content.index(b"PK\x01\x02")
    end = content.rindex(b"PK\x06\x06") if b"PK\x06\x06" in content else content.rindex(b"PK\x05\x06")
    with zipfile.ZipFile(path) as archive:
        count = len(archive.infolist())
    directory = content[start:end] * 3
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 3 * count, 3 * count, len(directory), start, 0)
    path.write_bytes(content[:start] + directory + tail)


def truncated(path, **options):
    torch.save({"weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4)}, path, **options)
    path.write_bytes(path.read_bytes()[:-300])


def tar_file(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "storages")


def conv_state(**changes):
    return {**nn.Conv2d(3, 4, 3).state_dict(), **changes}


BAD_CHECKPOINTS = {
    "zip bomb": ("x.pth", zip_bomb, r"a compressed archive of 67,\d{3},\d{3} bytes"),
    "overlapping": ("x.pth", overlapping, "a compressed archive of"),
    "truncated zip": ("x.pth", truncated, "it is incomplete: the directory at its end"),
    "truncated legacy": (
        "x.pth",
        lambda path: truncated(path, _use_new_zipfile_serialization=False),
        "incomplete or of",
    ),
    "a pipe": ("x.pth", os.mkfifo, "x.pth: is no regular file"),
    "a device": ("x.pth", lambda path: path.symlink_to("/dev/zero"), "x.pth: is no regular file"),
    "a web page": ("x.pth", lambda path: path.write_text("\n<!DOCTYPE html><html>"), "it is a web page"),
    "git-lfs": (
        "x.safetensors",
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a Git LFS pointer and not the file itself; run git lfs pull",
    ),
    "an index": (
        "model.safetensors.index.json",
        lambda path: path.write_text('{"metadata": {}, "weight_map": {}}'),
        "the index of weights in several files",
    ),
    "one of several files": (
        "model-00002-of-00003.safetensors",
        lambda path: safetensors.torch.save_file({"bias": torch.zeros(4)}, path),
        r"1 missing \(weight\); the file is one part of several",
    ),
    "gzip": ("x.pth.gz", lambda path: path.write_bytes(gzip.compress(b"x")), "compressed with gzip; unpack it"),
    "tar": ("x.pth.tar", tar_file, "a tar archive; unpack"),
    "npz": ("x.npz", lambda path: np.savez(path, weight=np.ones(3)), "a zip file that torch.save did not write"),
    "protocol 4": ("x.pth", lambda path: torch.save(conv_state(), path, pickle_protocol=4), "not of protocol 2"),
    "two that fit": (
        "x.pth",
        lambda path: torch.save({"student": conv_state(), "teacher": conv_state(bias=torch.ones(4))}, path),
        "several mappings that fit Conv2d: 'student' and 'teacher'; save the one",
    ),
    "two prefixes that fit": (
        "x.pth",
        lambda path: torch.save({**with_prefix(conv_state(), "a."), **with_prefix(conv_state(), "b.")}, path),
        "several mappings that fit Conv2d: prefix 'a.' and prefix 'b.'",
    ),
    "an optimizer's state alone": (
        "x.pth",
        lambda path: torch.save({"optimizer": conv_state()}, path),
        "not a checkpoint",
    ),
    "the nearest of several": (
        "x.pth",
        lambda path: torch.save({"other": {"a": torch.ones(1)}, "net": with_prefix({"bias": torch.ones(4)})}, path),
        r"x.pth \('net' with prefix 'module.'\) does not fit Conv2d: 1 missing \(weight\)",
    ),
    "integers": (
        "x.pth",
        lambda path: torch.save(conv_state(bias=torch.zeros(4, dtype=torch.int8)), path),
        "bias is int8 and should be float32",
    ),
    "complex": (
        "x.pth",
        lambda path: torch.save(conv_state(bias=torch.zeros(4, dtype=torch.complex64)), path),
        "bias is complex64 and should be float32",
    ),
    "no data": ("x.pth", lambda path: torch.save(conv_state(bias=torch.zeros(4, device="meta")), path), "has no data"),
    "sparse": ("x.pth", lambda path: torch.save(conv_state(bias=torch.zeros(4).to_sparse()), path), "bias is sparse"),
    "code beside the weights": (
        "x.pth",
        lambda path: torch.save({"net": conv_state(), "loss": nn.L1Loss()}, path),
        r"holds code \(torch\.nn\.modules\.loss\.L1Loss\), which is never run",
    ),
    "code that looks like data": (
        "x.pth",
        lambda path: torch.save({"net": conv_state(), "acc": [np.float64(1), Trap(path.parent / "ran")]}, path),
        r"holds code \((posix|nt)\.system\)",
    ),
    "escapes": ("x.pth", lambda path: torch.save({"\x1b[31m" + "x" * 10**5: torch.ones(1)}, path), r"\(\?\[31mx{75}"),
    "absent": ("x.pth", lambda path: None, "no such file"),
    "folder": ("x.pth", lambda path: path.mkdir(), "is a folder"),
    "garbage": ("x.pth", lambda path: path.write_bytes(b"garbage"), "cannot be read as a checkpoint"),
    "empty": ("x.pth", lambda path: path.write_bytes(b""), "cannot be read as a checkpoint"),
    "bad safetensors": ("x.safetensors", lambda path: path.write_bytes(b"\xff" * 20), "cannot be read as a checkpoint"),
    "code in a zip": ("x.pth", lambda path: torch.save({"a": Trap(path.parent / "ran")}, path), "holds code"),
    "code in a pickle": (
        "x.pth",
        lambda path: path.write_bytes(pickle.dumps({"a": Trap(path.parent / "ran")}, protocol=2)),
        "holds code",
    ),
    "a whole model": ("x.pth", lambda path: torch.save(nn.Linear(1, 1), path), "holds code"),
    "not weights": ("x.pth", lambda path: torch.save({"state_dict": {"a": 1}}, path), "'a' is not a tensor"),
    "one tensor": ("x.pth", lambda path: torch.save(torch.zeros(2), path), "checkpoint"),
    "another model": (
        "x.pth",
        lambda path: torch.save(nn.Conv2d(3, 2, 3).state_dict() | {"extra": torch.zeros(1)}, path),
        r"does not fit Conv2d: 1 not in the model \(extra\); 2 of another shape \(weight is 2x3x3x3 and should be 4x",
    ),
    "half of it": ("x.pth", lambda path: torch.save({"bias": torch.zeros(4)}, path), r"1 missing \(weight\)"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_checkpoints_that_are_refused(case, tmp_path):
    name, make, message = BAD_CHECKPOINTS[case]
    make(tmp_path / name)
    model = nn.Conv2d(3, 4, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=message) as caught:
        load_checkpoint(model, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    assert "weights_only" not in "".join(traceback.format_exception(caught.value))  # torch's advice to read it unsafely
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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


def test_a_model_that_folds_pixels_into_channels_is_timms_too(tmp_path):
    folded = convert(timm.create_model("tresnet_m", num_classes=3), example_input=IMAGE, include="body.layer4.0.conv2*")
    assert save(folded, tmp_path / "folded").source == TimmSource(name="tresnet_m", kwargs={"num_classes": 3})
