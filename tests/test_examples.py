"""Every example runs: as a user would start it, on a few small images."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy
import PIL.Image
import pytest
import torch

import ddf_convert as ddf
from ddf_convert.layers import DDF2d

EXAMPLES = Path(__file__).parent.parent / "examples"
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


def test_parts_of_timm_train_a_ddf_resnet(data, capsys):
    torch.manual_seed(0)
    train = main("timm_loop")
    options = ["--size", "32", "--batch-size", "8", "--epochs", "3"]
    assert train(["--data", str(data), "--model", "ddf_mul_resnet18", *options]) > 60
    assert capsys.readouterr().out.count("top-1") == 3
