"""Single files that a command reads or writes: checked before the work starts, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ddf_convert.disk import flush, is_full, remove_leftovers, temporary, why
from ddf_convert.errors import DDFError, UsageError


def check_file(option: str, file: Path, beside: Path | None = None) -> None:
    """Fails early where a file could not be written.

    Args:
        option: What the user calls it, for the error.
        file: What will be written.
        beside: A folder that will exist by then.

    Raises:
        UsageError: It is a folder or a device, or its folder does not exist or cannot be written.
    """
    try:
        os.lstat(file)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # names that no file can have
        raise UsageError(f"{option} {file}: cannot be written: {why(error)}") from error
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
    """Fails early where a command would write over a file of the user's, or could not write.

    Args:
        option: What the user calls it, for the error.
        file: What will be written.
        overwrite: Whether the user lets files be replaced.
        inputs: Files that the command reads, and folders: what is in them is never replaced.
        beside: A folder that will exist by then.

    Raises:
        UsageError: It exists already, is read too, or as for :func:`check_file`.
    """
    check_file(option, file, beside)
    check_not_read(f"{option} {file}", file, inputs)
    if os.path.lexists(file) and not overwrite:
        raise UsageError(f"{option} {file}: exists already: --overwrite replaces it")


def check_not_read(what: str, file: Path, inputs: Iterable[Path]) -> None:
    """Fails where a file that would be written is one that is read, or lies in a folder that is read.

    Args:
        what: The file as the error calls it.
        file: What would be written.
        inputs: Files and folders that are read.

    Raises:
        UsageError: It is.
    """
    for read in inputs:
        if os.path.lexists(file) and _is_in(file, read):
            raise UsageError(f"{what}: would replace what is read from {read}; give another name")


def check_different(outputs: Iterable[tuple[str, Path | None]]) -> None:
    """Fails where two files that a command writes are one.

    Args:
        outputs: Options and their files.

    Raises:
        UsageError: It says which.
    """
    seen: dict[Path, str] = {}
    for option, file in outputs:
        if file is not None and (other := seen.setdefault(file.resolve(), option)) != option:
            raise UsageError(f"{option} {file}: is what {other} writes; give another name")


def write_file(file: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, whole or not at all; once it returns the file is on the disk.

    Raises:
        UsageError: It cannot be written.
        DDFError: Writing failed, for instance because the disk is full.
    """
    remove_leftovers(file.parent)
    try:
        with temporary(file.parent) as part:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(part)
            part.replace(file)
            flush(file.parent)
    except OSError as error:
        kind = DDFError if is_full(error) else UsageError
        raise kind(f"cannot write {file}: {why(error)}") from error


def check_readable(what: str, file: Path) -> None:
    """Fails early where a file could not be read.

    Args:
        what: The file as the user called it, for the error.
        file: What will be read; a pipe or a device is not a file.

    Raises:
        UsageError: It does not exist, is no regular file, or may not be read.
    """
    if not file.is_file():
        found = (
            "is a folder, not a file" if file.is_dir() else "is no regular file" if file.exists() else "no such file"
        )
        raise UsageError(f"{what}: {found}")
    if not os.access(file, os.R_OK):
        raise UsageError(f"{what}: cannot be read: permission denied")


def _is_in(file: Path, read: Path) -> bool:
    """Whether a file is another, by whatever name, or lies in a folder."""
    with suppress(OSError):
        return any(os.path.samefile(place, read) for place in (file, *file.resolve().parents))
    return False
