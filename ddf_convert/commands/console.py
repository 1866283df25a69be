"""Where commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape

from ddf_convert.errors import DDFError

if TYPE_CHECKING:
    from rich.table import Table

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)
# They log an error (a traceback, every retry) before it reaches the user as one line, or that torch finds no GPU or
# Triton.
_VERBOSE_LOGGERS = (
    "torch._subclasses.fake_tensor",
    "torch.utils.cpp_extension",
    "torch.utils.flop_counter",
    "huggingface_hub",
)


def print_json(value: Any) -> None:
    """Prints a document as JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_file(what: str, file: Path, more: str = "") -> None:
    """Prints where something was written, in a line that is not wrapped."""
    out.print(f"{what}: [bold]{escape(str(file))}[/]{escape(more)}", soft_wrap=True)


def facts_table(rows: Iterable[tuple[str, str]], numbers: bool = False) -> Table:
    """Returns a table of names and values without a header; numbers are aligned to the right."""
    from rich.table import Column

    from ddf_convert.report.tables import new_table, numeric_column

    table = new_table(Column(""), numeric_column("") if numbers else Column("", overflow="fold"))
    table.show_header = False
    for name, value in rows:
        table.add_row(name, escape(value))
    return table


def silence_loggers() -> None:
    """Silences loggers that report at length what an error says in one line."""
    for name in _VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


class _Stream:
    """A standard stream whose failures are ignored, or one clear error if it has a name."""

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text != "":  # typer writes "" to learn what kind of stream it is, from whether that fails
            with self._handle_errors():
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._handle_errors():
            self._stream.flush()

    @contextlib.contextmanager
    def _handle_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._name is None:
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # Python writes the rest at exit
            if isinstance(error, BrokenPipeError):
                raise
            raise DDFError(f"{self._name} cannot be written: {error.strerror}") from error


def secure_streams() -> None:
    """Makes the three standard streams of this process usable, whatever the caller did to them.

    Streams that are closed (``>&-``) become /dev/null; otherwise the next file that is opened takes their number, and
    gets what libraries print. A full disk behind stdout is one clear error; behind stderr it is ignored.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the process ends
    stdout, stderr = (
        stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    sys.stdout, sys.stderr = cast(TextIO, _Stream(stdout, "stdout")), cast(TextIO, _Stream(stderr))


@contextlib.contextmanager
def busy(text: str) -> Iterator[Callable[[str], None]]:
    """Shows a spinner on stderr, on a terminal only; yields a function that changes its text."""
    with err.status(f"{escape(text)} ...") as status:
        yield lambda words: status.update(f"{escape(words)} ...")


@contextlib.contextmanager
def only_results_on_stdout() -> Iterator[None]:
    """Sends what models, data and libraries print to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
