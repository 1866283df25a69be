"""Selection by name: exact names, globs, and ``re:`` patterns."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from ddf_convert.errors import UsageError
from ddf_convert.graph.plan import suggestion
from ddf_convert.graph.sites import Convolution

Patterns = str | Iterable[str] | None


class Selector:
    """What ``include`` or ``exclude`` names among a model's convolutions.

    Args:
        option: "include" or "exclude", for errors.
        patterns: One pattern, several, or None. ``*`` in a glob matches dots too; ``re:`` must match the whole name.
        convolutions: What there is to match.

    Raises:
        UsageError: A pattern matches no convolution, or is not a regular expression.
    """

    def __init__(self, option: str, patterns: Patterns, convolutions: Sequence[Convolution]) -> None:
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
        self._expressions = [_compile(option, pattern) for pattern in self.patterns]
        for pattern, expression in zip(self.patterns, self._expressions, strict=True):
            if not any(expression.fullmatch(name) for site in convolutions for name in site.names):
                raise UsageError(f"{option}: {pattern!r} matches no convolution{_hint(pattern, convolutions)}")

    def matching(self, convolution: Convolution) -> str | None:
        """The first pattern that matches one of the names of a convolution."""
        for pattern, expression in zip(self.patterns, self._expressions, strict=True):
            if any(expression.fullmatch(name) for name in convolution.names):
                return pattern
        return None


def _compile(option: str, pattern: str) -> re.Pattern[str]:
    expression = pattern.removeprefix("re:") if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        return re.compile(expression)
    except re.error as error:
        raise UsageError(f"{option}: {pattern!r} is not a regular expression: {error}") from error


def _hint(pattern: str, convolutions: Sequence[Convolution]) -> str:
    names = [name for site in convolutions for name in site.names]
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; for those inside it, write '{pattern}.*'"
    return suggestion(pattern, names)
