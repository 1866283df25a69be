"""The line that is kept of each architecture, and what goes wrong on the way to it."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zoo_parts.catalogue import Architecture

LONGEST = 240  # characters of a reason


class WrongError(Exception):
    """Something came out otherwise than it should."""


@contextmanager
def line_of(architecture: Architecture, check: str) -> Iterator[dict[str, Any]]:
    """A new line for a check of an architecture; on the way out it gets the processor's seconds that this took."""
    line: dict[str, Any] = {
        "check": check,
        "library": architecture.library,
        "name": architecture.name,
        "file": architecture.file,
    }
    start = time.process_time()  # whatever else the machine does
    try:
        yield line
    finally:
        line["seconds"] = round(time.process_time() - start, 2)


@contextmanager
def noting(line: dict[str, Any], step: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a failure of the line; what does not depend on it goes on after the block."""
    try:
        yield
    except WrongError as error:
        fail(line, step, str(error))
    except Exception as error:  # other people's models: anything can come out of them
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{'/'.join(frame.filename.split('/')[-2:])}:{frame.lineno}"
        fail(line, step, f"{type(error).__name__}: {error}", at=place)


def fail(line: dict[str, Any], step: str, reason: str, **more: Any) -> None:
    """Adds a failure to a line, without the paths of this machine."""
    reason = re.sub(r"(?<![\w.])(/[\w.+-]+)+/", "", " ".join(reason.split()))
    if len(reason) > LONGEST:
        reason = f"{reason[:LONGEST]} ..."
    line.setdefault("failures", []).append({"step": step, "reason": reason, **more})
