"""What commands and ``save`` may write over."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from support.artifacts import files, tiny

import ddf_convert as ddf
from ddf_convert import cli
from ddf_convert.artifacts import atomic
from ddf_convert.artifacts.path_checks import check_output
from ddf_convert.depth import checkpoint as networks
from ddf_convert.depth.maps import Unit
from ddf_convert.errors import ArtifactError, UsageError
from ddf_convert.models.ddf_upnet import DDFUpNet

SMALL = ("--input-size", "3", "64", "64")
TINY_BENCH = ("bench", "op", "--resolution", 4, "--channels", 4, "--batch", 1, "--seconds", 0.001, "--no-compile")
PREDICT = ("depth", "predict", "--rgb", "photo.png", "--checkpoint", "network")
THEIRS = b"made by hand, and not to be lost"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "out"
    ddf.save(
        ddf.convert(timm.create_model("resnet10t"), example_input=torch.empty(1, 3, 64, 64)), path, report={"a": 1}
    )
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, artifact: Path) -> Path:
    """The current folder, with an artifact, a photo, a depth map and a network for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(artifact, "made")
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save("photo.png")
    Image.fromarray(np.full((16, 16), 1000, np.uint16)).save("small.png")
    networks.save(DDFUpNet(4, width=4, guide_width=4, head_width=4), "network", Unit("mm"), downsample="nearest")
    return tmp_path


def run(*arguments: object) -> int:
    return cli.run([str(each) for each in arguments])


# --- commands ---

# Everything that writes a file that the user names: the command, and that file.
SINGLE = {
    "inspect --html": (("inspect", "resnet10t", *SMALL, "--html"), "page.html"),
    "bench --json": ((*TINY_BENCH, "--json"), "figures.json"),
    "bench --plot": ((*TINY_BENCH, "--plot"), "figures.png"),
    "export": (("export", "made", *SMALL, "--static", "-o"), "model.pt2"),
    "visualize": (("visualize", "made", "photo.png", *SMALL, "-o"), "filters.png"),
    "depth predict": ((*PREDICT, "--depth", "small.png", "--no-picture", "-o"), "large.png"),
    "depth predict, its picture": ((*PREDICT, "--depth", "small.png", "-o", "large.png"), "large_compare.png"),
}
LINKED = ("inspect --html", "depth predict")  # one of each way to write; these are quick


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "link"),
    [
        *((name, "file") for name in SINGLE),
        *((name, f"{kind} link") for name in LINKED for kind in ("symbolic", "hard")),
    ],
)
def test_a_file_that_exists_is_kept_without_overwrite(place, capsys, name, link):
    command, file = SINGLE[name]
    arguments = command if name.endswith("its picture") else (*command, file)
    Path("theirs").write_bytes(THEIRS)
    {"file": shutil.copy, "symbolic link": os.symlink, "hard link": os.link}[link]("theirs", file)
    before = files(place)
    assert run(*arguments) == 2
    assert f"{file}: exists already: --overwrite replaces it" in " ".join(capsys.readouterr().err.split())
    assert files(place) == before
    if link == "symbolic link":
        assert run(*arguments, "--overwrite") == 0, capsys.readouterr().err
        assert Path(file).read_bytes() != THEIRS
        assert Path("theirs").read_bytes() == THEIRS  # what a link led to is no file that was named
        assert not Path(file).is_symlink()


# A file that is read too, under another name where there is one.
READ = {
    "inspect: the manifest": ("inspect", "made", *SMALL, "--html", "made/manifest.json"),
    "inspect: the recipe": ("inspect", "resnet10t", *SMALL, "--recipe", "./my.yaml", "--html", "my.yaml"),
    "inspect: the code": ("inspect", "net_for_files:Net", *SMALL, "--html", "net_for_files.py"),
    "inspect: a link to it": ("inspect", "made", *SMALL, "--html", "linked.html"),
    "convert: the checkpoint": (
        *("convert", "resnet10t", *SMALL, "--checkpoint", "w.pth", "-o", "new", "--html", "w.pth"),
    ),
    "convert: into what it converts": ("convert", "made", *SMALL, "--allow-growth", "-o", "made"),
    "convert: an image": (
        *("convert", "resnet10t", *SMALL, "--recipe", "calibrate", "--images", "photos"),
        *("-o", "new", "--html", "photos/a.png"),
    ),
    "bench model": ("bench", "model", "made", *SMALL, "--json", "made/report.json"),
    "export": ("export", "made", "--format", "onnx", "-o", "made/model.safetensors"),
    "visualize": ("visualize", "made", "photo.png", "-o", "photo.png"),
    "depth predict: the photo": (*PREDICT, "--depth", "small.png", "-o", "photo.png"),
    "depth predict: the depth map, for the picture": (*PREDICT, "--depth", "a_compare.png", "-o", "a.png"),
    "depth predict: the truth": (*PREDICT, "--depth", "small.png", "--truth", "truth.png", "-o", "truth.png"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_never_written_over(place, capsys, name):
    os.symlink("made/manifest.json", "linked.html")
    shutil.copy("small.png", "a_compare.png")
    shutil.copy("photo.png", "truth.png")
    Path("photos").mkdir()
    shutil.copy("photo.png", "photos/a.png")
    Path("my.yaml").write_text("name: mine\nstages: []\n")
    Path("net_for_files.py").write_text("from torch import nn\nNet = nn.Identity\n")
    torch.save(timm.create_model("resnet10t").state_dict(), "w.pth")
    before = files(place)
    for more in ([], ["--overwrite"]):
        assert run(*READ[name], *more) == 2
        assert "error: " in capsys.readouterr().err
        assert files(place) == before
    run(*READ[name], "--overwrite")
    assert "would replace what is read from" in " ".join(capsys.readouterr().err.split()) or "recipe" in name


def test_two_outputs_are_two_files(place, capsys):
    for command in (
        (*TINY_BENCH, "--json", "a.png", "--plot", "./a.png"),
        ("convert", "resnet10t", *SMALL, "-o", "new", "--html", "new/report.json"),
    ):
        assert run(*command) == 2
        assert "is what --" in " ".join(capsys.readouterr().err.split())
    assert not Path("new").exists()


@pytest.mark.parametrize("file", ["/dev/null", "x" * 300, "nul\0byte", "fifo"])
def test_names_that_are_no_files(place, file):
    os.mkfifo("fifo")
    with pytest.raises(UsageError):
        check_output("--html", Path(file), overwrite=True)


# --- folders ---

KINDS = {
    "weights": ("model.safetensors", THEIRS),
    "report": ("report.json", THEIRS),
    "a folder": ("model.safetensors/deeper", THEIRS),
    "a manifest of something else": ("manifest.json", b'{"format": "webextension", "format_version": 3}'),
    "a manifest that is a list": ("manifest.json", b"[]"),
    "a manifest of a web page": ("manifest.json", b'{"name": "app", "icons": []}'),
    "a manifest that is no JSON": ("manifest.json", THEIRS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overwrite", [False, True])
def test_convert_keeps_what_it_did_not_write(place, capsys, kind, overwrite):
    name, content = KINDS[kind]
    Path("theirs", name).parent.mkdir(parents=True)
    Path("theirs", name).write_bytes(content)
    Path("theirs", "config.json").write_bytes(THEIRS)
    before = files(place)
    assert run("convert", "resnet10t", *SMALL, "-o", "theirs", *(["--overwrite"] if overwrite else [])) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"theirs/{name.partition('/')[0]} is in the way" in said
    assert "move it away, or choose another folder" in said
    assert files(place) == before


def test_the_checkpoint_in_the_output_folder_is_not_lost(place):
    Path("u").mkdir()
    safetensors.torch.save_file(timm.create_model("resnet10t").state_dict(), "u/model.safetensors")
    before = files(place)
    for more in ([], ["--overwrite"]):
        assert run("convert", "resnet10t", *SMALL, "--checkpoint", "u/model.safetensors", "-o", "u", *more) == 2
        assert files(place) == before


def test_save_leaves_files_alone_that_it_does_not_write(tmp_path):
    for name in ("original.safetensors", "report.json", "config.json"):
        (tmp_path / name).write_bytes(THEIRS)
    ddf.save(tiny(), tmp_path)
    ddf.save(tiny(2), tmp_path)  # nor does it clear them away
    assert all((tmp_path / name).read_bytes() == THEIRS for name in ("original.safetensors", "report.json"))
    before = files(tmp_path)
    with pytest.raises(ArtifactError, match=r"original\.safetensors is in the way"):
        ddf.save(tiny(3), tmp_path, original=tiny())
    with pytest.raises(ArtifactError, match=r"report\.json is in the way"):
        ddf.save(tiny(3), tmp_path, report={})
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "original.safetensors"])
def test_a_file_of_an_artifact_that_was_replaced_is_the_users(tmp_path, name):
    ddf.save(tiny(), tmp_path, report={}, original=tiny())
    size = (tmp_path / name).stat().st_size
    (tmp_path / name).write_bytes(THEIRS.ljust(size, b" ")[:size])
    before = files(tmp_path)
    with pytest.raises(ArtifactError, match=f"{name} is in the way: it is not the file that manifest.json describes"):
        ddf.save(tiny(2), tmp_path, report={}, original=tiny())
    assert files(tmp_path) == before
    if name != "model.safetensors":  # no longer written, and not removed either
        ddf.save(tiny(2), tmp_path)
        assert (tmp_path / name).read_bytes() == before[name]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    (tmp_path / "note").write_text("")
    write = atomic.write_tensors

    def slow(tensors, file):
        write(tensors, file)
        (tmp_path / "model.safetensors").write_bytes(THEIRS)

    monkeypatch.setattr("ddf_convert.artifacts.artifact.write_tensors", slow)
    with pytest.raises(ArtifactError, match="changed meanwhile; nothing was written"):
        ddf.save(tiny(), tmp_path)
    assert files(tmp_path) == {"note": b"", "model.safetensors": THEIRS}


def test_folders_of_other_versions_are_replaced(tmp_path):
    ddf.save(tiny(), tmp_path, report={})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99, "surprise": 1}))
    ddf.save(tiny(2), tmp_path)
    assert sorted(files(tmp_path)) == ["manifest.json", "model.safetensors"]


def test_an_output_that_is_a_link_to_a_folder_or_to_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    ddf.save(tiny(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "manifest.json").is_file()
    with pytest.raises(ArtifactError, match="dangling is a link to nothing"):
        ddf.save(tiny(), tmp_path / "dangling")


# The folders of runs: the command, and a file of the user's that it would have written over.
RUNS = {
    "finetune: settings of something else": ("finetune", "settings.json", b'{"editor.fontSize": 12}'),
    "finetune: settings that are a list": ("finetune", "settings.json", b"[]"),
    "finetune: anything": ("finetune", "log.csv", THEIRS),
    "depth train: settings of something else": ("depth train", "settings.json", b'{"editor.fontSize": 12}'),
    "depth train: anything": ("depth train", "log.jsonl", THEIRS),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("resume", [False, True])
def test_runs_begin_in_folders_of_their_own(place, capsys, name, resume):
    command, file, content = RUNS[name]
    for part, source in (("rgb", "photo.png"), ("depth", "truth.png")):
        Path("data", part).mkdir(parents=True)
        Image.fromarray(np.full((64, 64), 1000, np.uint16)).save("truth.png")
        shutil.copy(source, Path("data", part, "a.png"))
    Path("theirs").mkdir()
    Path("theirs", file).write_bytes(content)
    before = files(place)
    data = ("made", "--data", "data/rgb") if command == "finetune" else ("data",)
    assert run(*command.split(), *data, "-o", "theirs", *(["--resume"] if resume else [])) == 2
    assert "give another folder" in " ".join(capsys.readouterr().err.split())
    assert files(place) == before


def test_a_run_does_not_replace_models_whose_checkpoints_are_gone(place, capsys):
    from ddf_convert.training.run_dir import FinetuneRun

    Path("run").mkdir()
    Path("run/settings.json").write_text('{"format_version": 1, "world": 1}')
    ddf.save(tiny(), "run/best")
    with pytest.raises(UsageError, match="no checkpoint to go on from: give another folder"):
        FinetuneRun(Path("run")).check(resume=False)
    Path("run/best/model.safetensors").write_bytes(THEIRS)
    with pytest.raises(ArtifactError, match=r"best/model\.safetensors is in the way"):
        ddf.save(tiny(), "run/best")
