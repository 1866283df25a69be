"""Some cases of benchmarks/fuzz.py; and that it would see what it looks for."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import threading
from pathlib import Path

import fuzz
import pytest
import torch
from fuzzing import artifacts, corrupt
from fuzzing.commands import command_line, commands
from fuzzing.sandbox import Sandbox, TooLongError
from torch import nn

import ddf_convert as ddf
from ddf_convert.artifacts import artifact

CASES = 150  # of 8,000 artifacts
LINES = 12  # of 2,000
QUICK = ("inspect", "recipes list", "recipes show", "depth predict")


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    fuzz.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def results(good, sandbox):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(os.getcwd())
        return [fuzz.run_case(number, 1, good, sandbox) for number in range(CASES * 5 // 4) if number % 5 != 4]


@pytest.mark.slow
def test_corrupted_artifacts_pass(results):
    assert [result for result in results if result.problems] == []


@pytest.mark.slow
def test_command_lines_pass(good, sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    rng = random.Random(1)
    drawn = (command_line(rng, good) for _ in range(10 * LINES))
    lines = [tuple(line) for words, line in drawn if " ".join(words) in QUICK][:LINES]
    ended = {line: fuzz.run_command(list(line), tmp_path, sandbox) for line in lines}
    assert {line: wrong for line, (_, wrong) in ended.items() if wrong} == {}
    codes = [code for code, _ in ended.values()]
    assert min(codes.count(0), codes.count(2)) >= LINES // 4


def test_cases_reach_every_check(results):
    assert list(fuzz.coverage_gaps(results)) == []
    assert {each.depth for each in results if each.outcome == "refused"} >= {
        "JSON",
        "schema",
        "hashes",
        "header",
        "shapes",
    }
    assert {each.name for each in results} == set(corrupt.corruption_names())


def test_gaps_of_coverage_are_reported(results):
    found = list(fuzz.coverage_gaps([result._replace(depth="schema") for result in results]))
    assert [words.split()[-1] for words in found] == ["hashes", "header", "shapes", "weights", "outputs"]
    dead = [fuzz.Result("command", "bench op", "2", "", "", "")] * fuzz.ENOUGH
    assert list(fuzz.coverage_gaps([*results, *dead])) == [f"none of {fuzz.ENOUGH} command lines of bench op worked"]
    alive = dead[0]._replace(depth="0")
    assert not list(fuzz.coverage_gaps([*results, *dead, alive]))


def test_the_table_counts_every_case_once(results):
    rows = [line.strip("| ").split(" | ") for line in fuzz.tables(results) if line.startswith("| ")]
    depths = rows[1 : 1 + len(artifacts.DEPTHS)]
    assert [row[0] for row in depths] == list(artifacts.DEPTHS)
    assert int(depths[0][1]) == CASES
    assert sum(int(row[2]) for row in depths[:-1]) + int(depths[-1][1]) == CASES
    assert sum(int(row[1]) for row in rows[1 + len(depths) :] if row[0] in corrupt.corruption_names()) == CASES


@pytest.mark.slow
@pytest.mark.parametrize("name", artifacts.GOOD)
@pytest.mark.parametrize("way", ["restore", "original"])
def test_a_good_artifact_is_loaded_and_run(name, way, good, sandbox, tmp_path):
    folder = shutil.copytree(good / name, tmp_path / name)
    assert artifacts.judge(good, folder, way, corrupt.SAME, sandbox) == ("outputs", "loaded", [])


def careless(model, folder):
    """A loader that changes the model and the folder before it refuses, with an error that is too long."""
    torch.rand(1)
    model.norm.bias.data[0] += 1
    model.norm = nn.Sequential(model.norm)
    (Path(folder) / "left").write_text("x")
    error = ddf.UsageError("")
    error.args = ("y\n" * artifacts.LONGEST_MESSAGE,)  # past what shortens messages
    raise error


def trusting(model, folder):
    """A loader that takes anything."""
    return model


@pytest.mark.parametrize(
    ("loader", "expected", "wrong"),
    [
        (careless, corrupt.EITHER, ["more than one line", "10000 characters", "model", "folder", "random state"]),
        (trusting, corrupt.REFUSED, ["accepted"]),
        (trusting, corrupt.SAME, ["another network"]),
        (lambda *_: 1 / 0, corrupt.REFUSED, ["ZeroDivisionError"]),
        (lambda *_: torch.ones(2**28).sum(), corrupt.EITHER, ["took 1"]),
    ],
    ids=["careless", "trusting", "forgetful", "broken", "greedy"],
)
def test_problems_of_a_loader_are_found(loader, expected, wrong, good, sandbox, tmp_path, monkeypatch):
    monkeypatch.setattr(ddf, "restore", loader)
    folder = shutil.copytree(good / "own", tmp_path / "own")
    judged = artifacts.judge(good, folder, "restore", expected, sandbox)[2]
    assert len(judged) == len(wrong)
    assert all(any(words in line for line in judged) for words in wrong)


@pytest.mark.parametrize("change", corrupt.corruption_names())
def test_corruptions_change_files_and_get_past_the_hashes(change, good, tmp_path, monkeypatch):
    chosen = [each for each in corrupt._corruptions if each[0].__name__.strip("_") == change]
    monkeypatch.setattr(corrupt, "_corruptions", chosen)
    folder = shutil.copytree(good / "own", tmp_path / "own")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, *_ = corrupt.corrupt(folder, "restore", random.Random(0))
    assert name == change
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after != before
    if after.get("model.safetensors") not in (None, before["model.safetensors"]) and "bytes" not in change:
        assert artifact.locate_files(folder, {"model.safetensors": artifact.read_manifest(folder).weights})


def test_every_command_is_known():
    assert {" ".join(words) for words in commands()} >= {
        "inspect",
        "convert",
        "export",
        "visualize",
        "finetune",
        "bench op",
        "recipes show",
    }


def touch(place):
    (place / "touched").write_text("x")


def spin():
    while True:
        pass


@pytest.mark.slow
def test_the_sandbox_notes_violations_and_ends_endless_code(sandbox, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    (outside / corrupt.ESCAPED).write_text("x")
    with sandbox.watching(inside, 60) as found:
        touch(inside)
        assert not found
        touch(inside / "link")
        os.rename(inside / "touched", outside / "moved")
        (outside / corrupt.ESCAPED).read_text()
        pickle.loads(pickle.dumps(Path("x")))
    events = [line.split(" ")[0] for line in found]
    assert events[:3] == ["open", "os.rename", "open"]
    assert "pickle.find_class" in events
    touch(outside)  # not watched
    assert len(found) == len(events)
    for endless in (threading.Event().wait, spin):
        with pytest.raises(TooLongError), sandbox.watching(inside, 0.1):
            endless()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "code", "wrong"),
    [
        (["inspect", "test_resnet"], 0, ""),
        (["inspect", "nothing"], 2, ""),
        (["convert", "test_resnet", "-o", "elsewhere"], 0, "elsewhere"),
    ],
    ids=["works", "is refused", "writes elsewhere"],
)
def test_problems_of_a_command_line_are_found(line, code, wrong, sandbox, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    ended, judged = fuzz.run_command(line, tmp_path / "out", sandbox)
    assert ended == code
    assert wrong in "; ".join(judged)
    assert bool(judged) == bool(wrong)
