"""A run is resumed with what it was begun with; what is not needed for that may be missing or damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from support import training_runs as runs
from support.training_runs import equal, finetune, weights
from torch import nn

from ddf_convert import cli
from ddf_convert.artifacts.lock import locked
from ddf_convert.errors import UsageError
from ddf_convert.recipes.parameters import parameter_groups
from ddf_convert.recipes.schema import Stage
from ddf_convert.training import fingerprint, resume, run_dir
from ddf_convert.training.checkpoints import Checkpoints
from ddf_convert.training.fingerprint import Entry
from ddf_convert.training.logs import read
from ddf_convert.training.run_dir import RunFolder
from ddf_convert.training.sampler import TrainingSampler
from ddf_convert.training.stage import StageState

RECIPE = """
name: short
stages:
  - {name: only, epochs: 2, batch_size: 16, optimizer: {opt: sgd, lr: 0.1}, augmentation: null}
"""
STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and images, and a run that ended; its last checkpoints are of step 4, in an epoch, and of 6, the end."""
    folder = runs.prepare(tmp_path_factory.mktemp("resume"))
    (folder / "short.yaml").write_text(RECIPE)
    assert go_on(resume=False).finished
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path) -> Path:
    """A copy of the run and its images, to be changed; it is the current folder."""
    runs.enter(place)
    for name in ("run", "data"):
        shutil.copytree(place / name, tmp_path / name)
    for name in ("plain", "short.yaml"):
        (tmp_path / name).symlink_to(place / name)
    os.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "event" not in request.node.name and "during" not in request.node.name:
        runs.without_pictures(monkeypatch)


def go_on(**more: Any) -> Any:
    arguments = {"own": "calm", "recipe": "short.yaml", "checkpoint_every": 2, "resume": True, **more}
    return finetune("run", **arguments)


def at_step_4() -> None:
    shutil.rmtree("run/checkpoints/step-00000006")


# --- what has to be the same ---


def _swap(one: str, other: str) -> None:
    Path(one).rename("aside")
    Path(other).rename(one)
    Path("aside").rename(other)


def _rename_class() -> None:
    for part in ("train", "val"):
        Path("data", part, "c1").rename(Path("data", part, "z1"))


def _swap_classes() -> None:
    for part in ("train", "val"):
        _swap(f"data/{part}/c0", f"data/{part}/c1")


def _exchange() -> None:
    """An image of the same size in bytes, last changed when the other was."""
    file = Path("data/train/c1/03.png")
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def _lose_the_list() -> None:
    _exchange()
    Path("run", fingerprint.FILE).write_bytes(b"")


DATA: list[tuple[str, Callable[[], object], str]] = [
    ("a class renamed", _rename_class, r"classes are not .* begun with: c1 missing, z1 new; put them back"),
    ("classes swapped", _swap_classes, r"data are not .* 42 exchanged \(train/c0/00.png, train/c0/01.png, .*\.\.\.\)"),
    ("an image exchanged", _exchange, r"data are not .*: 1 exchanged \(train/c1/03.png\); put"),
    ("an image added", lambda: shutil.copy("data/val/c0/00.png", "data/train/c0/new.png"), r"1 added \(train/c0/new"),
    ("an image moved", lambda: Path("data/val/c0/00.png").rename("data/train/c0/v.png"), r"1 added.*; 1 removed"),
    ("no validation part", lambda: shutil.rmtree("data/val"), r"15 removed \(val/c0/00.png"),
    ("no list", _lose_the_list, r"data.jsonl.gz is missing or damaged"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "words"), [case[1:] for case in DATA], ids=[case[0] for case in DATA])
def test_other_images_or_classes_are_refused(here: Path, change: Callable[[], object], words: str) -> None:
    change()
    before = contents(Path("run"))
    with pytest.raises(UsageError, match=words) as caught:
        go_on()
    assert "\n" not in str(caught.value)
    assert contents(Path("run")) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_copies_of_the_images_are_as_good(here: Path) -> None:
    shutil.copytree("data", "copy", copy_function=shutil.copyfile)  # other times
    _swap("data", "copy")
    assert go_on().finished


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"channels_last": True}, r"channels last False, and this is True \(--channels-last\)"),
    ({"seed": 1}, r"seed 0, and this is 1 \(--seed\)"),
    ({"validation": "data/val"}, r"validation None, and this is data/val \(--val-data\)"),
    ({"changes": {"lr": 0.2}}, r"stages.0.optimizer.lr"),
    ({"own": "plain"}, r"another architecture \(DIR or --model\)"),  # the rate of dropout
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_options_that_change_the_result_are_refused(here: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        go_on(**options)


def test_options_that_change_nothing_are_taken(here: Path) -> None:
    at_step_4()
    assert go_on(workers=1, checkpoint_every=100).steps == STEPS


def test_every_option_of_the_command_is_compared_noted_or_free() -> None:
    command: Any = typer.main.get_command(cli.app)
    options = {
        name
        for parameter in command.commands["finetune"].params
        for name in (parameter.opts if parameter.param_type_name == "option" else ["DIR"])
        if name.startswith("--") or name == "DIR"
    } - {"--help"}
    compared = {part for option in resume.DECISIVE.values() for part in option.split(" or ")}
    groups = [compared, set(resume.RECIPE), set(resume.NOTED), set(resume.FREE)]
    assert set().union(*groups) == options
    assert sum(map(len, groups)) == len(options)  # each in one of them


def test_whatever_decides_the_result_is_recorded_and_compared(here: Path) -> None:
    recorded = json.loads(Path("run/settings.json").read_text())
    run, another = Path("run"), [Entry("another")]
    assert resume.DECISIVE.keys() <= recorded.keys()
    resume.check_settings(run, recorded, recorded, [])
    for name in resume.DECISIVE:
        other = {**recorded, name: "something else" if name != resume.CLASS_NAMES else ["other"]}
        with pytest.raises(UsageError):
            resume.check_settings(run, other, recorded, another)
        older = {key: value for key, value in recorded.items() if key != name}
        resume.check_settings(run, older, recorded, [])


def test_a_run_of_an_earlier_version_goes_on_with_a_note(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at_step_4()
    file = Path("run/settings.json")
    settings = json.loads(file.read_text())
    new = (resume.DATA, resume.CLASS_NAMES, resume.ARCHITECTURE, resume.ENVIRONMENT, "teacher_weights", "preparation")
    file.write_text(json.dumps({name: value for name, value in settings.items() if name not in new}))
    Path("run", fingerprint.FILE).unlink()
    assert go_on().finished
    assert "run was begun by a version of ddf_convert that did not record the data" in capsys.readouterr().err
    assert {**json.loads(file.read_text()), "went_on": 0} == {**settings, "went_on": 0}
    _exchange()  # from now on it is compared
    with pytest.raises(UsageError, match="1 exchanged"):
        go_on()


def test_another_machine_is_noted(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("run/settings.json")
    settings = json.loads(file.read_text())
    settings[resume.ENVIRONMENT] |= {"torch": "1.0", "gpu": "A100", "processes": 4}
    file.write_text(json.dumps(settings))
    assert go_on().finished
    said = capsys.readouterr().err
    assert f"torch 1.0 -> {torch.__version__}" in said
    assert "gpu A100 -> none" in said
    assert "processes 4 -> 1" in said
    after = json.loads(file.read_text())
    assert after[resume.ENVIRONMENT] == settings[resume.ENVIRONMENT]
    assert [(each["step"], each[resume.ENVIRONMENT]["processes"]) for each in after["went_on"]] == [(STEPS, 1)]


# --- what is missing or damaged ---


def _overwrite(file: str, content: bytes) -> Callable[[], object]:
    return lambda: Path(file).write_bytes(content)


def _as_a_folder(file: str) -> Callable[[], object]:
    def change() -> None:
        Path(file).unlink()
        Path(file, "inside").mkdir(parents=True)

    return change


def _tensorboard() -> None:
    shutil.rmtree("run/tensorboard", ignore_errors=True)
    Path("run/tensorboard").write_text("mine")


DAMAGES: list[tuple[str, Callable[[], object], str | None]] = [
    ("a log of bytes", _overwrite("run/log.csv", b"\xff\xfe\x00"), "log.csv.damaged-1"),
    ("no log", lambda: Path("run/log.csv").unlink(), None),
    ("empty settings", _overwrite("run/settings.json", b""), "settings.json.damaged-1"),
    ("no settings", lambda: Path("run/settings.json").unlink(), None),
    ("a recipe of bytes", _overwrite("run/recipe.yaml", b"\xff\x00"), "recipe.yaml.damaged-1"),
    ("an empty list of images", _overwrite(f"run/{fingerprint.FILE}", b""), None),
    ("a file for events", _tensorboard, "tensorboard.damaged-1"),
    ("half a model", _overwrite("run/best/model.safetensors", b"half"), "best.damaged-1"),
    ("a model without manifest", lambda: Path("run/last/manifest.json").unlink(), "last.damaged-1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "aside"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_what_is_not_needed_to_go_on_does_not_stop_a_run(
    place: Path, here: Path, damage: Callable[[], object], aside: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    at_step_4()
    damage()
    outcome = go_on()
    assert (outcome.finished, outcome.steps) == (True, STEPS)
    assert equal(weights("run/last"), weights(place / "run/last"))
    assert run_dir._is_whole(Path("run/best"))
    assert Path("run/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert [row.step for row in read("run/log.csv")][-1] == STEPS
    for name in ("recipe.yaml", "settings.json"):
        assert Path("run", name).read_bytes()
    assert (aside is None) == (list(Path("run").glob("*.damaged-*")) == [])
    if aside is not None:
        assert Path("run", aside).exists()
        assert [message for message in caplog.messages if aside in message] != []


def test_curves_that_cannot_be_written_are_no_failure(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _as_a_folder("run/curves.png")()
    assert go_on().finished
    assert "cannot write run/curves.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("deleted", "ended"), [(("best",), True), (("best",), False), (("last",), False), (("best", "last"), True)]
)
def test_models_that_were_deleted_are_written_again(
    place: Path, here: Path, deleted: tuple[str, ...], ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not ended:
        at_step_4()
    rows = len(read("run/log.csv"))
    for name in deleted:
        shutil.rmtree(f"run/{name}")
    outcome = go_on()
    assert equal(weights("run/last"), weights(place / "run/last"))
    assert outcome.best is not None
    made = weights("run/best")
    if outcome.best.step == STEPS:
        assert equal(made, weights("run/last"))
    else:
        assert equal(made, weights(place / "run/best"))
    assert len(read("run/log.csv")) == rows


def test_a_best_model_that_is_gone_for_good_is_chosen_anew(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was that of the beginning: neither the last model nor a checkpoint has its weights."""
    for step in Checkpoints("run/checkpoints").steps():
        state, _ = Checkpoints("run/checkpoints").latest() or ({}, 0)
        Checkpoints("run/checkpoints").write({**state, "best": {"epoch": 0.0, "step": 0, "rank": [9.0, 0.0]}}, step)
    shutil.rmtree("run/best")
    outcome = go_on()
    assert "the best model, of step 0, is gone or damaged" in capsys.readouterr().err
    assert outcome.best.step == STEPS
    assert equal(weights("run/best"), weights("run/last"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [("best",), ("checkpoints",), ("last", "log.csv", "tensorboard", "settings.json", fingerprint.FILE)]
)
def test_what_is_deleted_during_a_run_is_written_again(
    place: Path, here: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree("run")
    write = RunFolder.write_checkpoint

    def write_and_delete(self: RunFolder, state: dict[str, Any], step: int) -> None:
        write(self, state, step)
        if step == 3:  # after the first epoch
            for path in (Path("run", name) for name in names):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    monkeypatch.setattr(RunFolder, "write_checkpoint", write_and_delete)
    outcome = go_on()
    assert outcome.finished
    assert equal(weights("run/last"), weights(place / "run/last"))
    assert outcome.best is not None
    assert run_dir._is_whole(Path("run/best"))
    assert len(read("run/log.csv")) == len(read(place / "run/log.csv"))
    assert Checkpoints("run/checkpoints").steps()[-1] == STEPS
    assert go_on().finished


def test_a_run_whose_checkpoints_were_deleted_is_not_overwritten(here: Path) -> None:
    shutil.rmtree("run/checkpoints")
    before = contents(Path("run"))
    for resumed in (True, False):
        with pytest.raises(UsageError, match="no checkpoint to go on from"):
            go_on(resume=resumed)
    Path("run/log.csv").unlink()
    with pytest.raises(UsageError, match="no checkpoint to go on from"):
        go_on()
    del before["run/log.csv"]
    assert contents(Path("run")) == before


def test_a_run_that_ended_before_its_first_step_begins_again(here: Path) -> None:
    """Killed after it wrote its models and before its first checkpoint."""
    shutil.rmtree("run/checkpoints")
    log = Path("run/log.csv")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    assert [row.step for row in read(log)] == [0]
    assert go_on(resume=False).finished


@pytest.mark.parametrize("content", ['{"editor.tabSize": 4}', "no JSON"])
def test_settings_of_somebody_else_are_no_run(here: Path, content: str) -> None:
    folder = Path("mine")
    folder.mkdir()
    (folder / "settings.json").write_text(content)
    for resumed in (True, False):
        with pytest.raises(UsageError, match="not empty, and holds no run"):
            finetune("mine", own="calm", recipe="short.yaml", resume=resumed)
    assert contents(folder) == {"mine/settings.json": content.encode()}


def test_a_run_in_use_is_left_alone(here: Path) -> None:
    with locked("run"):
        before = contents(Path("run"))
        with pytest.raises(UsageError, match=f"run is in use by process {os.getpid()} on .*: wait for it, or choose"):
            go_on()
        assert contents(Path("run")) == before
    assert go_on().finished
    assert not Path("run/.lock").exists()


def test_the_scale_of_a_loss_survives_a_move_between_gpu_and_cpu() -> None:
    """float16 has one on a GPU alone."""
    stage = Stage.model_validate({"name": "one", "steps": 1, "optimizer": {"opt": "adamw", "lr": 0.1}})
    for enabled in (True, False):
        states = []
        for each in (enabled, not enabled):
            model = nn.Linear(1, 1)
            groups = parameter_groups(model, stage)
            states.append(StageState.begin(stage, model, groups, TrainingSampler(8, 0, 1), torch.device("cpu")))
            states[-1].scaler = torch.amp.GradScaler("cpu", enabled=each)
        states[1].load_state_dict(states[0].state_dict())
        assert states[1].scaler.is_enabled() is not enabled
