"""Damaged and hostile artifacts are refused in one line."""

import os
import random
import shutil

import pytest
import safetensors.torch
import torch
from support.artifacts import SMALL, edit, edit_manifest, recast, same_state
from torch import nn

from ddf_convert.artifacts import artifact, atomic
from ddf_convert.artifacts.artifact import load, save
from ddf_convert.errors import ArtifactError, UsageError


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


def edit_step(**options):
    return edit_manifest(lambda content: content["conversion"]["replaced"][0]["replacement"]["options"].update(options))


def edit_record(**changes):
    return edit_manifest(lambda content: content["conversion"]["replaced"][0].update(changes))


def edit_replacement(layer, options):
    changes = {"layer": layer, "options": options, "mix": None}
    return edit_manifest(lambda content: content["conversion"]["replaced"][0]["replacement"].update(changes))


def repeat_steps(count):
    def repeat(content):
        step = content["conversion"]["replaced"][0]
        content["conversion"]["replaced"] = [
            step if count == 2 else {**step, "names": [f"layer{number}"]} for number in range(count)
        ]

    return edit_manifest(repeat)


PADDING = {"padding": 1, "padding_mode": "zeros"}
GEOMETRY = {"in_channels": 24, "out_channels": 32, "kernel_size": 3, "stride": 1, "dilation": 1, "bias": False}


def timm_source(**fields):
    return edit(source={"kind": "timm", "name": SMALL, "kwargs": {}, **fields})


DAMAGE = {
    "no folder": (shutil.rmtree, "no such folder"),
    "a file": (lambda path: shutil.rmtree(path) or path.write_text(""), "is a file, not a folder"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "not an artifact of ddf_convert"),
    "manifest cut off": (write("manifest.json", b'{"format": "ddf'), "is not JSON"),
    "manifest nested deeply": (write("manifest.json", b"[" * 100_000), "is not JSON"),
    "manifest is a list": (write("manifest.json", b"[]"), "is not a manifest of ddf_convert"),
    "manifest of something else": (edit(format="other"), "is not a manifest of ddf_convert"),
    "newer version": (
        edit(format_version=artifact.FORMAT_VERSION + 1),
        r"written by a newer ddf_convert \(format \d+, this one reads \d+\); upgrade",
    ),
    "version that never was": (edit(format_version=0), "format_version"),
    "unknown field": (edit(surprise=1), "surprise: Extra inputs"),
    "weights missing": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "weights truncated": (truncate, "it is incomplete"),
    "weights damaged": (flip, "SHA-256"),
    "weights of another model": (other_weights, r"\d+ missing \(conv1.*\); 1 of another shape \(fc\.weight is 3 and"),
    "weights are no safetensors": (not_weights, "model.safetensors is damaged"),
    "shared with nothing": (edit(shared={"a": "b"}), "b is not among the weights"),
    "unknown timm model": (timm_source(name="resnet5O"), "has no model 'resnet5O'"),
    "a model from the network": (timm_source(name="hf-hub:someone/something"), "has no model"),
    "reads a file": (timm_source(kwargs={"checkpoint_path": "x.pth"}), "checkpoint_path is not an argument"),
    "unknown argument": (timm_source(kwargs={"color": 1}), "cannot build resnet10t"),
    "another width": (timm_source(kwargs={"num_classes": 6}), "2 of another shape"),
    "no such layer": (edit_step(color=1), "cannot be built"),
    "other channels": (edit_step(in_channels=10**9), "has in_channels"),
    "other padding mode": (edit_step(padding_mode="reflect"), "has padding_mode zeros, where the record has reflect"),
    "huge squeeze": (edit_step(se_ratio=1e30), "cannot be built"),
    "weights that are integers": (recast("fc.weight", torch.int32), "fc.weight is int32 and should be float32"),
    "weights of 8 bits": (recast("fc.bias", torch.float8_e4m3fn), "fc.bias is float8_e4m3fn and should be"),
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


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(UsageError, match="weight is on the meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "out")
    assert os.listdir(tmp_path) == []
