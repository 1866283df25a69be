"""Every built-in recipe from the command line: convert, finetune, evaluate, load; on pieces of a real photo."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.cbook
import PIL.Image
import pytest
import torch

import ddf_convert as ddf
from ddf_convert import cli

SIZE = ["--input-size", "3", "32", "32"]
MODEL = "test_resnet"  # timm's smallest


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """The photo that matplotlib brings, in pieces: of its upper half and of its lower half."""
    root = tmp_path_factory.mktemp("photos")
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        photo = PIL.Image.open(file).convert("RGB").resize((320, 320))
    for half in range(2):
        for number in range(12):
            left, top = 80 * (number % 4), 160 * half + 40 * (number // 4)
            folder = root / ("validation" if number % 3 == 2 else "train") / ("upper", "lower")[half]
            folder.mkdir(parents=True, exist_ok=True)
            photo.crop((left, top, left + 80, top + 80)).save(folder / f"{number}.png")
    return str(root)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several threads slow many small steps down
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", ddf.recipes.names())
def test_a_built_in_recipe_from_end_to_end(name, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = ddf.recipes.load(name)
    images = ["--images", photos] if recipe.initialize_with.method == "calibrate" else []
    assert cli.run(["convert", MODEL, "-o", "converted", "--recipe", name, *images, *SIZE, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["initialised"]["layers"]
    assert bool(layers) == (recipe.initialize_with.method != "paper")

    short = ["--steps", "3"] if all(stage.steps for stage in recipe.stages) else ["--epochs", "1"]
    options = ["--batch-size", "4", "--workers", "0", "--device", "cpu", *SIZE]
    classes = ["--num-classes", "2"] if recipe.needs_labels else []
    training = ["finetune", "converted", "--data", photos, "-o", "run", *short, *classes, *options, "--json"]
    code = cli.run(training if recipe.stages else [*training, "--recipe", name])
    out, err = capsys.readouterr()
    if not recipe.stages:  # it ends with the initialization: what was converted is the result
        assert code == 2
        assert "nothing to train" in err
        folder = "converted"
    else:
        assert code == 0, err
        assert json.loads(out)["steps"] == sum(3 if stage.steps else 4 for stage in recipe.stages)
        folder = "run/last"
    # Without a trained original, labels of two classes are learned only by recipes that look at them.
    looks = recipe.needs_labels
    assert cli.run(["evaluate", folder, "--data", photos, *options, "--json"]) == (0 if looks else 2)
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 8 if looks else "classes" in err
    model = ddf.load(folder)
    assert model.ddf_conversion.recipe["name"] == name
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.slow
def test_a_model_and_a_run_that_were_recorded_with_the_old_key_go_on(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["convert", MODEL, "-o", "converted", "--recipe", "quick", *SIZE]) == 0
    manifest = Path("converted/manifest.json")
    text = manifest.read_text()
    assert text.count('"initialize"') == 1
    manifest.write_text(text.replace('"initialize"', '"initialise"'))
    command = ["finetune", "converted", "--data", photos, "-o", "run", "--steps", "2", "--batch-size", "4"]
    command += ["--workers", "0", "--device", "cpu", *SIZE]
    assert cli.run(command) == 0
    recipe = Path("run/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("\ninitialize:\n", "\ninitialise:\n"))
    capsys.readouterr()
    assert cli.run([*command, "--resume"]) == 0, capsys.readouterr().err
    for folder in ("converted", "run/last"):
        recorded = ddf.load(folder).ddf_conversion.recipe
        assert ddf.recipes.Recipe.model_validate(recorded).initialize_with.method == "preserve"
