"""`ddf-convert finetune` and `evaluate`, mostly in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from support import training_runs as runs

import ddf_convert as ddf
from ddf_convert import cli, recipes
from ddf_convert.artifacts import artifact

SIZE = ("--input-size", *map(str, runs.SIZE))
SIZE_32 = ("--input-size", "3", "32", "32")
CPU = ("--device", "cpu", "--workers", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Beside what all runs have: a timm model, and folders that are wrong in one way each."""
    folder = runs.prepare(tmp_path_factory.mktemp("cli"))
    torch.manual_seed(0)
    original = timm.create_model("test_resnet")
    recipe = recipes.load("quick")
    model = recipe.convert(original, torch.zeros(1, 3, 32, 32))
    recipe.initialize(model, original)
    artifact.save(model, folder / "timm", original=original)
    artifact.save(model, folder / "alone")
    safetensors.torch.save_file(original.state_dict(), folder / "original.safetensors")
    safetensors.torch.save_file({"fc.weight": torch.zeros(3)}, folder / "wrong.safetensors")
    (folder / "flat").mkdir()
    for number, file in enumerate(sorted(Path("data").glob("*/*/*.png"))):
        shutil.copy(file, folder / "flat" / f"{number}.png")
    shutil.copytree("data/train", folder / "four" / "train")
    shutil.copytree("data/train/c0", folder / "four" / "train" / "c3")
    (folder / "used").mkdir()
    (folder / "used" / "notes.txt").touch()
    (folder / "calm.yaml").write_text("{name: calm, stages: [{name: only, epochs: 1, optimizer: {lr: 0.1}}]}")
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path) -> None:
    runs.enter(place)


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(list(arguments))
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_a_model_is_trained_resumed_and_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--data", "data", "--recipe", "finetune", "--num-classes", "3", *CPU, *SIZE_32)
    options = (*options, "--epochs", "1", "--batch-size", "8")
    code, out, err = ran(capsys, "finetune", "timm", *options, "-o", "run")
    assert code == 0, err
    assert "48 images in 3 classes to train with; to evaluate on: its validation part, 15" in err
    assert len([line for line in err.splitlines() if "epochs, step" in line]) == 2
    assert "before training" in out
    assert "12 steps in" in out
    assert "run/best" in out
    assert "Traceback" not in err

    code, out, _ = ran(capsys, "finetune", "timm", *options, "-o", "run", "--resume", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["finished"], document["steps"], document["run"]) == (True, 12, "run")
    assert document["before"]["step"] == 0

    code, out, _ = ran(capsys, "evaluate", "run", "--data", "data", *CPU, *SIZE_32, "--json", "--batch-size", "4")
    assert code == 0
    found = json.loads(out)
    assert (found["model"], found["images"], found["top5"]) == ("run/best", 15, None)
    assert found["top1"] == pytest.approx(document["best"]["top1"])
    assert found["loss"] == pytest.approx(document["best"]["loss"], rel=1e-4)
    assert found["images_per_s"] > 0
    model = ddf.load("run/best")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert artifact.read_manifest("run/last").conversion.replaced


@pytest.mark.slow
def test_images_without_labels_are_enough_to_learn_from_the_original(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The recipe is the one that the model was converted with; a tenth of the images is held out.
    arguments = ("finetune", "timm", "--data", "flat", *CPU, *SIZE_32, "--steps", "3")
    code, out, err = ran(capsys, *arguments, "--batch-size", "4", "-o", "distilled", "--resume")
    assert code == 0, err
    assert "57 images without labels to train with; to evaluate on: 6 of its images, held out" in err
    assert "nothing to resume in distilled: starting from the beginning" in err
    assert "agrees with original" in out
    assert recipes.load("distilled/recipe.yaml").name == "quick"
    code, out, _ = ran(capsys, "evaluate", "distilled", "--data", "flat", *CPU, *SIZE_32)
    assert code == 0
    assert "agrees with original" in out
    assert "63" in out
    # Weights of the original can come from elsewhere, and are the same.
    code, _, err = ran(
        capsys, *arguments, "--batch-size", "4", "-o", "elsewhere", "--teacher-checkpoint", "original.safetensors"
    )
    assert code == 0, err
    one, other = runs.weights("distilled/last"), runs.weights("elsewhere/last")
    assert runs.equal(one, other)


def test_a_model_before_conversion_is_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--data", "data", *CPU, *SIZE_32)
    code, _, err = ran(capsys, "evaluate", "test_resnet", "--checkpoint", "original.safetensors", *small)
    assert code == 2
    assert "data has 3 classes and the model 1000" in err
    code, _, err = ran(capsys, "evaluate", "test_resnet", *small)
    assert code == 2
    assert "--checkpoint FILE, or --pretrained" in err
    own = ("evaluate", "plain", "--model", "tinyruns:plain", "--data", "data", *CPU, *SIZE, "--json")
    for options, images in (((), 15), (("--split", "train"), 48)):
        code, out, err = ran(capsys, *own, *options)
        assert code == 0, err
        assert json.loads(out)["images"] == images


# A folder, options that differ from those of a run that is right (None leaves one out), and what is said.
WRONG: dict[str, tuple[str, dict[str, str | None], str]] = {
    "no recipe": ("plain", {"--recipe": "distil"}, "did you mean distill"),
    "nothing to train": ("plain", {"--recipe": "preserve"}, "has nothing to train"),
    "own model": ("plain", {"--model": None}, "--model package.module:callable"),
    "another model": ("plain", {"--model": "tinyruns:normed"}, "do not fit"),
    "no data": ("plain", {"--data": "none"}, "none: no such folder"),
    "no labels": ("plain", {"--data": "flat"}, "flat has images and no class subfolders, and labels are needed"),
    "other classes": ("plain", {"--data": "four"}, "four has 4 classes and the model 3: --num-classes 4"),
    "classes of validation": ("plain", {"--val-data": "four/train"}, "four/train has 4 classes"),
    "other labels": (
        "plain",
        {"--data": "tinyruns:strange", "-o": "strange"},
        "and the model's 3 classes go from 0 to 2: --num-classes",
    ),
    "no classifier": ("plain", {"--num-classes": "4"}, "Net has no reset_classifier"),
    "no original": ("alone", {"--model": None, "--recipe": "quick"}, "--teacher-checkpoint FILE"),
    "original of others": ("plain", {"--teacher-checkpoint": "wrong.safetensors"}, "wrong.safetensors does not fit"),
    "no need of it": ("plain", {"--recipe": "calm.yaml", "--teacher-checkpoint": "x"}, "does not learn from the orig"),
    "probabilities": (
        "timm",
        {"--model": None, "--num-classes": "3", "--recipe": None},
        "of 1000 classes, and the model has 3",
    ),
    "batches of 1": ("normed", {"--model": "tinyruns:normed", "--batch-size": "1"}, "freeze_batch_norm: true"),
    "odd batches": ("plain", {"--batch-size": "3"}, "mixup and CutMix mix pairs of images: --batch-size 3 is odd"),
    "too few images": ("plain", {"--batch-size": "40"}, "48 training images, and a step needs 80"),
    "no rate": ("plain", {"--lr": "0"}, "--lr 0: must be above 0"),
    "half of the CPU": ("plain", {"--amp": "float16"}, "--amp float16 is for GPUs"),
    "size": ("plain", {"--input-size": "1 16 16"}, "does not take images of 1 x 16 x 16"),
    "folder in use": ("plain", {"-o": "used"}, "used is not empty, and holds no run"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_said_before_anything_is_trained(
    place: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    folder, changes, words = WRONG[case]
    right = {"--data": "data", "--recipe": "test.yaml", "-o": "wrong", "--model": "tinyruns:plain"}
    given = {**right, "--input-size": "3 16 16", "--device": "cpu", "--workers": "0", **changes}
    options = [part for name, value in given.items() if value for part in (name, *value.split(" "))]
    code, out, err = ran(capsys, "finetune", folder, *options)
    assert code == 2, err
    assert words in err
    assert sum(line.startswith("error:") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert out == ""
    assert not Path("wrong").exists()
    assert not Path("strange/checkpoints").exists()  # such labels are seen when they are met, before training even so


@pytest.mark.slow
def test_a_broken_image_is_named_or_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("data", "broken")
    Path("broken/train/c1/03.png").write_bytes(b"no image")
    arguments = ["finetune", "plain", "--model", "tinyruns:plain", "--data", "broken", "--recipe", "test.yaml"]
    arguments += [*CPU, *SIZE, "--epochs", "1"]
    code, _, err = ran(capsys, *arguments, "-o", "stops")
    assert code == 2
    assert "03.png cannot be read" in err
    assert "--on-broken skip" in err
    code, _, err = ran(capsys, *arguments, "-o", "skips", "--on-broken", "skip")
    assert code == 0, err


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    options = {
        "finetune": "data val-data recipe output resume model teacher-checkpoint num-classes epochs steps batch-size"
        " accumulate lr amp input-size workers device seed compile channels-last on-broken checkpoint-every json debug",
        "evaluate": "data split checkpoint pretrained model batch-size input-size workers device on-broken json debug",
    }
    for command, names in options.items():
        code, out, _ = ran(capsys, command, "--help")
        assert code == 0
        assert [name for name in names.split() if f"--{name} " not in out] == []
