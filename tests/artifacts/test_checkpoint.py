"""Checkpoints of other programs: found under any key and prefix, and read without running code."""

import argparse
import collections
import copy
import datetime
import os
import pickle
import struct
import tarfile
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from support import networks as net
from support.artifacts import same_state, shaken
from torch import nn

from ddf_convert.artifacts.artifact import load_checkpoint
from ddf_convert.errors import UsageError


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
    "module.": (with_prefix, "took 'module.' off"),
    "epoch": (
        lambda state: {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": adam(state)},
        "took the weights under 'model_state_dict'; left out epoch, optimizer_state_dict",
    ),
    "net": (lambda state: {"net": state, "acc": 93.1}, "under 'net'"),
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


IN_LEGACY_FORM = ("plain", "epoch", "a NumPy scalar", "dates and counts")  # with no types, and with types to replace


@pytest.mark.parametrize(
    ("wrapping", "form"), [*((each, "zip") for each in WRAPPINGS), *((each, "legacy") for each in IN_LEGACY_FORM)]
)
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
