"""A few cases of benchmarks/fuzz.py; and that it would see what it looks for."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz  # noqa: E402
from fuzz_parts.commands import commands  # noqa: E402
from fuzz_parts.guard import Guard, TooLong  # noqa: E402

CASES = 60  # of 5,000


@pytest.fixture(scope="module")
def guard():
    return Guard(fuzz.caches())


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    fuzz.prepare(folder)
    return folder


@pytest.fixture(autouse=True)
def where_it_was(monkeypatch):
    monkeypatch.chdir(os.getcwd())  # cases go elsewhere


def test_cases_pass(good, guard):
    wrong = [(number, *case) for number in range(CASES) if (case := fuzz.one(number, 1, good, guard))[2]]
    assert wrong == []


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


def test_the_guard_sees_what_must_not_happen(guard, tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    with guard.watching(inside, 60) as found:
        touch(inside)
        assert not found
        touch(inside / "link")
        os.rename(inside / "touched", outside / "moved")
        pickle.loads(pickle.dumps(Path("x")))
    events = [line.split(" ")[0] for line in found]
    assert events[:2] == ["open", "os.rename"]
    assert "pickle.find_class" in events
    touch(outside)  # nobody is watching now
    assert len(found) == len(events)
    with pytest.raises(TooLong), guard.watching(inside, 1):
        threading.Event().wait()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (["inspect", "test_resnet"], ""),
        (["inspect", "nothing"], ""),
        (["convert", "test_resnet", "-o", "elsewhere"], "elsewhere"),
    ],
    ids=["works", "is refused", "writes elsewhere"],
)
def test_command_lines_are_judged(line, wrong, guard, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    judged = fuzz.run(line, tmp_path / "out", guard)
    assert wrong in judged
    assert bool(judged) == bool(wrong)
