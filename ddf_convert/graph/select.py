"""Selection by name (exact names, globs, and ``re:`` patterns) and by the user's own function."""

from __future__ import annotations

import fnmatch
import glob
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import nn

from ddf_convert.errors import UsageError
from ddf_convert.graph.plan import suggestion
from ddf_convert.graph.record import first_line
from ddf_convert.graph.sites import Convolution

Patterns = str | Iterable[str] | None
FilterFunction = Callable[[nn.Module, str], bool]

_ORDER = "filter_fn is called with the module first and its name second, as torchao's: filter_fn(module, name)"
_NAMES = {"name", "fqn", "path", "qualname", "module_name", "layer_name"}  # what a parameter for the name is called
_MODULES = {"module", "mod", "layer", "conv", "m"}  # and one for the module


def matching_names(option: str, pattern: str, names: Collection[str]) -> set[str]:
    """The names that a pattern selects.

    Args:
        option: What the user calls the pattern, for errors.
        pattern: A name; a glob, in which ``*`` matches dots too; or ``re:`` and a regular expression for the whole
            name. A pattern that is one of the names selects that name alone, whatever characters it contains.
        names: What there is to match.

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
    """What to append to the error of a pattern that selects nothing; empty if there is nothing to suggest."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; for those inside it, write '{glob.escape(pattern)}.*'"
    return suggestion(pattern, names)


class Selector:
    """What ``include`` or ``exclude`` names among a model's convolutions.

    Args:
        option: "include" or "exclude", for errors.
        patterns: One pattern, several, or None; see :func:`matching_names`.
        convolutions: What there is to match.

    Raises:
        UsageError: A pattern matches no convolution, or is not a regular expression.
    """

    def __init__(self, option: str, patterns: Patterns, convolutions: Sequence[Convolution]) -> None:
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
        names = list(dict.fromkeys(name for site in convolutions for name in site.names))
        self._selected = [matching_names(option, pattern, names) for pattern in self.patterns]
        for pattern, selected in zip(self.patterns, self._selected, strict=True):
            if not selected:
                raise UsageError(f"{option}: {pattern!r} matches no convolution{pattern_hint(pattern, names)}")

    def matching(self, convolution: Convolution) -> str | None:
        """The first pattern that matches one of the names of a convolution."""
        for pattern, selected in zip(self.patterns, self._selected, strict=True):
            if not selected.isdisjoint(convolution.names):
                return pattern
        return None


def check_order(filter_fn: FilterFunction) -> None:
    """Raises UsageError if the signature of a user's function says that it takes ``(name, module)``."""
    try:
        first, second, *_ = inspect.signature(filter_fn).parameters.values()
    except (TypeError, ValueError):  # no signature, or not two arguments: the call tells
        return
    is_name = first.name in _NAMES or first.annotation in (str, "str")
    is_module = second.name in _MODULES or _is_module(second.annotation)
    if (is_name and second.name not in _NAMES) or (is_module and first.name not in _MODULES):
        raise UsageError(f"filter_fn takes ({first.name}, {second.name}): {_ORDER}")


def asked(filter_fn: FilterFunction, module: nn.Module, name: str) -> bool:
    """What the user's function says of a site.

    Raises:
        UsageError: It failed.
    """
    try:
        return bool(filter_fn(module, name))
    except Exception as error:  # it is the user's code: anything can come out of it
        words = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"filter_fn failed for {name} ({type(module).__name__}): {words}; {_ORDER}") from error


def _is_module(annotation: object) -> bool:
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] in ("Module", "Conv2d")
    return isinstance(annotation, type) and issubclass(annotation, nn.Module)
