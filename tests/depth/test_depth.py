"""Training a depth upsampling network, its folder, and the commands upsample-train and upsample."""

import copy
import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ddf_convert import cli, recipes
from ddf_convert.artifacts.atomic import MANIFEST
from ddf_convert.artifacts.lock import locked
from ddf_convert.depth import checkpoint, run
from ddf_convert.depth.inference import upsample
from ddf_convert.depth.maps import Unit, read_depth
from ddf_convert.depth.metrics import mean_rmse
from ddf_convert.depth.training import Settings, Trainer, loss_of
from ddf_convert.errors import ArtifactError, DDFError, UsageError
from ddf_convert.models import DDFUpNet, JointConvUpNet
from ddf_convert.training.signals import Interrupted, Interruption

ARGUMENTS = {"width": 4, "guide_width": 4, "head_width": 4, "blocks": 0}
SETTINGS = Settings(crop=16, checkpoint_seconds=1e9)


def scene(height=32, width=40, seed=0):
    """A square in front of a wall: photo (H, W, 3) uint8, and depth (H, W) in millimetres with a hole."""
    random = np.random.default_rng(seed)
    depth = np.full((height, width), 3000, np.uint16)
    top, left = random.integers(4, height // 2), random.integers(4, width // 2)
    depth[top : top + 14, left : left + 14] = 1000
    photo = (np.stack([depth / 20] * 3, -1) + random.normal(0, 4, (height, width, 3))).clip(0, 255).astype(np.uint8)
    depth[:2, :2] = 0
    return photo, depth


def make_data(folder):
    for part in ("rgb", "depth"):
        (folder / part).mkdir(parents=True)
    for number in range(3):
        photo, depth = scene(seed=number)
        Image.fromarray(photo).save(folder / "rgb" / f"{number}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{number}.png")


@pytest.fixture
def data(tmp_path):
    make_data(tmp_path / "data")
    return tmp_path / "data"


def request(data, output, **changes):
    asked = {
        "factor": 4,
        "arguments": ARGUMENTS,
        "changes": {"steps": 6, "batch_size": 2, "lr": 1e-2},
        "settings": SETTINGS,
        "device": "cpu",
    }
    return run.Request(data=data, output=output, **{**asked, **changes})


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


def test_training_lowers_the_error(pairs):
    torch.manual_seed(0)
    model = DDFUpNet(4, **ARGUMENTS)
    before = mean_rmse(run.measure(model, pairs, SETTINGS)[0])
    rows = []
    trained = Trainer(model, small_recipe(steps=40, lr=1e-2, ema_decay=0.8), pairs, Settings(crop=32), log=rows.append)
    assert mean_rmse(run.measure(trained.run(), pairs, SETTINGS)[0]) < 0.9 * before
    assert rows[-1]["step"] == 40


def test_a_run_that_goes_on_ends_where_it_would_have(pairs):
    def weights(model):
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    torch.manual_seed(0)
    straight, broken = (DDFUpNet(4, **ARGUMENTS) for _ in range(2))
    broken.load_state_dict(straight.state_dict())
    start = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    expected = Trainer(straight, small_recipe(), pairs, SETTINGS).run()

    interruption, kept = Interruption(), []

    def stop(row):
        interruption.asked = row["step"] == 3

    states = {
        "log": stop,
        "keep": lambda state, step: kept.append((copy.deepcopy(state), step)),
        "interruption": interruption,
    }
    with pytest.raises(Interrupted):
        Trainer(broken, small_recipe(), pairs, SETTINGS, **states).run()
    state, step = kept[-1]
    assert step == 3
    broken.load_state_dict(start)  # all is in the state
    found = Trainer(broken, small_recipe(), pairs, SETTINGS).run(state)
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
        Trainer(model, recipes.load("finetune"), pairs, SETTINGS)
    with pytest.raises(UsageError, match="no stages"):
        Trainer(model, recipes.load("preserve"), pairs, SETTINGS)
    with pytest.raises(UsageError, match="--crop 18"):
        Trainer(model, small_recipe(), pairs, Settings(crop=18))


def test_a_loss_that_is_not_finite_is_explained(pairs):
    model = DDFUpNet(4, **ARGUMENTS)
    with torch.no_grad():
        model.head[0].weight.fill_(float("nan"))
    with pytest.raises(DDFError, match="the loss is nan"):
        Trainer(model, small_recipe(), pairs, SETTINGS).run()


def test_every_kind_of_step(pairs):
    """bfloat16, accumulated batches, epochs, no averaged weights."""
    recipe = small_recipe(epochs=2, steps=None, accumulate=2, batch_size=1, amp="bfloat16")
    recipe = recipe.model_copy(update={"stages": (recipe.stages[0].model_copy(update={"ema_decay": None}),)})
    looked = []
    model = DDFUpNet(4, **ARGUMENTS)
    trained = Trainer(model, recipe, pairs, SETTINGS, look=lambda model, step: looked.append(step)).run()
    assert trained is model
    assert looked == [1, 2]


# --- folders ---


@pytest.mark.parametrize("network", [DDFUpNet, JointConvUpNet])
def test_a_network_goes_out_and_comes_back(tmp_path, network):
    model = network(4, sampling="mean", **ARGUMENTS)
    checkpoint.save(model, tmp_path / "net", Unit("cm"), downsample="bicubic", steps=7)
    assert sorted(file.name for file in (tmp_path / "net").iterdir()) == [MANIFEST, "model.safetensors"]
    again, manifest = checkpoint.load(tmp_path / "net")
    assert (manifest.unit, manifest.downsample, manifest.steps, manifest.scale_factor) == ("cm", "bicubic", 7, 4)
    assert type(again) is network
    assert again.arguments == model.arguments
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_folders_that_are_no_network(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        checkpoint.load(tmp_path / "net")
    checkpoint.save(DDFUpNet(2, **ARGUMENTS), tmp_path / "net", Unit("m"), downsample="nearest")
    weights = tmp_path / "net" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(ArtifactError, match="incomplete"):
        checkpoint.load(tmp_path / "net")
    weights.write_bytes(whole)
    manifest = tmp_path / "net" / MANIFEST
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"width": 4', '"width": 6'), encoding="utf-8")
    with pytest.raises(ArtifactError, match="do not belong together"):
        checkpoint.load(tmp_path / "net")
    manifest.write_text(text.replace("ddf_convert depth upsampling", "another"), encoding="utf-8")
    with pytest.raises(ArtifactError, match="no depth upsampling network"):
        checkpoint.load(tmp_path / "net")
    manifest.unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        checkpoint.load(tmp_path / "net")


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
    make_data(place / "data")
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
        (lambda data: shutil.copy(data / "rgb" / "0.png", data / "rgb" / "1.png"), r"1 exchanged \(rgb/1.png\)"),
        (
            lambda data: [shutil.copy(data / part / "0.png", data / part / "9.png") for part in ("rgb", "depth")],
            "2 added",
        ),
        (lambda data: [(data / part / "2.png").unlink() for part in ("rgb", "depth")], "2 removed"),
    ],
)
def test_a_run_goes_on_with_the_data_that_it_was_begun_with(again, change, words):
    change(again.data)
    with pytest.raises(UsageError, match=words):
        again()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 2}, "--factor"),
        ({"upsampler": "conv"}, "--upsampler"),
        ({"arguments": {**ARGUMENTS, "width": 8}}, "width 4, and this is 8 \\(--width\\)"),
        ({"settings": replace(SETTINGS, seed=1)}, "seed 0, and this is 1 \\(--seed\\)"),
        ({"settings": replace(SETTINGS, turned=0.5)}, "--turned"),
        ({"settings": replace(SETTINGS, loss="l1")}, "--loss"),
        ({"settings": replace(SETTINGS, downsample="mean")}, "--downsample"),
        ({"settings": replace(SETTINGS, crop=8)}, "--crop"),
        ({"unit": "cm"}, "--unit"),
        ({"changes": {"steps": 3, "batch_size": 2}}, "stages.0.steps was 2 and is 3"),
        ({"changes": {"steps": 2, "batch_size": 2, "amp": "bfloat16"}}, "stages.0.amp"),
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
        ("log.jsonl", b""),
        ("log.jsonl", b"\xff\xfe\n"),
        ("settings.json", b""),
        ("settings.json", None),
        ("log.jsonl", None),
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


@pytest.mark.parametrize("content", ['{"format_version": 1}', "{}", ""])
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


# --- the commands ---


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "net"
    checkpoint.save(DDFUpNet(4, **ARGUMENTS), folder, Unit("mm"), downsample="nearest")
    return folder


@pytest.fixture
def files(tmp_path):
    """A photo, a small depth map, the true one."""
    photo, depth = scene()
    Image.fromarray(photo).save(tmp_path / "photo.png")
    Image.fromarray(depth[1::4, 1::4]).save(tmp_path / "small.png")
    Image.fromarray(depth).save(tmp_path / "truth.png")
    return tmp_path


def command(files, network, *more, output="out.png", **changed):
    given = {"rgb": files / "photo.png", "depth": files / "small.png", "checkpoint": network, **changed}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return cli.run(["upsample", *options, "-o", str(files / output), "--device", "cpu", *more])


def error(capsys):
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_upsample_writes_depth_and_a_picture(files, network, capsys):
    assert command(files, network, "--truth", str(files / "truth.png"), "--factor", "4") == 0
    printed = capsys.readouterr().out
    assert re.search(r"DDF-Up-Net +40x32 +.* mm +\S+ cm", printed)
    found = read_depth(files / "out.png")
    assert found.shape == (1, 32, 40)
    assert (found > 0).all()
    with Image.open(files / "out_compare.png") as picture:
        assert picture.width > picture.height
    assert sorted(file.name for file in files.iterdir() if file.name.startswith((".", "out"))) == [
        "out.png",
        "out_compare.png",
    ]


def test_upsample_as_json(files, network, capsys):
    truth = str(files / "truth.png")
    assert command(files, network, "--truth", truth, "--json", "--no-picture", output="out.npy") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["factor"] == 4
    assert document["picture"] is None
    assert [row["name"] for row in document["maps"]] == ["input", "bicubic", "DDF-Up-Net", "truth"]
    assert document["rmse_unit"] == "cm"
    assert document["maps"][2]["rmse"] > 0


def test_padding_is_said(files, network, capsys):
    photo, depth = scene(30, 39)
    Image.fromarray(photo).save(files / "photo.png")
    Image.fromarray(np.pad(depth, ((0, 2), (0, 1)))[1::4, 1::4]).save(files / "small.png")
    assert command(files, network, "--no-picture", output="out.pfm") == 0
    assert "4 does not divide 39x30: padded" in error(capsys)
    assert read_depth(files / "out.pfm").shape == (1, 30, 39)


def test_files_that_exist_are_kept(files, network, capsys):
    (files / "out_compare.png").write_bytes(b"mine")
    assert command(files, network) == 2
    assert "--overwrite" in error(capsys)
    assert not (files / "out.png").exists()
    assert command(files, network, "--overwrite") == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("another factor", "upsamples by 4; give --factor 4"),
        ("no checkpoint", "does not exist"),
        ("other aspect", "does not fit a photo"),
        ("all holes", "every pixel is a hole"),
        ("8 bits", "256 depths"),
        ("no photo", "photo cannot be read"),
        ("truth of another size", "--truth"),
        ("no folder", "there is no folder"),
        ("another format", "depth is written as"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(files, network, capsys, change, words):
    more, changed, output = [], {}, "out.png"
    if change == "another factor":
        more = ["--factor", "8"]
    elif change == "no checkpoint":
        changed = {"checkpoint": files / "nothing"}
    elif change == "other aspect":
        Image.fromarray(np.ones((8, 8), np.uint16)).save(files / "small.png")
    elif change == "all holes":
        Image.fromarray(np.zeros((8, 10), np.uint16)).save(files / "small.png")
    elif change == "8 bits":
        Image.fromarray(np.ones((8, 10), np.uint8)).save(files / "small.png")
    elif change == "no photo":
        changed = {"rgb": files / "nothing.png"}
    elif change == "truth of another size":
        more = ["--truth", str(files / "small.png")]
    elif change == "no folder":
        output = "nothing/out.png"
    else:
        output = "out.jpg"
    before = sorted(files.iterdir())
    assert command(files, network, *more, output=output, **changed) == 2
    assert words in error(capsys)
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize("output", ["", ".", "/"])
def test_a_folder_is_no_depth_map(output, files, network, capsys, monkeypatch):
    monkeypatch.chdir(files)
    assert cli.run(["upsample", "--rgb", "a", "--depth", "b", "--checkpoint", str(network), "-o", output]) == 2
    assert "is a folder; give a file" in error(capsys)


def test_upsample_train_then_upsample(data, files, capsys):
    small = ["--crop", "16", "--width", "4", "--batch-size", "2", "--steps", "2", "--device", "cpu"]
    assert cli.run(["upsample-train", str(data), "-o", str(files / "run"), "--factor", "4", *small]) == 0
    assert "RMSE on 1 validation pairs" in capsys.readouterr().out
    assert command(files, files / "run", "--no-picture") == 0
    assert cli.run(["upsample-train", str(data), "-o", str(files / "run"), "--factor", "3", *small]) == 2
    assert cli.run(["upsample-train", str(data), "-o", str(files / "b"), "--epochs", "1", *small]) == 2
    capsys.readouterr()
    assert cli.run(["upsample-train", str(data), "-o", str(files / "c"), "--factor", "4", *small, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_upsampling_says_what_it_padded():
    model = DDFUpNet(2, **ARGUMENTS)
    found, words = upsample(model, torch.zeros(3, 5, 6, dtype=torch.uint8), torch.ones(1, 3, 3))
    assert found.shape == (1, 5, 6)
    assert "2 does not divide" in words


def test_the_recipe_is_listed(capsys):
    assert cli.run(["recipes"]) == 0
    assert "depth-upsample" in capsys.readouterr().out
