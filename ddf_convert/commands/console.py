"""Where commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, cast

import typer
from rich.console import Console
from rich.markup import escape

from ddf_convert.errors import DDFError

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


class _Stream:
    """A standard stream. What it cannot write is lost: without a word, or as one clear error."""

    def __init__(self, stream: TextIO, name: str | None = None) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if (
            text != ""
        ):  # which typer writes to learn what kind of stream it is, and whose failure it takes for an answer
            with self._explained():
                self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        with self._explained():
            self._stream.flush()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
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

    Those that are closed (``>&-``) become /dev/null; otherwise the next file that is opened takes such a number, and
    gets what libraries print. A full disk behind stdout is one clear error; behind stderr, it stops no work.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - open until the process ends
    stdout, stderr = (
        stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    sys.stdout, sys.stderr = cast(TextIO, _Stream(stdout, "stdout")), cast(TextIO, _Stream(stderr))


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
