"""Every example runs: as a user would start it, on a few small images."""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path

import numpy
import PIL.Image
import pytest
import timm
import torch
from support.paths import ROOT

import ddf_convert as ddf
from ddf_convert.layers import DDF2d, DDFUp2d

EXAMPLES = ROOT / "examples"
MODEL = "test_resnet"  # timm's smallest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Bright and dark images, in two splits."""
    root, random = tmp_path_factory.mktemp("data"), numpy.random.default_rng(0)
    for split in ("train", "validation"):
        for name, low in (("bright", 150), ("dark", 0)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = random.integers(low, low + 100, (40, 40, 3), dtype=numpy.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return root


def main(example):
    return runpy.run_path(str(EXAMPLES / f"{example}.py"))["main"]


@pytest.mark.slow
def test_an_own_network_is_patched_and_restored(quick_timing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    restored = main("own_network")([])
    said = capsys.readouterr().out
    assert "stages.0.conv1" not in dict(ddf_layers(restored))
    assert len(ddf_layers(restored)) == 5
    assert said.rstrip().endswith("its outputs are equal: True")


@pytest.mark.slow
def test_a_unet_is_converted_with_its_interpolations_and_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "unet_segmentation.py"))
    model = example["main"](["--size", "32", "--steps", "2"])
    said = capsys.readouterr().out
    scores = [line.split()[1] for line in said.splitlines() if line.startswith("IoU")]
    assert scores == ["original:", "converted:", "trained:"]
    layers = dict(ddf_layers(model))
    assert {"up1", "up2"} < layers.keys()
    assert all(each.affine for each in layers.values())
    with PIL.Image.open("shapes/image.png") as image, PIL.Image.open("shapes/predictions.png") as predictions:
        assert image.size == (32, 32)
        assert predictions.size[0] > 600
    again = ddf.restore(example["UNet"](), "shapes/model").eval()
    batch = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(batch), model(batch))


def ddf_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DDF2d | DDFUp2d)]


# The calls with which timm's train.py makes a model, trains it and keeps it; the script itself is timm's.
TRAIN = """
import argparse
from timm import data, models, utils
parser = argparse.ArgumentParser()
for name in ("model", "data-dir", "experiment"):
    parser.add_argument(f"--{name}")
parser.add_argument("--num-classes", type=int)
parser.add_argument("--img-size", type=int)
parser.add_argument("--drop", type=float, default=0.0)
args = parser.parse_args()
model = models.create_model(
    args.model, pretrained=False, in_chans=3, num_classes=args.num_classes, drop_rate=args.drop, drop_path_rate=None,
    drop_block_rate=None, global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
)
assert model.drop_rate == args.drop
config = data.resolve_data_config(vars(args), model=model)
import timm, torch
optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-2)
dataset = data.create_dataset("", root=args.data_dir, split="train", is_training=True)
loader = data.create_loader(
    dataset, config["input_size"], 8, is_training=True, mean=config["mean"], std=config["std"], num_workers=0,
    device=torch.device("cpu"),
)
folder = utils.get_outdir("output/train", args.experiment)
average = utils.ModelEmaV3(model, decay=0.5)
saver = utils.CheckpointSaver(
    model=model, optimizer=optimizer, args=args, model_ema=average, checkpoint_dir=folder,
)
for images, targets in loader:
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    optimizer.step()
    average.update(model)
saver.save_checkpoint(0, metric=50.0)
"""


@pytest.mark.slow
def test_scripts_of_timm_train_a_converted_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", sys.argv)
    Path("train.py").write_text(TRAIN)
    original = timm.create_model(MODEL)
    recipe = ddf.recipes.load("preserve")
    model = recipe.convert(original, torch.zeros(1, 3, 32, 32))
    recipe.initialize(model, original)
    ddf.save(model, "converted")
    script = importlib.import_module("timm_script")
    options = ("--model", "converted", "--data-dir", str(data), "--num-classes", "2", "--img-size", "32")
    script.main(["converted", "train.py", *options, "--drop", "0.1", "--experiment", "fine"])
    script.main(["--collect", "output/train/fine/last.pth.tar", "--output", "fine", "converted"])
    assert "saved to fine" in capsys.readouterr().out
    trained = ddf.load("fine")
    assert trained.num_classes == 2
    old, new = (torch.cat([layer.spatial_branch[1].std for _, layer in ddf_layers(each)]) for each in (model, trained))
    assert not old.any()
    assert new.any()


@pytest.mark.slow
@pytest.mark.parametrize("example", ["own_loop", "lightning_loop", "hf_trainer"])
def test_loops_train_a_converted_model_and_save_it(example, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    options = ["--size", "32", "--batch-size", "4", "--steps", "3", "--output", "out"]
    model = main(example)(["--data", str(data), "--model", MODEL, *options]).eval()
    said = capsys.readouterr().out
    assert "loss" in said
    again = ddf.load("out")
    layers = [module for module in again.modules() if isinstance(module, DDF2d)]
    assert layers
    assert any(layer.spatial_branch[1].std.any() for layer in layers)  # preserve starts at 0: they have learned
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image), model(image))


@pytest.mark.slow
def test_parts_of_timm_train_a_ddf_resnet(data, capsys):
    torch.manual_seed(0)
    train = main("timm_loop")
    options = ["--size", "32", "--batch-size", "8", "--epochs", "3"]
    assert train(["--data", str(data), "--model", "ddf_mul_resnet18", *options]) > 60
    assert capsys.readouterr().out.count("top-1") == 3
