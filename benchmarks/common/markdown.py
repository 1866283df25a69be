"""Markdown as lists of lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = False) -> list[str]:
    """Returns a table and an empty line; with ``numbers``, all columns but the first are aligned to the right."""
    lines = [_row(headings), f"|---|{('---:|' if numbers else '---|') * (len(headings) - 1)}"]
    return [*lines, *map(_row, rows), ""]


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def paragraph(text: str) -> list[str]:
    """Returns a paragraph, wrapped, and an empty line."""
    return [*textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False), ""]
