"""Early checks of the files that a command reads and writes, before work that may take hours."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ddf_convert.artifacts.atomic import os_error_text
from ddf_convert.errors import UsageError


def check_file(option: str, file: Path, beside: Path | None = None) -> None:
    """Raises UsageError if a file cannot be written; the folder ``beside`` will exist by then."""
    try:
        os.lstat(file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # names that no file can have
        raise UsageError(f"{option} {file}: cannot be written: {os_error_text(error)}") from error
    if file.is_dir():
        raise UsageError(f"{option} {file}: is a folder; give a file")
    if file.exists() and not file.is_file():
        raise UsageError(f"{option} {file}: is not an ordinary file; give another name")
    folder = file.parent
    if beside is not None and folder.resolve() == beside.resolve():
        return
    if not folder.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {file}: cannot write in {folder}")


def check_output(
    option: str, file: Path, overwrite: bool, inputs: Iterable[Path] = (), beside: Path | None = None
) -> None:
    """Raises UsageError if a file cannot be written, exists without ``overwrite``, or is, or lies in, an input."""
    check_file(option, file, beside)
    check_not_input(f"{option} {file}", file, inputs)
    if os.path.lexists(file) and not overwrite:
        raise UsageError(f"{option} {file}: exists already: --overwrite replaces it")


def check_not_input(what: str, file: Path, inputs: Iterable[Path]) -> None:
    """Raises UsageError if a file to write is one of the inputs, by any name, or lies in one of them."""
    for read in inputs:
        if os.path.lexists(file) and _is_or_lies_in(file, read):
            raise UsageError(f"{what}: would replace what is read from {read}; give another name")


def check_distinct(outputs: Iterable[tuple[str, Path | None]]) -> None:
    """Raises UsageError if two options name the same file."""
    seen: dict[Path, str] = {}
    for option, file in outputs:
        if file is not None and (other := seen.setdefault(file.resolve(), option)) != option:
            raise UsageError(f"{option} {file}: is what {other} writes; give another name")


def check_readable(what: str, file: Path) -> None:
    """Raises UsageError if a path is no regular file that can be read."""
    if not file.is_file():
        problem = (
            "is a folder, not a file" if file.is_dir() else "is no regular file" if file.exists() else "no such file"
        )
        raise UsageError(f"{what}: {problem}")
    if not os.access(file, os.R_OK):
        raise UsageError(f"{what}: cannot be read: permission denied")


def _is_or_lies_in(file: Path, read: Path) -> bool:
    with suppress(OSError):
        return any(os.path.samefile(path, read) for path in (file, *file.resolve().parents))
    return False
