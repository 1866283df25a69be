"""Where commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)
# Loggers that tell of an error at length (a traceback, every retry) before it reaches the user as one line, or that
# torch finds no GPU, or no Triton, when nobody asked for one.
_WORDY = ("torch._subclasses.fake_tensor", "torch.utils.cpp_extension", "torch.utils.flop_counter", "huggingface_hub")


def print_json(value: Any) -> None:
    """Prints a document, and nothing but it."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_file(what: str, file: Path, more: str = "") -> None:
    """Says in a line of its own, which is not wrapped, where something was written."""
    out.print(f"{what}: [bold]{escape(str(file))}[/]{escape(more)}", soft_wrap=True)


def hush() -> None:
    """Keeps the loggers silent that would say at length what an error says in a line."""
    for name in _WORDY:
        logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def busy(doing: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something takes its time, on a terminal only; yields what changes its words."""
    with err.status(f"{escape(doing)} ...") as status:
        yield lambda words: status.update(f"{escape(words)} ...")


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """What models, data and libraries print while they work goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
