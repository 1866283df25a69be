"""Imports run one way: the line in docs/architecture.md, held against the source of every module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

FILES = sorted((ROOT / "ddf_convert").glob("**/*.py"))
WHOLE = "__init__"  # the package itself
ENTRIES = {"ddf_convert/bench/doctor.py", "ddf_convert/models/launch.py"}  # import it, to have its models registered

# Who may import what is not needed by everybody: of the rest of the package nobody has to wait for it, or to have it.
BELONGS_TO = {
    "typer": {"cli", "commands"},
    "rich": {"cli", "commands", "report", "bench", "training"},
    "matplotlib": {"bench", "training", "utils", "visualize"},
    "yaml": {"recipes"},
    "jinja2": {"report"},
    "h5py": {"depth"},
    "onnx": {"export"},
    "onnxruntime": {"export"},
    "onnxscript": {"export"},
    "numba": {"cpu", "cuda"},
    "llvmlite": {"cpu", "cuda"},
    "cuda": {"bench", "cuda"},
}


def place(module: str) -> str:
    """The module or folder of the package that a dotted name lies in."""
    return [*module.split("."), WHOLE][1]


def own_place(file: Path) -> str:
    return place(".".join(file.relative_to(ROOT).with_suffix("").parts))


def imported(file: Path) -> Iterator[str]:
    """Dotted names, wherever in the file they are imported."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            module = node.module or ""
            yield from [f"{module}.{alias.name}" for alias in node.names] if module == "ddf_convert" else [module]


def line() -> list[list[str]]:
    """The groups of the line, the importers first."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.search(r"^## One way in\n[\s\S]*?\n((?:    .+\n)+)", page, re.MULTILINE)
    assert found
    groups = " ".join(found[1].split()).split(" -> ")
    return [group.split(", ") for group in groups]


def beside() -> set[str]:
    """Those that import nothing of the line."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.search(r"^((?:`\w+`(?:,|\s+and)?\s)+)stand beside\s+this\s+line", page, re.MULTILINE)
    assert found
    return set(re.findall(r"`(\w+)`", found[1]))


RANK = {name: rank for rank, names in enumerate(line()) for name in names}


def test_every_module_has_its_place():
    assert {own_place(file) for file in FILES} - {WHOLE} == set(RANK) | beside()
    assert not set(RANK) & beside()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT / "ddf_convert").as_posix())
def test_imports_run_one_way(file):
    own = own_place(file)
    backwards = []
    for module in imported(file):
        if module.split(".")[0] != "ddf_convert" or own == WHOLE:
            continue
        other = place(module)
        if other == WHOLE:
            allowed = file.relative_to(ROOT).as_posix() in ENTRIES
        elif own in RANK:
            allowed = other == own or other not in RANK or RANK[own] < RANK[other]
        else:
            allowed = other not in RANK
        if not allowed:
            backwards.append(module)
    assert backwards == []


@pytest.mark.slow
@pytest.mark.parametrize("package", BELONGS_TO)
def test_what_only_some_need_is_imported_there(package):
    importers = {own_place(file) for file in FILES for module in imported(file) if module.split(".")[0] == package}
    assert importers == BELONGS_TO[package]
