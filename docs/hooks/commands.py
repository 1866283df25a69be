"""The reference of the command line, made of the commands themselves: every command, argument and option."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

from ddf_convert.cli import app

PLACE = "<!-- every command -->"
NAME = "ddf-convert"
EVERYWHERE = {"--help", "--debug", "--install-completion", "--show-completion"}  # commands.md says what they do
TYPE = re.compile(r" <\w+>$")
PROPERTIES = re.compile(r"\s*\[([^\[\]]*)\]$")  # "[default: 256; x>=1]", at the end of a help text


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the reference where a page asks for it."""
    return markdown.replace(PLACE, "\n".join(reference())) if PLACE in markdown else markdown


def reference() -> Iterator[str]:
    """The reference as lines of Markdown."""
    for path, command in commands():
        context = command.make_context(path, [], resilient_parsing=True)
        yield f"\n## {path}\n\n{command.help or ''}\n"
        usage = " ".join(command.collect_usage_pieces(context)).replace("{", "").replace("}", "")
        yield f"```text\n{path} {usage}\n```\n"
        for panel, rows in panels(command, context).items():
            yield f'<div class="options" markdown>\n\n| {panel} | | default |\n|---|---|---|'
            yield from (f"| `{names}` | {_cell(meaning)} | {_cell(default)} |" for names, meaning, default in rows)
            yield "\n</div>\n"


def commands() -> Iterator[tuple[str, Any]]:
    """Every command that is not hidden, groups included, by its full name, in the order in which they were made."""
    pending: list[tuple[str, Any]] = [(NAME, typer.main.get_command(app))]
    while pending:
        path, command = pending.pop(0)
        yield path, command
        children = getattr(command, "commands", {}).items()
        pending[:0] = [(f"{path} {name}", child) for name, child in children if not child.hidden]


def panels(command: Any, context: Any) -> dict[str, list[tuple[str, str, str]]]:
    """Name, meaning and default of every parameter of a command, by the panels that ``--help`` shows them in."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or EVERYWHERE & set(parameter.opts):
            continue
        panel = "Arguments" if parameter.param_type_name == "argument" else "Options"
        names, meaning = record
        names = TYPE.sub("", names) if panel == "Arguments" else names
        properties = PROPERTIES.search(meaning)
        known = dict(part.partition(": ")[::2] for part in properties[1].split("; ")) if properties else {}
        default = "required" if "required" in known else known.pop("default", "").strip("()")
        row = (names, PROPERTIES.sub("", meaning), default)
        found.setdefault(getattr(parameter, "rich_help_panel", None) or panel, []).append(row)
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
