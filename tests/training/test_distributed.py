"""Two processes, as torchrun starts them, train as one does with twice the batches; one that fails ends both."""

from __future__ import annotations

import importlib
import json
import shutil
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from support import training_runs as runs
from support.training_runs import STEPS, distance, equal, finetune, weights

import ddf_convert as ddf
from ddf_convert.training import distributed
from ddf_convert.training.dataloader import evaluation_loader, image_settings
from ddf_convert.training.dataset import open_images
from ddf_convert.training.distributed import Processes, first_to_report
from ddf_convert.training.evaluation import EvaluationSettings, evaluate

ALONE = Processes(0, 1, torch.device("cpu"))

# Of features alone, in which the classifier gets no gradient; then of labels, with mixup.
RECIPE = runs.RECIPE.replace("batch_size: 8", "batch_size: 4").replace("trainable: new", "trainable: all")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.prepare(tmp_path_factory.mktemp("distributed"))
    (folder / "two.yaml").write_text(RECIPE.replace("accumulate: 2", "accumulate: 1"))
    (folder / "one.yaml").write_text(RECIPE.replace("epochs: 1", "epochs: 1\n    accumulate: 2"))
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path) -> None:
    runs.enter(place)


@pytest.mark.slow
def test_two_processes_train_as_one_and_stop_and_go_on_together(place: Path) -> None:
    arguments = runs.command("two", "--json", model="normed", data="tinyruns:photos", recipe="two.yaml")
    # SIGTERM reaches the second process alone, in the middle of the second stage.
    reads = 1 + 24 + 2 * 4 + 1
    stopped = runs.start(*arguments, processes=2, SIGNAL="SIGTERM", SIGNAL_AT=f"{reads}:1")
    assert stopped.codes == [0, 0], stopped.stderr
    assert (json.loads(stopped.stdout)["finished"], json.loads(stopped.stdout)["steps"]) == (False, 9)
    shutil.copytree("two", "moved")
    done = runs.start(*arguments, "--resume", processes=2)
    assert done.codes == [0, 0], done.stderr
    assert done.stderr.count("going on from step 9") == 1
    two = json.loads(done.stdout)
    assert (two["finished"], two["steps"]) == (True, STEPS)

    one = finetune("one", model="normed", data="tinyruns:photos", recipe="one.yaml")
    assert one.steps == STEPS
    before, after = weights("normed"), weights("one/last")
    assert distance(before, after) > 1e-2
    assert distance(after, weights("two/last")) < 2e-5
    assert one.last is not None
    assert two["last"]["images"] == one.last.images == runs.CLASSES * runs.VALIDATION  # 15: one process has one more
    assert two["last"]["agreement"] == pytest.approx(one.last.agreement)

    # One process that takes twice the batches can go on where two were stopped.
    assert finetune("moved", model="normed", data="tinyruns:photos", recipe="one.yaml", resume=True).finished
    assert distance(after, weights("moved/last")) < 2e-5
    # At the end of an epoch both have the statistics that are saved, and evaluate with them.
    module = importlib.import_module("tinyruns")
    model = ddf.restore(module.normed(), "two/last")
    images = open_images("data", "validation", True)
    loader = evaluation_loader(images, image_settings(model, runs.SIZE), 15)
    assert evaluate(model, loader, EvaluationSettings(ALONE)).loss == pytest.approx(two["last"]["loss"], rel=1e-5)
    # Until the end of an epoch each process has its own statistics of batch normalization: the checkpoint has them all.
    whole = runs.start(*[each if each != "two" else "whole" for each in arguments], processes=2)
    assert whole.codes == [0, 0], whole.stderr
    assert equal(weights("two/last"), weights("whole/last"))
    assert not torch.equal(weights("whole/last")["norm.running_mean"], before["norm.running_mean"])


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_and_is_told_once(place: Path) -> None:
    arguments = runs.command("failing", model="normed", data="tinyruns:photos", recipe="two.yaml")
    began = time.monotonic()
    failed = runs.torchrun(*arguments, BREAK_AT="14:1")
    assert failed.returncode == 1
    assert time.monotonic() - began < 60
    assert failed.stderr.count("error:") == 1, failed.stderr
    assert failed.stderr.count("the disk is gone") == 1


def test_what_all_find_wrong_is_told_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert first_to_report("alone")
    assert first_to_report("alone")
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    assert [first_to_report(words) for words in ("a", "b", "a", "b")] == [True, True, False, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # another attempt, with the same store
    assert first_to_report("a")
    monkeypatch.setattr(distributed, "_TIMEOUT_S", timedelta(seconds=0.1))
    monkeypatch.setenv("MASTER_PORT", "1")  # without a store it is better told twice than never
    assert first_to_report("a")


def test_one_process_needs_no_group() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.is_main
    assert torch.equal(ALONE.total(values), values)
    assert [each.tolist() for each in ALONE.gathered(values)] == [[1.0, 2.0]]
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
