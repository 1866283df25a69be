"""The summary of ``zoo.py``: a row for each library file, failures by cause, the models with real numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from common import markdown
from rich.table import Table

Line = dict[str, Any]

HEADINGS = ("file", "models", "3x3", "planned", "converted", "on request", "failed", "seconds")


def headline(lines: Sequence[Line], real: Sequence[Line], total: int, seconds: float) -> str:
    """Returns the totals in a sentence."""
    with_3x3 = [line for line in lines if line.get("3x3")]
    parts = [
        f"{len(lines)} of {total} architectures looked at; "
        f"{sum(map(_planned, with_3x3))} of {len(with_3x3)} architectures with a 3x3 conv planned",
        f"{sum(map(_converted, lines))} converted by default",
        f"{sum(_converted(line, 'everything') for line in lines if not line.get('default'))} more on request",
        f"{sum('failures' in line for line in lines)} failures",
        *([f"{sum('failures' not in line for line in real)} of {len(real)} right with real numbers"] if real else []),
        f"total time {seconds / 60:.0f} min" if seconds >= 120 else f"total time {seconds:.0f} s",
    ]
    return ", ".join(parts)


def table(lines: Sequence[Line]) -> Table:
    """Returns a table for the terminal, with a row for each file."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for place, heading in enumerate(HEADINGS):
        shown.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for row in _rows(lines):
        shown.add_row(*row)
    return shown


def causes(lines: Sequence[Line]) -> Iterator[tuple[str, list[str]]]:
    """Yields step and reason of equal failures, with the architectures' names; the most frequent first."""
    found: dict[str, tuple[str, list[str]]] = {}
    for line in lines:
        for failure in line.get("failures", []):
            reason = failure["reason"].replace(line["name"], "MODEL")
            at = f" (at {failure['at']})" if "at" in failure else ""
            cause = f"{failure['step']} {re.sub(r'[0-9]+', '0', reason)}"
            found.setdefault(cause, (f"{failure['step']}: {reason}{at}", []))[1].append(line["name"])
    yield from sorted(found.values(), key=lambda cause: -len(cause[1]))


def page(shapes: Sequence[Line], real: Sequence[Line], total: int, versions: str) -> str:
    """Returns everything as Markdown."""
    return "\n".join(_page(shapes, real, total, versions)) + "\n"


def _page(shapes: Sequence[Line], real: Sequence[Line], total: int, versions: str) -> Iterator[str]:
    yield "# Every architecture of timm and torchvision"
    yield ""
    yield f"Written by `benchmarks/zoo.py` with {versions}. Times are of one core."
    yield ""
    yield headline(shapes, real, total, sum(line["seconds"] for line in [*shapes, *real])) + "."
    yield ""
    found: Counter[str] = sum((Counter(line.get("found_by", {})) for line in shapes), Counter())
    yield f"Convolutions by how they were found: {', '.join(f'{count:,} by {way}' for way, count in found.items())}."
    yield ""
    yield "Of each file: its models, those that have a 3x3 convolution, those of them of which every convolution is in"
    yield "the plan, those that were converted by default, those of the others that were converted with depthwise, stem"
    yield "and allow_growth, failures, seconds. Models without a 3x3 convolution are only built."
    yield ""
    yield from markdown.table(HEADINGS, _rows(shapes))
    yield "## Failures"
    yield ""
    for cause, names in causes([*shapes, *real]):
        yield f"- {cause}: {len(names)}, such as {', '.join(names[:3])}"
    yield ""
    if real:
        yield "## Real numbers"
        yield ""
        yield "One architecture of each file, converted with all options: a training step, then saved, and loaded in"
        yield "another process, which gave equal outputs."
        yield ""
        rows = [
            (f"{line['name']} ({line['library']})", line.get("size") or "own", line.get("replaced", ""), _verdict(line))
            for line in real
        ]
        yield from markdown.table(("architecture", "input", "replaced", "outcome"), rows)


def _rows(lines: Sequence[Line]) -> Iterator[tuple[str, ...]]:
    for file, of_file in groupby(lines, key=lambda line: line["file"]):
        own = list(of_file)
        with_3x3 = [line for line in own if line.get("3x3")]
        counts = (
            len(own),
            len(with_3x3),
            sum(map(_planned, with_3x3)),
            sum(map(_converted, own)),
            sum(_converted(line, "everything") for line in own if not line.get("default")),
            sum("failures" in line for line in own),
            round(sum(line["seconds"] for line in own)),
        )
        yield (file, *map(str, counts))


def _planned(line: Line) -> bool:
    """Returns whether every convolution is in the plan, with a reason."""
    return "default" in line and not any(failure["step"] == "coverage" for failure in line.get("failures", []))


def _converted(line: Line, options: str = "default") -> bool:
    """Returns whether something was replaced, and no check of that failed."""
    wrong = [failure for failure in line.get("failures", []) if failure["step"].endswith(f", {options}")]
    return bool(line.get(options)) and not wrong


def _verdict(line: Line) -> str:
    return "; ".join(f"**{failure['step']}: {failure['reason']}**" for failure in line.get("failures", [])) or "equal"
