"""What commands and ``save`` may write over, what is left when writing fails, and what files of others may ask for."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import nn

import ddf_convert as ddf
from ddf_convert import cli
from ddf_convert.artifacts import atomic
from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_output
from ddf_convert.depth import checkpoint as networks
from ddf_convert.depth.maps import Unit
from ddf_convert.errors import ArtifactError, DDFError, UsageError
from ddf_convert.models.ddf_upnet import DDFUpNet

SMALL = ("--input-size", "3", "64", "64")
TINY_BENCH = ("bench", "op", "--resolution", 4, "--channels", 4, "--batch", 1, "--seconds", 0.001, "--no-compile")
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


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# --- commands ---

# Everything that writes a file that the user names: the command, and that file.
SINGLE = {
    "inspect --html": (("inspect", "resnet10t", *SMALL, "--html"), "page.html"),
    "bench --json": ((*TINY_BENCH, "--json"), "figures.json"),
    "bench --plot": ((*TINY_BENCH, "--plot"), "figures.png"),
    "export": (("export", "made", *SMALL, "--static", "-o"), "model.pt2"),
    "visualize": (("visualize", "made", "photo.png", *SMALL, "-o"), "filters.png"),
    "upsample": (
        ("upsample", "--rgb", "photo.png", "--depth", "small.png", "--checkpoint", "network", "--no-picture", "-o"),
        "large.png",
    ),
    "upsample, its picture": (
        ("upsample", "--rgb", "photo.png", "--depth", "small.png", "--checkpoint", "network", "-o", "large.png"),
        "large_compare.png",
    ),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("link", ["file", "symbolic link", "hard link"])
def test_a_file_that_exists_is_kept_without_overwrite(place, capsys, name, link):
    command, file = SINGLE[name]
    arguments = command if name.endswith("its picture") else (*command, file)
    Path("theirs").write_bytes(THEIRS)
    {"file": shutil.copy, "symbolic link": os.symlink, "hard link": os.link}[link]("theirs", file)
    before = files(place)
    assert run(*arguments) == 2
    assert f"{file}: exists already: --overwrite replaces it" in " ".join(capsys.readouterr().err.split())
    assert files(place) == before
    if link == "symbolic link" and name in ("inspect --html", "upsample"):  # one of each way to write; these are quick
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
        "convert",
        "resnet10t",
        *SMALL,
        "--checkpoint",
        "w.pth",
        "-o",
        "new",
        "--html",
        "w.pth",
    ),
    "convert: into what it converts": ("convert", "made", *SMALL, "--allow-growth", "-o", "made"),
    "convert: an image": (
        *("convert", "resnet10t", *SMALL, "--recipe", "calibrate", "--images", "photos"),
        *("-o", "new", "--html", "photos/a.png"),
    ),
    "bench model": ("bench", "model", "made", *SMALL, "--json", "made/report.json"),
    "export": ("export", "made", "--format", "onnx", "-o", "made/model.safetensors"),
    "visualize": ("visualize", "made", "photo.png", "-o", "photo.png"),
    "upsample: the photo": (
        *("upsample", "--rgb", "photo.png", "--depth", "small.png", "--checkpoint", "network", "-o", "photo.png"),
    ),
    "upsample: the depth map, for the picture": (
        *("upsample", "--rgb", "photo.png", "--depth", "a_compare.png", "--checkpoint", "network", "-o", "a.png"),
    ),
    "upsample: the truth": (
        *("upsample", "--rgb", "photo.png", "--depth", "small.png", "--checkpoint", "network"),
        *("--truth", "truth.png", "-o", "truth.png"),
    ),
}


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


def model(value: float = 1.0) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(3, 2, 1))
    nn.init.constant_(made[0].weight, value)
    return made


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
    ddf.save(model(), tmp_path)
    ddf.save(model(2), tmp_path)  # nor does it clear them away
    assert all((tmp_path / name).read_bytes() == THEIRS for name in ("original.safetensors", "report.json"))
    before = files(tmp_path)
    with pytest.raises(ArtifactError, match=r"original\.safetensors is in the way"):
        ddf.save(model(3), tmp_path, original=model())
    with pytest.raises(ArtifactError, match=r"report\.json is in the way"):
        ddf.save(model(3), tmp_path, report={})
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "report.json", "original.safetensors"])
def test_a_file_of_an_artifact_that_was_replaced_is_the_users(tmp_path, name):
    ddf.save(model(), tmp_path, report={}, original=model())
    size = (tmp_path / name).stat().st_size
    (tmp_path / name).write_bytes(THEIRS.ljust(size, b" ")[:size])
    before = files(tmp_path)
    with pytest.raises(ArtifactError, match=f"{name} is in the way: it is not the file that manifest.json describes"):
        ddf.save(model(2), tmp_path, report={}, original=model())
    assert files(tmp_path) == before
    if name != "model.safetensors":  # no longer written, and not removed either
        ddf.save(model(2), tmp_path)
        assert (tmp_path / name).read_bytes() == before[name]


def test_a_file_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    (tmp_path / "note").write_text("")
    write = atomic.write_tensors

    def slow(tensors, file):
        write(tensors, file)
        (tmp_path / "model.safetensors").write_bytes(THEIRS)

    monkeypatch.setattr("ddf_convert.artifacts.artifact.write_tensors", slow)
    with pytest.raises(ArtifactError, match="changed meanwhile; nothing was written"):
        ddf.save(model(), tmp_path)
    assert files(tmp_path) == {"note": b"", "model.safetensors": THEIRS}


def test_folders_of_other_versions_are_replaced(tmp_path):
    ddf.save(model(), tmp_path, report={})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99, "surprise": 1}))
    ddf.save(model(2), tmp_path)
    assert sorted(files(tmp_path)) == ["manifest.json", "model.safetensors"]


def test_an_output_that_is_a_link_to_a_folder_or_to_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    ddf.save(model(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "manifest.json").is_file()
    with pytest.raises(ArtifactError, match="dangling is a link to nothing"):
        ddf.save(model(), tmp_path / "dangling")


# The folders of runs: the command, and a file of the user's that it would have written over.
RUNS = {
    "finetune: settings of something else": ("finetune", "settings.json", b'{"editor.fontSize": 12}'),
    "finetune: settings that are a list": ("finetune", "settings.json", b"[]"),
    "finetune: anything": ("finetune", "log.csv", THEIRS),
    "upsample-train: settings of something else": ("upsample-train", "settings.json", b'{"editor.fontSize": 12}'),
    "upsample-train: anything": ("upsample-train", "log.jsonl", THEIRS),
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
    assert run(command, *data, "-o", "theirs", *(["--resume"] if resume else [])) == 2
    assert "give another folder" in " ".join(capsys.readouterr().err.split())
    assert files(place) == before


def test_a_run_does_not_replace_models_whose_checkpoints_are_gone(place, capsys):
    from ddf_convert.training.run_dir import RunFolder

    Path("run").mkdir()
    Path("run/settings.json").write_text('{"format_version": 1, "world": 1}')
    ddf.save(model(), "run/best")
    with pytest.raises(UsageError, match="no checkpoint to go on from: give another folder"):
        RunFolder(Path("run")).check(resume=False)
    Path("run/best/model.safetensors").write_bytes(THEIRS)
    with pytest.raises(ArtifactError, match=r"best/model\.safetensors is in the way"):
        ddf.save(model(), "run/best")


# --- disks that are full, processes that are killed ---


def limited(code: str, place: Path, **limits: int) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that may write no larger files, or use no more memory, than so many bytes."""

    def limit() -> None:
        for name, most in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=place,
        preexec_fn=limit,
    )


def test_every_writer_says_in_a_line_that_the_disk_is_full(place):
    """The limit on the size of files fails where a full disk does, with another number and another word."""
    code = """
        import resource, torch
        import ddf_convert as ddf
        from pathlib import Path
        from ddf_convert.artifacts.atomic import write_file
        from ddf_convert.depth import checkpoint
        from ddf_convert.depth.maps import Unit
        from ddf_convert.models.ddf_upnet import DDFUpNet
        from ddf_convert.training.checkpoints import Checkpoints
        big = torch.nn.Linear(100, 100)
        writers = [
            lambda: ddf.save(big, "new/model"),
            lambda: ddf.save(torch.nn.Linear(1, 1), "report", report={"a": "x" * 30000}),
            lambda: ddf.save(torch.nn.Linear(1, 1), "original", original=big),
            lambda: checkpoint.save(DDFUpNet(), "net", Unit("mm"), downsample="nearest"),
            lambda: write_file(Path("page.html"), b"x" * 30000),
            lambda: Checkpoints("checkpoints").write({"a": torch.zeros(30000)}, 1),
        ]
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        for write in writers:
            try:
                write()
            except ddf.DDFError as error:
                print(type(error).__name__, str(error).count(chr(10)), error)
            else:
                print("written")
    """
    ran = limited(code, place)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 6
    for line, name in zip(lines, ("new/model", "report", "original", "net", "page.html", "checkpoints"), strict=True):
        assert line.startswith("DDFError 0 "), line
        assert name in line
        assert "File too large" in line
    left = [str(path) for path in place.rglob("*") if path.name.startswith(".saving") or path.name == "page.html"]
    assert left == []


@pytest.mark.parametrize("errno", [28, 122])
def test_a_full_disk_in_safetensors_words(tmp_path, monkeypatch, errno):
    def full(*arguments, **options):
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno})")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DDFError, match=f"could not write .*: {os.strerror(errno)}") as caught:
        ddf.save(model(), tmp_path / "out")
    assert not isinstance(caught.value, UsageError)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_behind_stdout(place):
    ran = subprocess.run(
        f"{sys.executable} -m ddf_convert inspect resnet10t --input-size 3 64 64 --json > /dev/full",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == ["error: stdout cannot be written: No space left on device"]


KILLED = """
    import os, sys, torch
    import ddf_convert as ddf
    from ddf_convert.artifacts import artifact, atomic
    from ddf_convert.artifacts.atomic import write_file
    from pathlib import Path
    def stop(*arguments):
        print("stopped", flush=True)
        sys.stdin.read()
    artifact.write_tensors = atomic.flush = stop
    {write}
"""


@pytest.mark.parametrize(
    ("what", "into"), [("folder", "there"), ("file", "new"), pytest.param("folder", "new", marks=pytest.mark.long)]
)
def test_leftovers_of_killed_processes_go_and_those_of_others_stay(tmp_path, what, into):
    (tmp_path / "there").mkdir()
    write = f"ddf.save(torch.nn.Linear(1, 1), '{into}')" if what == "folder" else "write_file(Path('there/a'), 'b')"
    code = textwrap.dedent(KILLED).format(write=write)
    writing = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert writing.stdout is not None
    assert writing.stdout.readline() == "stopped\n"

    def left() -> list[Path]:
        return sorted(tmp_path.rglob(".saving-*"))

    def save() -> None:
        ddf.save(model(), tmp_path / into) if what == "folder" else write_file(tmp_path / "there" / "c", "d")

    (running,) = left()
    save()
    assert left() == [running]
    writing.kill()
    writing.wait()
    theirs = running.with_name(".saving-for-later")
    theirs.write_text("the user's")
    assert running.exists()
    save()
    assert left() == [theirs]


def test_leftovers_where_nothing_can_be_locked_go_after_a_day(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    old, new = (tmp_path / f".saving-{letter * 32}" for letter in "ab")
    for leftover in (old, new):
        leftover.mkdir()
    os.utime(old, (0, 0))
    atomic.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [new.name]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        seen.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def replaced(*arguments: Any) -> None:
        seen.append("replace")
        replace(*arguments)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_file(tmp_path / "a", "text")
    assert seen == ["file", "replace", "folder"]


def test_a_reader_that_finishes_a_commit_does_not_disturb_its_writer(tmp_path, monkeypatch):
    ddf.save(model(), tmp_path)
    listdir = os.listdir

    def read_first(path: Any) -> list[str]:
        found = listdir(path)
        if Path(path).name == ".commit":  # the manifest is in place, the weights are not
            ddf.restore(model(), tmp_path)
        return found

    monkeypatch.setattr(atomic.os, "listdir", read_first)
    ddf.save(model(2), tmp_path)
    monkeypatch.undo()
    assert ddf.restore(model(), tmp_path)[0].weight.mean() == 2
    assert sorted(files(tmp_path)) == ["manifest.json", "model.safetensors"]


def test_a_commit_that_older_versions_left_is_finished(tmp_path):
    ddf.save(model(2), tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "model.safetensors.new")
    assert ddf.restore(model(), tmp_path)[0].weight.mean() == 2
    assert sorted(files(tmp_path)) == ["manifest.json", "model.safetensors"]
