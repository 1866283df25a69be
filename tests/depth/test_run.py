"""Training a depth upsampling network, and the folder of its run."""

import copy
import json
import os
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.depth_scenes import ARGUMENTS, make_pairs, scene

from ddf_convert import cli, recipes
from ddf_convert.artifacts.lock import locked
from ddf_convert.depth import checkpoint, run
from ddf_convert.depth.maps import Unit
from ddf_convert.depth.metrics import mean_rmse
from ddf_convert.depth.trainer import DepthSettings, DepthTrainer, loss_of
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.models import DDFUpNet
from ddf_convert.training import resume
from ddf_convert.training.run_dir import Keeper
from ddf_convert.training.signals import Interrupted, Interruption

SETTINGS = DepthSettings(crop=16, checkpoint_seconds=1e9)


@pytest.fixture
def data(tmp_path):
    return make_pairs(tmp_path / "data")


def request(data, output, **changes):
    asked = {
        "factor": 4,
        "arguments": ARGUMENTS,
        "changes": {"steps": 6, "batch_size": 2, "lr": 1e-2},
        "settings": SETTINGS,
        "device": "cpu",
    }
    return run.DepthTrainRequest(data=data, output=output, **{**asked, **changes})


class Pairs(list):
    unit = Unit("mm")
    names = ("a", "b")


@pytest.fixture
def pairs():
    made = [scene(seed=number) for number in range(2)]
    return Pairs(
        (torch.from_numpy(photo).permute(2, 0, 1), torch.from_numpy(depth.astype(np.float32))[None])
        for photo, depth in made
    )


def small_recipe(**changes):
    return recipes.load("depth-upsample").changed(**{"steps": 6, "batch_size": 2, **changes})


# --- training ---


class Kept(Keeper):
    """Keeps in memory what a trainer leaves; calls ``at_row`` with every row."""

    def __init__(self, at_row=lambda row: None):
        self.rows, self.states, self.saved, self._at_row = [], [], [], at_row

    def log(self, row):
        self.rows.append(row)
        self._at_row(row)

    def write_checkpoint(self, state, step):
        self.states.append((copy.deepcopy(state), step))

    def save_model(self, model, step, best=True):
        self.saved.append(step)


def test_training_lowers_the_error(pairs):
    torch.manual_seed(0)
    model = DDFUpNet(4, **ARGUMENTS)
    before = mean_rmse(run.measure(model, pairs, SETTINGS)[0])
    kept = Kept()
    trainer = DepthTrainer(model, small_recipe(steps=40, lr=1e-2, ema_decay=0.8), pairs, DepthSettings(crop=32), kept)
    assert mean_rmse(run.measure(trainer.run(), pairs, SETTINGS)[0]) < 0.9 * before
    assert kept.rows[-1].step == 40


def test_resume_reproduces_the_uninterrupted_run(pairs):
    def weights(model):
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    torch.manual_seed(0)
    straight, broken = (DDFUpNet(4, **ARGUMENTS) for _ in range(2))
    broken.load_state_dict(straight.state_dict())
    start = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    expected = DepthTrainer(straight, small_recipe(), pairs, SETTINGS).run()

    interruption = Interruption()

    def stop(row):
        interruption.requested = row.step == 3

    kept = Kept(stop)
    with pytest.raises(Interrupted):
        DepthTrainer(broken, small_recipe(), pairs, SETTINGS, kept, interruption=interruption).run()
    state, step = kept.states[-1]
    assert step == 4  # the step after the row
    broken.load_state_dict(start)  # all is in the state
    found = DepthTrainer(broken, small_recipe(), pairs, SETTINGS).run(state)
    assert torch.equal(weights(found), weights(expected))


def test_losses_count_what_is_known():
    truth = torch.tensor([[[[2.0, 0.0]]]])
    found = torch.tensor([[[[4.0, 9.0]]]])
    one = torch.ones(1, 1, 1, 1)
    assert loss_of(found, truth, one, "l1").item() == 2
    assert loss_of(found, truth, one, "l2").item() == 4
    assert loss_of(found, truth, 2 * one, "l1").item() == 1
    assert loss_of(found, truth, one, "huber").item() == pytest.approx(2 - 0.15)
    assert loss_of(found, 0 * truth, one, "l2").item() == 0


def test_what_the_recipe_asks_for_in_vain(pairs):
    model = DDFUpNet(4, **ARGUMENTS)
    with pytest.raises(UsageError, match=r"losses\.label_smoothing is for classifiers"):
        DepthTrainer(model, recipes.load("finetune"), pairs, SETTINGS)
    with pytest.raises(UsageError, match="no stages"):
        DepthTrainer(model, recipes.load("preserve"), pairs, SETTINGS)
    with pytest.raises(UsageError, match="--crop 18"):
        DepthTrainer(model, small_recipe(), pairs, DepthSettings(crop=18))


def test_a_loss_that_is_not_finite_is_explained(pairs):
    model = DDFUpNet(4, **ARGUMENTS)
    with torch.no_grad():
        model.head[0].weight.fill_(float("nan"))
    with pytest.raises(DDFError, match="the loss is nan"):
        DepthTrainer(model, small_recipe(), pairs, SETTINGS).run()


def test_every_kind_of_step(pairs):
    """bfloat16, accumulated batches, epochs, no averaged weights."""
    recipe = small_recipe(epochs=2, steps=None, accumulate=2, batch_size=1, amp="bfloat16")
    recipe = recipe.model_copy(update={"stages": (recipe.stages[0].model_copy(update={"ema_decay": None}),)})
    kept = Kept()
    model = DDFUpNet(4, **ARGUMENTS)
    assert DepthTrainer(model, recipe, pairs, SETTINGS, kept).run() is model
    assert kept.saved == [1, 2]


# --- the folder of a run ---


def test_a_run_leaves_a_network_and_a_log(data, tmp_path):
    outcome = run.train(request(data, tmp_path / "run"))
    assert (outcome.finished, outcome.steps, outcome.pairs, outcome.validation) == (True, 6, 2, 1)
    assert outcome.unit == "cm"
    assert outcome.rmse > 0
    assert outcome.bilinear > 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows][-2:] == ["train", "validation"]
    assert checkpoint.load(tmp_path / "run")[1].recipe["name"] == "depth-upsample"


def test_a_run_is_not_overwritten_and_can_go_on(data, tmp_path):
    asked = request(data, tmp_path / "run")
    run.train(asked)
    with pytest.raises(UsageError, match="--resume goes on"):
        run.train(asked)
    assert run.train(request(data, tmp_path / "run", resume=True)).steps == 6
    with pytest.raises(UsageError, match=r"factor 4, and this is 2 \(--factor\)"):
        run.train(request(data, tmp_path / "run", resume=True, factor=2))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UsageError, match="holds no run"):
        run.train(request(data, tmp_path / "other"))


def exchange(data):
    """Another depth map of the same name."""
    file = data / "depth" / "0.png"
    depth = np.asarray(Image.open(file)) + np.uint16(1)
    Image.fromarray(depth).save(file)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Data, and a run on them that ended."""
    place = tmp_path_factory.mktemp("ended")
    make_pairs(place / "data")
    run.train(request(place / "data", place / "run", changes={"steps": 2, "batch_size": 2}))
    return place


@pytest.fixture
def again(ended, tmp_path):
    """Goes on with a copy of the run; ``again.data`` and ``again.run`` are folders."""
    for name in ("data", "run"):
        shutil.copytree(ended / name, tmp_path / name)
    settings = tmp_path / "run" / "settings.json"
    settings.write_text(settings.read_text().replace(str(ended), str(tmp_path)))

    def go_on(data=tmp_path / "data", **changes):
        options = {"changes": {"steps": 2, "batch_size": 2}, "resume": True, **changes}
        return run.train(request(data, tmp_path / "run", **options))

    go_on.data, go_on.run = tmp_path / "data", tmp_path / "run"
    return go_on


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (exchange, r"data are not those .* 1 exchanged \(depth/0.png\)"),
        (lambda data: [(data / part / "2.png").unlink() for part in ("rgb", "depth")], "2 removed"),
    ],
)
def test_a_run_goes_on_with_the_data_that_it_was_begun_with(again, change, words):
    change(again.data)
    with pytest.raises(UsageError, match=words):
        again()


def test_whatever_decides_the_result_is_recorded_and_compared(again):
    recorded = json.loads((again.run / "settings.json").read_text())
    decisive = run.DepthRun.decisive
    assert {field.name for field in fields(DepthSettings)} - {"checkpoint_seconds"} <= decisive.keys()
    for name, option in decisive.items():
        if name != resume.DATA:
            with pytest.raises(UsageError, match=option):
                resume.check_settings(again.run, {**recorded, name: "another"}, recorded, [], decisive)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": {**ARGUMENTS, "width": 8}}, "width 4, and this is 8 \\(--width\\)"),
        ({"settings": replace(SETTINGS, seed=1)}, "seed 0, and this is 1 \\(--seed\\)"),
        ({"changes": {"steps": 3, "batch_size": 2}}, "stages.0.steps was 2 and is 3"),
    ],
)
def test_a_run_goes_on_with_the_options_that_it_was_begun_with(again, change, words):
    with pytest.raises(UsageError, match=words):
        again(**change)


def test_a_run_of_an_earlier_version_goes_on(again, capsys):
    file = again.run / "settings.json"
    settings = json.loads(file.read_text())
    file.write_text(
        json.dumps({name: settings[name] for name in settings if name not in ("data_sha256", "environment")})
    )
    assert again().finished
    assert "did not record the data" in capsys.readouterr().err
    exchange(again.data)
    with pytest.raises(UsageError, match="1 exchanged"):
        again()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.jsonl", b"\xff\xfe\n"),
        ("settings.json", b""),
        ("settings.json", None),
    ],
)
def test_what_is_not_needed_to_go_on_may_be_damaged(ended, again, name, content, caplog):
    file = again.run / name
    whole = file.read_text()
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    for part in ("manifest.json", "model.safetensors"):  # the network, too
        (again.run / part).unlink()
    # The settings in the checkpoint are of the run that was copied, with its data.
    assert again(ended / "data" if name == "settings.json" else again.data).finished
    assert checkpoint.load(again.run)[1].steps == 2
    if content is not None:
        assert (again.run / f"{name}.damaged-1").read_bytes() == content
        assert f"{name}.damaged-1" in caplog.text
    if name == "settings.json":
        assert json.loads(file.read_text())["factor"] == json.loads(whole)["factor"]


def test_a_run_that_goes_on_logs_nothing_twice(again):
    before = [json.loads(line) for line in (again.run / "log.jsonl").read_text().splitlines()]
    again()
    after = [json.loads(line) for line in (again.run / "log.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["step"]) for row in after] == [(row["kind"], row["step"]) for row in before]


def test_a_run_in_use_or_without_checkpoints_is_left_alone(again):
    with locked(again.run), pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        again()
    shutil.rmtree(again.run / "checkpoints")
    before = {file: file.read_bytes() for file in again.run.iterdir()}
    for resumed in (True, False):
        with pytest.raises(UsageError, match="no checkpoint to go on from"):
            again(resume=resumed)
    assert {file: file.read_bytes() for file in again.run.iterdir()} == before


@pytest.mark.parametrize("content", ['{"format_version": 1}', ""])
def test_the_settings_of_others_are_no_run(data, tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "settings.json").write_text(content)
    with pytest.raises(UsageError, match="holds no run of depth train"):
        run.train(request(data, tmp_path / "mine"))
    assert (tmp_path / "mine" / "settings.json").read_text() == content


def test_nothing_is_written_if_the_data_do_not_fit(data, tmp_path):
    Image.fromarray(np.ones((4, 4), np.uint16)).save(data / "depth" / "0.png")
    with pytest.raises(UsageError, match="same size"):
        run.train(request(data, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_upsample_train_then_upsample(data, tmp_path, capsys):
    files = tmp_path
    image, truth = scene()
    Image.fromarray(image).save(files / "photo.png")
    Image.fromarray(truth[1::4, 1::4]).save(files / "small.png")
    small = ["--crop", "16", "--width", "4", "--batch-size", "2", "--steps", "2", "--device", "cpu"]
    assert cli.run(["upsample-train", str(data), "-o", str(files / "run"), "--factor", "4", *small]) == 0
    assert "RMSE on 1 validation pairs" in capsys.readouterr().out
    photo, depth, made = (str(files / name) for name in ("photo.png", "small.png", "out.png"))
    use = ["upsample", "--rgb", photo, "--depth", depth, "--checkpoint", str(files / "run"), "-o", made, "--no-picture"]
    assert cli.run(use) == 0
    assert cli.run(["upsample-train", str(data), "-o", str(files / "run"), "--factor", "3", *small]) == 2
    assert cli.run(["upsample-train", str(data), "-o", str(files / "b"), "--epochs", "1", *small]) == 2
    capsys.readouterr()
    assert cli.run(["upsample-train", str(data), "-o", str(files / "c"), "--factor", "4", *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_the_recipe_is_listed(capsys):
    assert cli.run(["recipes"]) == 0
    assert "depth-upsample" in capsys.readouterr().out
