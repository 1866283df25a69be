"""README.md and docs/ stay true: programs and commands print what they say, and the files that they name exist."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import typer
from support.paths import ROOT

from ddf_convert import cli

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
# What the reader's own commands write, and what comes before the site is built.
PRODUCTS = {"resnet50-ddf/model.safetensors", "demo-output/", "site/", "DIR/report.json"}

FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"\.?[\w*-][\w.*-]*(/[\w.*-]+)*/?")
MADE = {"changelog.md", "contributing.md", "resnet50.html"}  # by docs/hooks, for the site
# "$ ddf-convert ...", and its output, until the next command or the end of the block.
SHOWN = re.compile(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
LAUNCHED = re.compile(r"(?:^|-m )ddf[-_]convert (.+)")


def fenced(page: Path) -> list[tuple[str, str]]:
    return FENCED.findall(page.read_text(encoding="utf-8"))


def named(page: Path) -> Iterator[str]:
    """What looks like a path of this repository: linked to, or between backticks."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target and target not in MADE:
            yield (page.parent / target).resolve().relative_to(ROOT).as_posix()
    for code in re.findall(r"`([^`]+)`", text):
        known = code.endswith((".md", ".toml")) or code in ("Makefile", "constraints.txt", "CITATION.cff")
        if PATH.fullmatch(code) and ("/" in code or known) and code not in PRODUCTS:
            yield code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_exists(page):
    assert [path for path in sorted(set(named(page))) if not any(ROOT.glob(path.rstrip("/")))] == []


def test_pages_name_the_versions_that_are_needed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    least = dict(re.findall(r"([\w-]+)>=([\d.]+)", " ".join(project["dependencies"])))
    needed = (
        f"It needs Python 3.11, torch {least['torch']}, timm {least['timm']} and numba {least['numba']}, each or newer"
    )
    assert project["requires-python"] == ">=3.11"
    for page in PAGES:
        words = " ".join(page.read_text(encoding="utf-8").split())
        assert "It needs Python" not in words or needed in words, page.name


def programs() -> list[tuple[str, str]]:
    """Each Python program of the pages and the output that stands under it; what several pages show, once."""
    found = {}
    for page in PAGES:
        blocks = fenced(page)
        for place, (language, code) in enumerate(blocks):
            if language == "python":
                following, output = blocks[place + 1]
                assert following == "text", f"{page.name}: a program without its output: {code}"
                assert found.setdefault(code, output) == output
    return list(found.items())


@pytest.mark.slow
@pytest.mark.parametrize(("code", "output"), programs())
def test_programs_print_what_their_page_says(code, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == output


def console() -> Iterator[tuple[str, str]]:
    """Each command line of the pages and the output that stands under it, which can be empty."""
    for page in PAGES:
        for language, code in fenced(page):
            if language == "console":
                yield from SHOWN.findall(code)


def figures() -> list[tuple[str, ...]]:
    """The rows of the tables of figures: the command, parameters and MACs."""
    texts = (page.read_text(encoding="utf-8") for page in PAGES)
    row = re.compile(r"^\| \S+ \| `ddf-convert (.+?)` \| (.+?) -> (.+?) \| (.+?) -> (.+?) \|", re.MULTILINE)
    return sorted({found for text in texts for found in row.findall(text)})


def commands() -> dict[str, list[str]]:
    """Each ddf-convert command that shows its output somewhere, and what is shown of it."""
    found: dict[str, list[str]] = {arguments: [] for arguments, *_ in figures()}
    for line, output in console():
        if line.startswith("ddf-convert ") and output.strip() and output not in found.get(line[12:], ()):
            found.setdefault(line[12:], []).append(output)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "outputs"), commands().items())
def test_commands_print_what_their_pages_say(arguments, outputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.run(shlex.split(arguments)) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    for output in outputs:
        place = 0
        for shown in output.strip("\n").split("\n...\n"):  # three dots stand for lines left out
            shown = shown.removeprefix("...\n")
            assert shown in printed[place:]
            place = printed.index(shown, place) + len(shown)
    totals = re.findall(r"^(?:parameters|MACs) +(\S+ \w)  +(\S+ \w)", printed, re.MULTILINE)
    for command, *expected in figures():
        if command == arguments:
            assert [number for pair in totals for number in pair] == expected


def arguments_of(lines: Iterable[str]) -> set[str]:
    """What follows ddf-convert, also under torchrun, without comments and redirections."""
    found = (LAUNCHED.search(re.sub(r"\s+# .*", "", line)) for line in lines)
    return {re.sub(r"\s+", " ", match[1]).split(" > ")[0] for match in found if match} - set(commands())


def written() -> set[str]:
    """Every command of the pages' console blocks that is not run above."""
    return arguments_of(line for line, _ in console())


def mentioned() -> set[str]:
    """Every other command that stands between backticks; it may leave out what does not matter there."""
    texts = (FENCED.sub("", page.read_text(encoding="utf-8")) for page in PAGES)
    found = (line for text in texts for line in re.findall(r"`(ddf-convert [^`]+)`", text))
    return arguments_of(found) - written() - set(parts())


@functools.cache
def application() -> typer.main.TyperGroup:
    return typer.main.get_command(cli.app)


def parts() -> Iterator[str]:
    """The names of the commands, which a page may say without all that they need: ``bench up``."""
    pending = [("", application())]
    for name, command in pending:
        children = getattr(command, "commands", {})
        pending += [(f"{name} {child}".strip(), children[child]) for child in children]
        yield name


@pytest.mark.parametrize("line", sorted(written() | mentioned()))
def test_commands_exist_with_their_options(line):
    """Parsed, and not run: an option or a command that does not exist is an error."""
    assert "-completion" not in line  # to parse that is to install it
    command, path = application(), "ddf-convert"
    arguments = cli.repeat_options(shlex.split(line))
    while True:
        try:
            context = command.make_context(path, list(arguments))
        except typer.Exit:  # --help and --version
            return
        except Exception as error:  # of whichever copy of click typer carries
            if type(error).__name__ == "MissingParameter" and line in mentioned():
                return
            raise
        if not hasattr(command, "commands"):
            return
        name, *arguments = [*context._protected_args, *context.args]
        assert name in command.commands, f"{path} has no command {name}"
        command, path = command.commands[name], f"{path} {name}"


def test_there_is_something_to_check():
    assert len(programs()) >= 10
    assert len(commands()) >= 6
    assert len(written()) >= 20
    assert len(figures()) == 3
    assert all(any(named(page)) for page in PAGES if page.name in ("README.md", "architecture.md"))
