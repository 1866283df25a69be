"""Functions that users name on the command line: ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from ddf_convert.errors import DDFError, UsageError, first_line, suggestion


def find_callable(name: str, returns: str) -> Callable[..., Any]:
    """Imports the callable of a name; modules of the current folder are found too.

    Args:
        name: ``package.module:callable``, where the callable may be an attribute of an attribute.
        returns: What it is expected to return, such as "a model", for the errors.

    Raises:
        UsageError: There is no such thing, or it is not a callable.
    """
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise UsageError(f"{name!r}: write package.module:callable")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(f"{name}: cannot import {module_name}: {first_line(error)}") from error
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            hint = suggestion(part, [other for other in dir(found) if not other.startswith("_")])
            raise UsageError(f"{name}: {module_name} has no {path}{hint}") from error
    if not callable(found):
        raise UsageError(f"{name} is {type(found).__name__}, not a callable that returns {returns}")
    function: Callable[..., Any] = found
    return function


def call(name: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """Calls a function from :func:`find_callable`, which the user knows by this name.

    Raises:
        UsageError: It failed.
    """
    try:
        return function(**arguments)
    except DDFError:
        raise
    except Exception as error:
        raise UsageError(f"{name}() failed: {type(error).__name__}: {first_line(error)}") from error
