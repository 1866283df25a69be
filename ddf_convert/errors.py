"""The errors that reach a user: one clear line that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# Error numbers for "no room at the moment" and for attempts that were cut off.
_TRANSIENT = re.compile("EAGAIN|EBUSY|EDQUOT|EINTR|EIO|EMFILE|ENFILE|ENOLCK|ENOMEM|ENOSPC|ESTALE|ETIMEDOUT")
_NO_MEMORY = re.compile(r"out.of.memory|(can't|cannot) allocate memory|not enough memory|bad_alloc", re.IGNORECASE)
_MAX_WORD = 300  # characters: more than a path that people type
_MAX_MESSAGE = 4000
_LONG_WORD = re.compile(rf"\S{{{_MAX_WORD + 1},}}")


def shortened(message: str) -> str:
    """Returns a message with very long parts abbreviated and unprintable characters escaped.

    Messages quote names and values of files, which may be anything: an option of a manifest can have megabytes.
    """
    words = _LONG_WORD.sub(lambda match: _ends(match[0], _MAX_WORD), message)
    short = _ends(words, _MAX_MESSAGE) if len(words) > _MAX_MESSAGE else words
    return "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in short)


def _ends(text: str, most: int) -> str:
    head, tail = text[: most * 2 // 3], text[-(most // 6) :]
    return f"{head}...({len(text) - len(head) - len(tail):,} characters)...{tail}"


class DDFError(Exception):
    """Something failed that is not the user's mistake. The command line exits with 1."""

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(shortened(each) if isinstance(each, str) else each for each in arguments))


class UsageError(DDFError, ValueError):
    """The user wants something that is not possible. The command line exits with 2."""

    exit_code = 2


class ArtifactError(UsageError):
    """A saved conversion cannot be read: missing, damaged, foreign, or of another version."""


def may_pass(error: BaseException) -> bool:
    """Whether an error, or one behind it, may pass: memory or the disk was full, or the attempt was cut off."""
    return any(
        isinstance(each, InterruptedError | TimeoutError)
        or (isinstance(each, OSError) and _TRANSIENT.fullmatch(errno.errorcode.get(each.errno or 0, "")))
        or ran_out_of_memory(each)
        for each in error_chain(error)
    )


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; on the CPU, torch raises a plain RuntimeError then."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def error_chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an error, and those that it was raised from."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without the full stop."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def in_one_line(error: ValidationError) -> str:
    """Returns the first few points that pydantic found wrong."""
    points = [
        f"{'.'.join(map(str, item['loc'])) or 'text'}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors()
    ]
    return "; ".join(points[:3]) + (f"; and {len(points) - 3} more" if len(points) > 3 else "")


def suggestion(name: str, names: Iterable[str]) -> str:
    """Returns what to append to an error: the nearest names, or "" if none is near."""
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
