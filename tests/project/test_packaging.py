"""What a user installs: the sdist, the wheel that is built from it, and commands that run from that wheel alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from collections.abc import Iterable, Iterator
from email.parser import Parser
from itertools import chain
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.paths import ROOT

from ddf_convert.version import __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NAME = f"ddf_convert-{__version__}"
# Of the repository the sdist has all, so that the tests and `make demo` run from it. Left out here: what runs leave.
FOLDERS = ("ddf_convert", "tests", "docs", "examples", "scripts")
TEMPLATES = ("page.html.jinja", "chart.html.jinja", "page.css")
FILES = ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "pyproject.toml")


def run(*command: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def names(requirements: Iterable[str]) -> set[str]:
    """The packages of requirements; comments are none."""
    return {canonicalize_name(Requirement(line).name) for line in requirements if not line.startswith("#")}


def files(folder: Path) -> Iterator[str]:
    """The files of the repository below a folder, but for compiled ones."""
    for file in folder.glob("**/*"):
        if file.is_file() and "__pycache__" not in file.parts:
            yield file.relative_to(ROOT).as_posix()


# Extras may be made of others, which are "ddf-convert[...]" there.
ASKED_FOR = names(chain(PROJECT["dependencies"], *EXTRAS.values())) - {PROJECT["name"]}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, unpacked. Hatchling is called without pip, which would ask a registry for it."""
    folder = tmp_path_factory.mktemp("sdist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel, built from the sdist as a registry's users may have to."""
    run("-m", "hatchling", "build", "-t", "wheel", "-d", sdist.parent, folder=sdist)
    return sdist.parent / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "installed"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", folder, wheel, folder=ROOT)
    return folder


@pytest.mark.slow
def test_the_sdist_is_the_repository(sdist):
    there = {file.relative_to(sdist).as_posix() for file in sdist.glob("**/*") if file.is_file()}
    assert {file for folder in FOLDERS for file in files(ROOT / folder)} - there == set()
    assert set(FILES) <= there
    assert not {file for file in there if file.endswith((".pyc", ".jsonl")) or file.startswith((".venv/", "site/"))}


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    with ZipFile(wheel) as archive:
        there = {name for name in archive.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        assert there == set(files(ROOT / "ddf_convert"))
        assert archive.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    data = {"py.typed", "recipes/builtin/paper.yaml", *(f"report/templates/{name}" for name in TEMPLATES)}
    assert {f"ddf_convert/{name}" for name in data} <= there


def test_the_metadata_say_what_pyproject_says(wheel):
    with ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)
    assert names(metadata.get_all("Requires-Dist")) == ASKED_FOR
    for_tests = [Requirement(line) for line in metadata.get_all("Requires-Dist") if line.endswith("extra == 'dev'")]
    assert any(line.name == "numba-cuda" and "Darwin" in str(line.marker) for line in for_tests)
    assert metadata.get_payload() == README


def test_readme_names_the_oldest_versions():
    oldest = dict(line.split(">=") for line in PROJECT["dependencies"])
    oldest["Python"] = PROJECT["requires-python"].removeprefix(">=")
    told = " ".join(README.split())
    for package in ("Python", "torch", "timm", "numba"):
        assert re.search(rf"\b{package} {re.escape(oldest[package])}(?![.\d])", told), package


def test_every_package_that_is_asked_for_is_pinned():
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert ASKED_FOR - names(pins) == set()


# One process for all that is run: torch is imported once.
USE = """
import runpy, sys
for command in ("--version", "convert test_resnet -o converted --recipe preserve --html page.html"):
    sys.argv = ["ddf-convert", *command.split()]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
import ddf_convert
print(ddf_convert.__file__)
"""


@pytest.mark.slow
def test_commands_run_from_the_wheel_alone(installed, tmp_path):
    program = USE.replace("SCRIPT", repr(str(installed / "bin" / "ddf-convert")))
    # Without `site` no .pth is read, so that the repository, which is installed as editable, cannot be imported.
    packages = dict.fromkeys([str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    done = run("-S", "-c", program, folder=tmp_path, PYTHONPATH=os.pathsep.join(packages))
    said = done.stdout.splitlines()
    assert said[0] == f"ddf-convert {__version__}"
    assert said[-1] == str(installed / "ddf_convert" / "__init__.py")
    manifest = json.loads((tmp_path / "converted" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["versions"]["ddf_convert"] == __version__
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    assert "<style>" in (tmp_path / "page.html").read_text(encoding="utf-8")  # page.css was found


@pytest.mark.slow
def test_its_types_are_seen_by_a_users_mypy(installed, tmp_path):
    (tmp_path / "program.py").write_text("import ddf_convert\nreveal_type(ddf_convert.count_parameters)\n")
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n[mypy-torch.*,timm.*,torchvision.*,numpy.*,numba.*,rich.*,pydantic.*]\nfollow_imports = skip\n"
    )
    done = run("-m", "mypy", "program.py", folder=tmp_path, PYTHONPATH=str(installed))
    assert re.search(r"""Revealed type is ["']def \(.*\) -> (builtins\.)?int["']""", done.stdout), done.stdout
