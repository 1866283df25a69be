"""The results of a study on disk: JSON, a short page, a picture."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.utils.device import describe, describe_short

RESULTS = Path(__file__).parents[1] / "results"
THREADS = 2


def options(about: str | None, quick: str | None = None) -> argparse.Namespace:
    """The options of a study; ``quick`` says what --quick does, if there is one."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if quick:
        parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the results are written")
    return parser.parse_args()


def run(study: Callable[[], None]) -> int:
    """Runs a study, and says what went wrong in one line: the exit code of the script."""
    torch.set_num_threads(THREADS)  # also what the results depend on: sums are split among threads
    try:
        study()
    except DDFError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def machine() -> dict[str, Any]:
    """What was measured on, and how busy it was (with this study): the mean load of the last 15 minutes."""
    return {**describe(torch.device("cpu")), "load": os.getloadavg()[2]}


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table; all columns but the first are flush right."""
    lines = [f"| {' | '.join(headings)} |", f"|---|{'---:|' * (len(headings) - 1)}"]
    return [*lines, *(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows), ""]


def paragraph(text: str) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def write(folder: Path, name: str, document: dict[str, Any], lines: Iterable[str], drawn: Any = None) -> None:
    """Writes ``name.json``, ``name.md`` and, if there is a matplotlib figure, ``name.png``.

    Args:
        folder: Where.
        name: Of the study.
        document: The numbers, with a ``machine``.
        lines: The page; how it was made and on what is added at its end.
        drawn: The figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = paragraph(
        f"Made by `python benchmarks/{name}.py`, after `python benchmarks/fetch_real.py`, in"
        f" {document['seconds']:.0f} s on {describe_short(document['machine'])}, with a load of"
        f" {document['machine']['load']:.1f} (mean of 15 minutes)."
    )
    text = "\n".join([*lines, *made, ""])
    write_file(folder / f"{name}.json", json.dumps(document, indent=1) + "\n")
    write_file(folder / f"{name}.md", text)
    if drawn is not None:
        contents = io.BytesIO()
        drawn.savefig(contents, format="png", dpi=130, metadata={"Software": None})
        write_file(folder / f"{name}.png", contents.getvalue())


def figure(width: float, height: float) -> Any:
    """An empty picture, without a window system."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("the plot needs matplotlib: pip install 'ddf-convert[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")
