"""Checkpoints: whole whatever happens, checked when they are read, the newest two kept."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddf_convert.errors import ArtifactError, DDFError
from ddf_convert.training.checkpoints import Checkpoints

FORK = multiprocessing.get_context("fork")


def state_of(step: int, size: int = 10) -> dict[str, Any]:
    return {"step": step, "weight": torch.full((size,), float(step))}


@pytest.fixture
def two(tmp_path: Path) -> Checkpoints:
    """Those of steps 1 and 2."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.write(state_of(step), step)
    return checkpoints


def test_a_state_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "nested": [{"a": (1, 2.5, "x", None, True)}, []],
        "half": torch.randn(3).bfloat16(),
        "nan": float("nan"),
    }
    checkpoints = Checkpoints(tmp_path / "new" / "folder")
    assert checkpoints.latest() is None
    checkpoints.write(state, 7)
    found = checkpoints.latest()
    assert found is not None
    read, step = found
    assert step == 7
    assert read.keys() == state.keys()
    assert isinstance(read["model"], OrderedDict)
    assert all(torch.equal(value, read["model"][name]) for name, value in state["model"].items())
    assert read["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    assert torch.equal(read["optimizer"]["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    assert torch.equal(read["random"], state["random"])
    assert (read["nested"], read["half"].dtype) == (state["nested"], torch.bfloat16)
    assert read["nan"] != read["nan"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"a": [np.float64(1.0)]}, r"state\['a'\]\[0\] is float64"),
        ({"a": {np.int64(3): 1}}, r"a key of state\['a'\] is int64"),
        ({"model": nn.Linear(1, 1)}, r"state\['model'\] is Linear"),
        ({"a": {1, 2}}, "is set"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(two, value, words):
    with pytest.raises(TypeError, match=words):
        two.write(value, 3)
    assert two.steps() == [1, 2]


def test_the_newest_two_are_kept(two):
    for step in (3, 100_000_000, 100_000_001):
        two.write(state_of(step), step)
        assert two.steps()[-1] == step
        assert len(two.steps()) == 2
    assert {entry.name for entry in two.folder.iterdir()} == {"step-100000000", "step-100000001"}


def test_a_run_that_was_resumed_before_its_end(two):
    two.write(state_of(9), 9)
    two.write(state_of(3), 3)  # resumed from 2, 9 being damaged, say
    assert two.steps() == [2, 3]


def test_a_step_written_again(two):
    two.write({"again": True}, 2)
    assert two.steps() == [1, 2]
    assert two.latest() == ({"again": True}, 2)


def _truncate(checkpoint: Path) -> None:
    file = checkpoint / "state.pt"
    file.write_bytes(file.read_bytes()[:-100])


def _flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "state.pt").write_bytes(content)


def _foreign(checkpoint: Path) -> None:
    """A file that holds what is not read without running code."""
    torch.save({"model": nn.Linear(1, 1)}, checkpoint / "state.pt")


def _protocol_4(checkpoint: Path) -> None:
    torch.save({"model": 1}, checkpoint / "state.pt", pickle_protocol=4)


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("truncated", _truncate, r"state\.pt is damaged or incomplete"),
    ("a bit", _flip, r"state\.pt is damaged: \S+ does not have its checksum"),
    ("no state", lambda checkpoint: (checkpoint / "state.pt").unlink(), r"state\.pt is missing"),
    ("foreign", _foreign, r"state\.pt cannot be read: it holds code \(torch\.nn\.modules\.linear\.Linear\)"),
    ("protocol 4", _protocol_4, r"state\.pt cannot be read: a pickle that is not of protocol 2"),
]


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damage_is_told_of_and_the_one_before_is_used(two, damage, words, caplog):
    damage(two.folder / "step-00000002")
    found = two.latest()
    assert found is not None
    assert (found[1], found[0]["step"]) == (1, 1)
    (message,) = caplog.messages
    assert "step-00000002" in message
    assert "going on from the checkpoint of step 1 instead" in message
    assert "save the model again" not in message
    assert "weights_only" not in message  # torch advises to read it unsafely
    caplog.clear()

    damage(two.folder / "step-00000001")
    with pytest.raises(ArtifactError, match=words) as caught:
        two.latest()
    assert all(name in str(caught.value) for name in ("step-00000001", "step-00000002"))
    assert "\n" not in str(caught.value)
    assert caplog.messages == []

    two.write(state_of(2), 2)  # over the damaged one
    found = two.latest()
    assert found is not None
    assert found[1] == 2


def test_leftovers_are_cleared(two):
    for place in (two.folder, two.folder / "step-00000002"):
        leftover = place / f".saving-{uuid.uuid4().hex}"
        leftover.mkdir()
        (leftover / "state.pt").write_bytes(b"half")
    assert two.steps() == [1, 2]
    found = two.latest()  # while another process writes, so it clears nothing
    assert found is not None
    assert len(list(two.folder.glob("**/.saving-*"))) == 2
    two.write(state_of(3), 3)
    assert list(two.folder.glob("**/.saving-*")) == []


def test_other_things_in_the_folder_stay(two):
    (two.folder / "notes.txt").write_text("mine")
    (two.folder / "step-last").mkdir()
    two.write(state_of(3), 3)
    assert two.steps() == [2, 3]
    assert (two.folder / "notes.txt").exists()
    assert (two.folder / "step-last").exists()


def _write_with_little_room(checkpoints: Checkpoints, results: Any) -> None:
    torch.set_num_threads(1)  # the threads of torch's loops do not outlive a fork
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpoints.write(state_of(3, size=100_000), 3)
    except Exception as error:
        results.put((isinstance(error, DDFError), str(error)))
    else:
        results.put((False, "written"))


def test_a_full_disk_harms_nothing(two):
    results = FORK.SimpleQueue()
    writer = FORK.Process(target=_write_with_little_room, args=(two, results))
    writer.start()
    writer.join(30)
    assert not results.empty(), writer.exitcode
    is_expected, message = results.get()
    assert is_expected, message
    assert "could not write" in message
    assert "File too large" in message
    assert "\n" not in message
    assert {entry.name for entry in two.folder.iterdir()} == {"step-00000001", "step-00000002"}
    found = two.latest()
    assert found is not None
    assert found[1] == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        Checkpoints(tmp_path / "file").write({}, 1)


def test_an_old_one_that_cannot_be_deleted_harms_nothing(two, monkeypatch):
    def fail(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError("busy")

    monkeypatch.setattr(shutil, "rmtree", fail)
    two.write(state_of(3), 3)
    assert two.steps() == [2, 3]  # what is left of the other does not look like a checkpoint
    found = two.latest()
    assert found is not None
    assert found[1] == 3


def _write_for_ever(checkpoints: Checkpoints) -> None:
    torch.set_num_threads(1)
    step = 2
    while True:
        step += 1
        checkpoints.write(state_of(step, size=200_000), step)


@pytest.mark.parametrize("round", range(2))
def test_killed_at_any_moment(two, round, caplog):
    writer = FORK.Process(target=_write_for_ever, args=(two,))
    writer.start()
    try:
        while two.steps()[-1] < 4 and writer.is_alive():
            time.sleep(0.001)
        time.sleep(0.026 * round)
    finally:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    found = two.latest()
    assert found is not None
    state, step = found
    assert step == two.steps()[-1] == state["step"]
    assert state["weight"].eq(step).all()
    assert caplog.messages == []  # none is half written, nor half deleted
    two.write(state_of(step + 1), step + 1)
    assert len(two.steps()) == 2
    assert list(two.folder.glob("**/.saving-*")) == []


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and forks of Unix")
