"""Single files that a command reads or writes: checked before the work starts, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from ddf_convert.errors import UsageError


def check_file(option: str, file: Path, beside: Path | None = None) -> None:
    """Fails early where a file could not be written.

    Args:
        option: What the user calls it, for the error.
        file: What will be written.
        beside: A folder that will exist by then.

    Raises:
        UsageError: It is a folder, or its folder does not exist or cannot be written.
    """
    if file.is_dir():
        raise UsageError(f"{option} {file}: is a folder; give a file")
    folder = file.parent
    if beside is not None and folder.resolve() == beside.resolve():
        return
    if not folder.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {file}: cannot write in {folder}")


def write_file(file: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, whole or not at all.

    Raises:
        UsageError: It cannot be written.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(file)
    except OSError as error:
        raise UsageError(f"cannot write {file}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def check_readable(what: str, file: Path) -> None:
    """Fails early where a file could not be read.

    Args:
        what: The file as the user called it, for the error.
        file: What will be read; a pipe or a device is not a file.

    Raises:
        UsageError: It does not exist, is no regular file, or may not be read.
    """
    if not file.is_file():
        why = "is a folder, not a file" if file.is_dir() else "is no regular file" if file.exists() else "no such file"
        raise UsageError(f"{what}: {why}")
    if not os.access(file, os.R_OK):
        raise UsageError(f"{what}: cannot be read: permission denied")
