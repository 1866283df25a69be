"""Runs that are stopped, killed and damaged go on to the same weights, bit by bit."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from support import training_runs as runs
from support.training_runs import OPENING, STEPS, distance, equal, finetune, weights

from ddf_convert.errors import UsageError
from ddf_convert.training import trainer
from ddf_convert.training.signals import Interruption, signals_noted


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.prepare(tmp_path_factory.mktemp("survival"))


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nothing happened to."""
    runs.enter(place)
    outcome = finetune("whole", model="normed", data="tinyruns:photos", checkpoint_every=2)
    assert outcome.finished
    assert outcome.steps == STEPS
    return place / "whole"


@pytest.fixture(scope="module")
def killed(place: Path) -> Path:
    """The same run, stopped in the middle of its first stage, and killed in the middle of the second."""
    runs.enter(place)
    arguments = runs.command("killed", "--checkpoint-every", "2", model="normed", data="tinyruns:photos")

    # SIGTERM in the third step.
    stopped = runs.start(*arguments, "--json", SIGNAL="SIGTERM", SIGNAL_AT=f"{OPENING['train'] + 2 * 8 + 3}:0")
    assert stopped.codes == [0], stopped.stderr
    outcome = json.loads(stopped.stdout)
    assert (outcome["finished"], outcome["steps"]) == (False, 3)
    assert "Traceback" not in stopped.stderr

    # kill -9 in the second epoch of the second stage: its evaluations read images in another data set.
    reads = OPENING["train"] + 3 * 8 + 48 + 2 * 8 + 5
    done = runs.start(*arguments, "--resume", SIGNAL="SIGKILL", SIGNAL_AT=f"{reads}:0")
    assert done.codes == [-signal.SIGKILL]
    assert "going on from step 3 of killed" in done.stderr
    assert [int(each.name[5:]) for each in sorted(Path("killed/checkpoints").iterdir())] == [12, 14]
    return place / "killed"


@pytest.fixture(autouse=True)
def _here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.enter(place)
    runs.without_pictures(monkeypatch)


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_ends_with_the_same_weights(whole: Path, killed: Path) -> None:
    shutil.copytree(killed, "resumed")
    outcome = finetune("resumed", model="normed", data="tinyruns:photos", checkpoint_every=2, resume=True)
    assert (outcome.finished, outcome.steps) == (True, STEPS)
    for name in ("last", "best"):
        assert equal(weights(f"resumed/{name}"), weights(whole / name)), name
    assert log(Path("resumed")) == log(whole)


@pytest.mark.slow
def test_a_truncated_checkpoint_is_left_out_for_the_one_before(
    whole: Path, killed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(killed, "damaged")
    state = Path("damaged/checkpoints/step-00000014/state.pt")
    state.write_bytes(state.read_bytes()[:-100])
    finetune("damaged", model="normed", data="tinyruns:photos", checkpoint_every=2, resume=True)
    assert "step-00000014" in caplog.text
    assert "going on from the checkpoint of step 12" in caplog.text
    assert equal(weights("damaged/last"), weights(whole / "last"))


@pytest.mark.slow
def test_a_stop_during_the_evaluation_and_another_in_the_last_step(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNAL", "SIGTERM")
    arguments: dict[str, Any] = {"model": "normed", "data": "tinyruns:photos", "checkpoint_every": 100}
    monkeypatch.setenv("SIGNAL_AT", f"{OPENING['val'] + 3}:0")  # of the images that are evaluated before training
    outcome = finetune("twice", **arguments)
    assert (outcome.finished, outcome.steps, outcome.before) == (False, 0, None)
    monkeypatch.setenv("SIGNAL_AT", f"{OPENING['train'] + 45}:0")  # in the last step of the first epoch
    outcome = finetune("twice", **arguments, resume=True)
    assert (outcome.finished, outcome.steps) == (False, 6)
    monkeypatch.delenv("SIGNAL_AT")
    assert finetune("twice", **arguments, resume=True).finished
    assert equal(weights("twice/last"), weights(whole / "last"))
    assert log(Path("twice")) == log(whole)
    # There is nothing left to do, and that is no error.
    assert finetune("twice", **arguments, resume=True).finished
    assert equal(weights("twice/last"), weights(whole / "last"))


@pytest.mark.slow
def test_a_row_of_the_log_reaches_over_an_interruption(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_ROWS_PER_EPOCH", 2)
    arguments: dict[str, Any] = {"data": "tinyruns:photos", "changes": {"steps": 6}}
    finetune("long", **arguments)
    monkeypatch.setenv("SIGNAL", "SIGTERM")
    monkeypatch.setenv("SIGNAL_AT", f"{OPENING['train'] + 3 * 8 + 4}:0")
    assert finetune("short", **arguments).steps == 4
    monkeypatch.delenv("SIGNAL_AT")
    assert finetune("short", **arguments, resume=True).finished
    assert [row["step"] for row in log(Path("long")) if row["kind"] == "train"] == [3, 6, 9, 12]
    assert log(Path("short")) == log(Path("long"))


@pytest.mark.slow
def test_another_run_does_not_go_on_here(whole: Path) -> None:
    arguments: dict[str, Any] = {"model": "normed", "data": "tinyruns:photos", "resume": True}
    shutil.copy("test.yaml", "other.yaml")
    Path("other.yaml").write_text(Path("test.yaml").read_text().replace("lr: 0.05", "lr: 0.06"))
    shutil.copytree("data", "more")
    for changed, words in (
        ({"seed": 1}, "seed 0.*and this is 1.*--seed"),
        ({"data": "more"}, "data tinyruns:photos.*--data"),
        ({"recipe": "other.yaml"}, "stages.0.optimizer.lr was 0.05 and is 0.06"),
        ({"changes": {"batch_size": 2}}, "stages.0.batch_size was 8 and is 2"),
        ({"changes": {"epochs": 5}}, "stages.0.epochs was 1 and is 5"),
        ({"on_broken": "skip"}, "--on-broken"),
        ({"model": "plain"}, "weights"),
    ):
        with pytest.raises(UsageError, match=words):
            finetune("whole", **{**arguments, **changed})
    with pytest.raises(UsageError, match="already holds a run: --resume goes on with it"):
        finetune("whole", **{**arguments, "resume": False})
    with pytest.raises(UsageError, match="not empty, and holds no run"):
        finetune("data", **arguments)
    assert distance(weights("whole/last"), weights("whole/last")) == 0


def test_a_second_ctrl_c_stops_at_once_unless_it_is_the_first_one_again() -> None:
    now = 0.0
    interruption = Interruption(clock=lambda: now)
    interruption.note(signal.SIGINT)
    assert interruption.requested
    now = 0.5  # torchrun's copy
    interruption.note(signal.SIGINT)
    now = 5.0
    interruption.note(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        interruption.note(signal.SIGINT)


def test_handlers_are_put_back_and_only_the_main_thread_has_them() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals_noted() as interruption:
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested
    assert signal.getsignal(signal.SIGTERM) is before
    seen = []

    def elsewhere() -> None:
        with signals_noted() as other:
            seen.append(other.requested)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


def log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, without what was timed."""
    from dataclasses import asdict

    from ddf_convert.training.logs import read

    timed = {"seconds", "images_per_s"}
    return [{key: value for key, value in asdict(row).items() if key not in timed} for row in read(run / "log.csv")]
