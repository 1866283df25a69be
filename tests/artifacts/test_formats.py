"""Artifacts of every format that was ever written, as the ddf_convert of that time wrote them (``tests/data``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.paths import DATA
from torch import nn

import ddf_convert as ddf
from ddf_convert.artifacts.artifact import FORMAT_VERSION, load_original, read_manifest

REPLACED = {1: ["conv"], 2: ["conv"], 3: ["conv", "up", "resize"], 4: ["conv", "up", "resize"]}
REPLACED[5] = REPLACED[4]


class Narrow(nn.Module):
    """The model that was saved; its squeezes were less than four channels wide before format 5."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 4, 2, 1)
        self.resize = nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.resize(self.up(self.conv(x)))


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_artifacts_of_every_format_are_restored_and_saved_again(version: int, tmp_path: Path) -> None:
    folder = DATA / f"format{version}"
    manifest = read_manifest(folder)
    assert manifest.format_version == version
    assert [name for step in manifest.conversion.replaced for name in step.names] == REPLACED[version]
    expected = load_file(folder / "expected.safetensors")
    for path in (folder, tmp_path / "again"):
        model = ddf.restore(Narrow(), path).eval()
        squeeze = model.conv.ddf.channel_branch.squeeze.out_channels
        assert squeeze == (4 if version >= 5 else 1)
        output = model(expected["input"])
        # Three layers of sums over at most 9 taps, 8 channels and two normalizations, in another order elsewhere.
        bound = 200 * torch.finfo(torch.float32).eps * expected["output"].abs().max()
        assert (output - expected["output"]).abs().max() <= bound
        if path == folder:
            saved = ddf.save(model, tmp_path / "again")
            assert saved.format_version == FORMAT_VERSION


def test_the_original_of_the_second_format_is_loaded() -> None:
    folder = DATA / "format2"
    assert read_manifest(folder).conversion.recipe["name"] == "preserve"
    original = load_original(folder, Narrow())
    assert torch.equal(original.conv.weight, load_file(folder / "original.safetensors")["conv.weight"])
