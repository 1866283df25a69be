"""README.md and docs/ stay true: their commands print what they say, and the files that they name exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddf_convert import cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PRODUCTS = {"resnet50-ddf/model.safetensors", "demo-output/"}  # what the reader's own commands write

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"\.?[\w*-][\w.*-]*(/[\w.*-]+)*/?")
SHOWN = re.compile(r"^\$ ddf-convert (.+)\n((?:(?!\$ ).*\n)+)", re.MULTILINE)


def paths(page: Path) -> Iterator[str]:
    """What looks like a path of this repository: linked to, or between backticks."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            yield (page.parent / target).resolve().relative_to(ROOT).as_posix()
    for code in re.findall(r"`([^`]+)`", text):
        known = code.endswith((".md", ".toml")) or code in ("Makefile", "constraints.txt")
        if PATH.fullmatch(code) and ("/" in code or known) and code not in PRODUCTS:
            yield code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page):
    named = sorted(set(paths(page)))
    assert named
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


def readme() -> list[tuple[str, str]]:
    return FENCED.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def programs() -> list[tuple[str, str]]:
    """Each Python program of a page and the output that stands under it."""
    found = []
    for page in PAGES:
        blocks = FENCED.findall(page.read_text(encoding="utf-8"))
        found += [(code, blocks[place + 1][1]) for place, (language, code) in enumerate(blocks) if language == "python"]
    return found


@pytest.mark.parametrize(("code", "output"), programs())
def test_programs_print_what_their_page_says(code, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == output


def commands() -> list[tuple[str, str]]:
    """Each command that shows its output, and that output."""
    shown = [pair for language, code in readme() if language == "console" for pair in SHOWN.findall(code)]
    return [(arguments, output) for arguments, output in shown if output.strip()]


@pytest.mark.parametrize(("arguments", "output"), commands())
def test_the_readmes_commands_print_what_it_says(arguments, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(arguments.split()) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    place = 0
    for shown in output.strip("\n").split("\n...\n"):  # three dots stand for lines left out
        shown = shown.removeprefix("...\n")
        assert shown in printed[place:]
        place = printed.index(shown, place) + len(shown)


def figures() -> list[tuple[str, ...]]:
    """The rows of the table of figures: the command, parameters and MACs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \S+ \| `ddf-convert (.+?)` \| (.+?) -> (.+?) \| (.+?) -> (.+?) \|", text, re.MULTILINE)


@pytest.mark.parametrize("row", figures(), ids=lambda row: row[0])
def test_the_readmes_figures_are_those_of_their_commands(row, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    arguments, *expected = row
    assert cli.run(arguments.split()) == 0
    found = re.findall(r"^(?:parameters|MACs) +(\S+ \w)  +(\S+ \w)", capsys.readouterr().out, re.MULTILINE)
    assert [number for pair in found for number in pair] == expected


def test_there_is_something_to_check():
    assert len(programs()) >= 4
    assert len(commands()) >= 4
    assert len(figures()) == 3
