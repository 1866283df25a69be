"""A trained network on disk, and the command that upsamples with it."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.depth_scenes import ARGUMENTS, scene

from ddf_convert import cli
from ddf_convert.artifacts.atomic import MANIFEST
from ddf_convert.depth import checkpoint
from ddf_convert.depth.inference import upsample
from ddf_convert.depth.maps import Unit, read_depth
from ddf_convert.errors import ArtifactError
from ddf_convert.models import DDFUpNet, JointConvUpNet


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
    return cli.run(["depth", "predict", *options, "-o", str(files / output), "--device", "cpu", *more])


def error(capsys):
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


@pytest.mark.slow
def test_predict_writes_depth_and_a_picture(files, network, capsys):
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


def test_predict_as_json(files, network, capsys):
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
        ("truth of another size", "--truth"),
        ("no folder", "there is no folder"),
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
    elif change == "truth of another size":
        more = ["--truth", str(files / "small.png")]
    else:
        output = "nothing/out.png"
    before = sorted(files.iterdir())
    assert command(files, network, *more, output=output, **changed) == 2
    assert words in error(capsys)
    assert sorted(files.iterdir()) == before


def test_a_folder_is_no_depth_map(files, network, capsys, monkeypatch):
    monkeypatch.chdir(files)
    assert cli.run(["depth", "predict", "--rgb", "a", "--depth", "b", "--checkpoint", str(network), "-o", "."]) == 2
    assert "is a folder; give a file" in error(capsys)


def test_upsampling_says_what_it_padded():
    model = DDFUpNet(2, **ARGUMENTS)
    found, words = upsample(model, torch.zeros(3, 5, 6, dtype=torch.uint8), torch.ones(1, 3, 3))
    assert found.shape == (1, 5, 6)
    assert "2 does not divide" in words
