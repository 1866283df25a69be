"""Files of a run that something else damaged: they are renamed, never deleted, and the run goes on without them."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from ddf_convert.errors import UsageError
from ddf_convert.utils.logging import warn


def set_aside(path: Path, reason: str, consequence: str) -> None:
    """Renames a file or folder to ``NAME.damaged-1``, or the next number that is free, and says so.

    Args:
        path: What is in the way.
        reason: What is wrong with it.
        consequence: What happens now.

    Raises:
        UsageError: It cannot be renamed.
    """
    free = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(each for each in free if not each.exists() and not each.is_symlink())
    try:
        path.rename(aside)
    except OSError as error:
        raise UsageError(f"{path} is damaged ({reason}), and cannot be renamed: {error.strerror}") from error
    warn(f"{path} is damaged ({reason}): it is kept as {aside.name}, and {consequence}")
