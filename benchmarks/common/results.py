"""The frame of a study: options, results as JSON, a page and a picture, exit codes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

import torch

from common.markdown import paragraph
from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.utils.device import describe, describe_short
from ddf_convert.utils.figures import encode_figure, require_matplotlib

RESULTS = Path(__file__).parents[1] / "results"
THREADS = 2

Document = dict[str, Any]


def script_parser(about: str | None) -> argparse.ArgumentParser:
    """Returns a parser that shows the script's docstring as it is written."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def study_parser(about: str | None, quick: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with the options of every study; ``quick`` is the help of --quick."""
    made = script_parser(about)
    if quick:
        made.add_argument("--quick", action="store_true", help=quick)
    made.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the results are written")
    made.add_argument("--page-only", action="store_true", help="write the page again, from the JSON of an earlier run")
    return made


def run_study(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[], Document],
    page: Callable[[Document], Iterable[str]],
    plot: Callable[[Document], Any] | None = None,
) -> None:
    """Measures, or reads what was measured; writes ``name.json``, ``name.md`` and ``name.png``; prints the page."""
    if plot is not None:
        require_matplotlib("the plot")
    start = time.monotonic()
    if options.page_only:
        document = json.loads((options.results / f"{name}.json").read_text())
    else:
        document = measure()
        document.setdefault("seconds", time.monotonic() - start)
    write(options.results, name, document, page(document), plot(document) if plot is not None else None)
    print("\n".join(page(document)))


def exit_code(main: Callable[[], None]) -> int:
    """Runs a study on two threads and returns the script's exit code; an error is printed in one line."""
    torch.set_num_threads(THREADS)  # results depend on it: sums are split among threads
    try:
        main()
    except DDFError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def machine() -> dict[str, Any]:
    """Returns the machine's facts and the mean load of the last 15 minutes, which includes the study's own."""
    return {**describe(torch.device("cpu")), "load": os.getloadavg()[2]}


def write(folder: Path, name: str, document: Document, lines: Iterable[str], figure: Any = None) -> None:
    """Writes the results of a study.

    Args:
        folder: Where.
        name: The study's; the names of the files without their endings.
        document: The numbers, with ``machine`` and ``seconds``.
        lines: The page, without the sentence on how it was made.
        figure: A matplotlib figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = paragraph(
        f"Made by `python benchmarks/{name.removesuffix('_quick')}.py`, after `python benchmarks/fetch_real.py`, in"
        f" {document['seconds']:.0f} s on {describe_short(document['machine'])}, with a load of"
        f" {document['machine']['load']:.1f} (mean of 15 minutes)."
    )
    write_file(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
    write_file(folder / f"{name}.md", "\n".join([*lines, *made]))
    if figure is not None:
        write_file(folder / f"{name}.png", png(figure, dpi=130))


def png(figure: Any, dpi: int) -> bytes:
    """Returns a figure as a PNG file's contents, without the version of matplotlib."""
    return encode_figure(figure, dpi=dpi, metadata={"Software": None})


class ResumableLines:
    """Results in a file with a JSON object per line, so that a study that was stopped goes on.

    Args:
        file: The file; None keeps the lines in memory.
        key: Returns what a line is the result of; of two lines with one key the last counts.
        valid: Whether a line of an earlier run counts.
    """

    def __init__(
        self, file: Path | None, key: Callable[[Document], Hashable], valid: Callable[[Document], bool] = bool
    ) -> None:
        self._file = file
        self._key = key
        self.lines: dict[Hashable, Document] = {}
        if file is None:
            return
        for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # the run was killed while it wrote
            if valid(line):
                self.lines[key(line)] = line
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines.values()), encoding="utf-8")

    def add(self, line: Document) -> None:
        """Keeps a line, and writes it at once."""
        self.lines[self._key(line)] = line
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")
