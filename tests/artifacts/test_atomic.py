"""Atomic writes: interrupted at any moment, on full disks, by processes that are killed."""

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

import pytest
import safetensors.torch
from support.artifacts import files, tiny
from torch import nn

import ddf_convert as ddf
from ddf_convert.artifacts import artifact, atomic
from ddf_convert.artifacts.artifact import read_manifest, restore, save
from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import ArtifactError, DDFError, UsageError

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


@pytest.mark.slow
def test_every_writer_says_in_a_line_that_the_disk_is_full(tmp_path):
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
    ran = limited(code, tmp_path)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 6
    for line, name in zip(lines, ("new/model", "report", "original", "net", "page.html", "checkpoints"), strict=True):
        assert line.startswith("DDFError 0 "), line
        assert name in line
        assert "File too large" in line
    left = [str(path) for path in tmp_path.rglob("*") if path.name.startswith(".saving") or path.name == "page.html"]
    assert left == []


@pytest.mark.parametrize("errno", [28, 122])
def test_a_full_disk_in_safetensors_words(tmp_path, monkeypatch, errno):
    def full(*arguments, **options):
        raise safetensors.SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno})")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(DDFError, match=f"could not write .*: {os.strerror(errno)}") as caught:
        ddf.save(tiny(), tmp_path / "out")
    assert not isinstance(caught.value, UsageError)
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_a_full_disk_behind_stdout(tmp_path):
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


@pytest.mark.slow
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
        ddf.save(tiny(), tmp_path / into) if what == "folder" else write_file(tmp_path / "there" / "c", "d")

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
    ddf.save(tiny(), tmp_path)
    listdir = os.listdir

    def read_first(path: Any) -> list[str]:
        found = listdir(path)
        if Path(path).name == ".commit":  # the manifest is in place, the weights are not
            ddf.restore(tiny(), tmp_path)
        return found

    monkeypatch.setattr(atomic.os, "listdir", read_first)
    ddf.save(tiny(2), tmp_path)
    monkeypatch.undo()
    assert ddf.restore(tiny(), tmp_path)[0].weight.mean() == 2
    assert sorted(files(tmp_path)) == ["manifest.json", "model.safetensors"]


def test_a_commit_that_older_versions_left_is_finished(tmp_path):
    ddf.save(tiny(2), tmp_path)
    os.rename(tmp_path / "model.safetensors", tmp_path / "model.safetensors.new")
    assert ddf.restore(tiny(), tmp_path)[0].weight.mean() == 2
    assert sorted(files(tmp_path)) == ["manifest.json", "model.safetensors"]


# --- places that cannot be written ---


def place_file(path):
    path.write_text("")
    return path


def place_under_file(path):
    path.write_text("")
    return path / "deeper" / "out"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (place_file, "is a file"),
        (place_under_file, "is a file"),
        (lambda path: path / ("x" * 300), "cannot write to .*name too long"),
        (lambda path: path / "nul\0byte", "cannot write to"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, place, message, model):
    path = place(tmp_path / "here")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (artifact.check_writable, lambda path: save(model, path)):
        with pytest.raises(ArtifactError, match=f"(?i){message}"):
            attempt(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_without_permission(tmp_path, model, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", refuse)  # root may write anywhere, so chmod proves nothing
    for attempt in (artifact.check_writable, lambda path: save(model, path)):
        with pytest.raises(ArtifactError, match=r"cannot write to .*out: Permission denied; choose another folder"):
            attempt(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_check_writable_leaves_nothing_and_save_makes_parents(tmp_path, model):
    artifact.check_writable(tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == []
    save(model, tmp_path / "a" / "b")
    assert os.listdir(tmp_path / "a") == ["b"]


# --- interruptions ---


class Killed(BaseException):
    """As if the power went."""


def killed_at(count, monkeypatch):
    """Makes the ``count``-th step of writing the last one, with no cleaning up after it."""
    steps = {"left": count}

    def interrupted(call):
        def wrapped(*args, **kwargs):
            if steps["left"] == 0:
                raise Killed
            steps["left"] -= 1
            return call(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(atomic.os, "replace", interrupted(os.replace))
    monkeypatch.setattr(atomic.os, "rename", interrupted(os.rename))
    monkeypatch.setattr(atomic.os, "fsync", interrupted(os.fsync))
    monkeypatch.setattr(artifact.safetensors.torch, "save_file", interrupted(safetensors.torch.save_file))
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *args, **kwargs: None)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("second_report", [True, False])
def test_interrupted_at_any_moment_it_is_old_or_new(tmp_path, existing, second_report):
    """Killed at each step in turn; read after it; and saved again after it."""
    old, new, third = 1.0, 2.0, 3.0
    seen = set()
    for count in range(100):
        path = tmp_path / str(count)
        if existing:
            model, report = tiny(old), {"value": old}
            save(model, path, report=report)
        model, report = tiny(new), {"value": new}
        with pytest.MonkeyPatch.context() as patch:
            killed_at(count, patch)
            try:
                save(model, path, report=report if second_report else None)
                done = True
            except Killed:
                done = False
        copied = shutil.copytree(path, tmp_path / f"{count} again") if path.exists() else None
        if not path.exists():
            assert not existing
            found = None
        else:
            found = restore(nn.Sequential(nn.Conv2d(3, 2, 1)), path)[0].weight.mean().item()
            manifest = read_manifest(path)
            if manifest.report is not None:
                assert json.loads((path / "report.json").read_text()) == {"value": found}
        assert found in ({old, new} if existing else {None, new})
        seen.add(found)
        if copied:  # a save that meets an interrupted one, and is interrupted in turn before its own manifest
            with pytest.MonkeyPatch.context() as patch:
                killed_at(1, patch)
                with pytest.raises(Killed):
                    save(tiny(third), copied)
            assert restore(nn.Sequential(nn.Conv2d(3, 2, 1)), copied)[0].weight.mean().item() in (found, third)
            save(tiny(third), copied)
            assert restore(nn.Sequential(nn.Conv2d(3, 2, 1)), copied)[0].weight.mean().item() == third
        if done:
            break
    assert done
    assert found == new
    assert len(seen) == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, model, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact.safetensors.torch, "save_file", full)
    with pytest.raises(DDFError, match=r"could not write .*out: No space left on device"):
        save(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_files_are_as_readable_as_any_other(tmp_path, model):
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    save(model, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_saving_over_an_artifact_replaces_it(tmp_path):
    for value in (1.0, 2.0):
        model, report = tiny(value), {"value": value}
        save(model, tmp_path / "out", report=report)
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors", "report.json"]
    save(model, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]
