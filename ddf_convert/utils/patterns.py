"""Names selected by patterns: exact names, globs, or ``re:`` and a regular expression."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Collection

from ddf_convert.errors import UsageError, suggestion


def matching_names(option: str, pattern: str, names: Collection[str]) -> set[str]:
    """Returns the names that a pattern selects.

    Args:
        option: What the user calls the pattern, for errors.
        pattern: A name; a glob, in which ``*`` matches dots too; or ``re:`` and a regular expression for the whole
            name. A pattern that is one of the names selects that name alone, whatever characters it contains.
        names: The names to match.

    Raises:
        UsageError: The pattern is not a regular expression.
    """
    if pattern in names:
        return {pattern}
    expression = pattern.removeprefix("re:") if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UsageError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
    return {name for name in names if compiled.fullmatch(name)}


def pattern_hint(pattern: str, names: Collection[str]) -> str:
    """Returns what to append to the error of a pattern that selects nothing; empty if there is nothing to suggest."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; for those inside it, write '{glob.escape(pattern)}.*'"
    return suggestion(pattern, names)
