"""The errors that reach a user: one clear line that says what is wrong, where, and what to do."""

import re

_WORD = 300  # characters of one word: more than a path has that people type
_MESSAGE = 4000
_LONG_WORD = re.compile(rf"\S{{{_WORD + 1},}}")


def shortened(message: str) -> str:
    """A message without the middle of what is very long in it.

    Messages quote names and values of files, which may be anything: an option of a manifest can have megabytes.
    """
    words = _LONG_WORD.sub(lambda found: _ends(found[0], _WORD), message)
    return _ends(words, _MESSAGE) if len(words) > _MESSAGE else words


def _ends(text: str, most: int) -> str:
    head, tail = text[: most * 2 // 3], text[-(most // 6) :]
    return f"{head}...({len(text) - len(head) - len(tail):,} characters)...{tail}"


class DDFError(Exception):
    """Something failed that is not the user's mistake. The command line exits with 1."""

    exit_code = 1

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(shortened(each) if isinstance(each, str) else each for each in arguments))


class UsageError(DDFError, ValueError):
    """The user asked for something that cannot be done as asked. The command line exits with 2."""

    exit_code = 2


class ArtifactError(UsageError):
    """A saved conversion cannot be read: missing, damaged, foreign, or of another version."""
