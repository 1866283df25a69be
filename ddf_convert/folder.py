"""A folder of files that changes as one: whoever reads it finds the old files or the new ones, never a mixture.

The manifest names every other file with its size and SHA-256, and putting the manifest in place is the moment that
counts. In a folder that exists already, the new files come first under names of their own (``NAME.new``); after the
manifest they get their names. A reader who meets a folder between the two finishes the job.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ddf_convert.errors import ArtifactError, DDFError

MANIFEST = "manifest.json"
_PENDING = ".new"


class FileRecord(BaseModel):
    """What a file must be.

    Attributes:
        size: In bytes.
        sha256: Of its contents, hexadecimal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of a file as it is."""
        with path.open("rb") as file:
            return cls(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def check_writable(path: str | os.PathLike[str]) -> None:
    """Makes sure that a folder can be written at a path, and leaves nothing behind.

    Raises:
        ArtifactError: The path is a file, or cannot be made or written.
    """
    folder = Path(path)
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        is_folder = existing.is_dir()
        if is_folder:
            with tempfile.TemporaryFile(dir=existing):
                pass
            for name in folder.parts[len(existing.parts) :]:  # refuses names that no folder can have
                with suppress(FileNotFoundError):
                    os.lstat(existing / name)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot write to {folder}: {_why(error)}; choose another folder") from error
    if not is_folder:
        raise ArtifactError(f"cannot write to {folder}: {existing} is a file; choose another folder")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A context that gives an empty folder to write files into, the manifest among them, and at its end puts them at
    ``path`` as one. If the body fails nothing has changed.

    Raises:
        ArtifactError: The path is a file, or cannot be written.
        DDFError: Writing failed, for instance because the disk is full.
    """
    folder = Path(path)
    check_writable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside = folder.is_dir()
        stage = (folder if inside else folder.parent) / f".saving-{uuid.uuid4().hex}"
        stage.mkdir()
        try:
            yield stage
            for file in stage.iterdir():
                file.chmod((stage / MANIFEST).stat().st_mode)  # safetensors keeps its files to their owner
                _flush(file)
            if inside:
                _commit(stage, folder)
            else:
                os.rename(stage, folder)
                _flush(folder.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise DDFError(f"could not write {folder}: {_why(error)}") from error


def finished(folder: Path, records: Mapping[str, FileRecord]) -> dict[str, Path]:
    """Where the files that a manifest names are, after finishing a commit that was interrupted.

    Raises:
        ArtifactError: A file is missing, truncated or damaged.
    """
    return {name: _located(folder, name, record) for name, record in records.items()}


def unfinished(folder: Path) -> bool:
    """Whether a commit may have been interrupted here."""
    return any(folder.glob(f"*{_PENDING}"))


def _commit(stage: Path, folder: Path) -> None:
    names = [file.name for file in stage.iterdir() if file.name != MANIFEST]
    for name in names:
        os.replace(stage / name, folder / (name + _PENDING))
    _flush(folder)
    os.replace(stage / MANIFEST, folder / MANIFEST)  # from here on the folder is the new one
    _flush(folder)
    for name in names:
        os.replace(folder / (name + _PENDING), folder / name)
    _flush(folder)


def _located(folder: Path, name: str, record: FileRecord) -> Path:
    final, pending = folder / name, folder / (name + _PENDING)
    if final.is_file() and final.stat().st_size == record.size and FileRecord.of(final) == record:
        return final
    if pending.is_file() and FileRecord.of(pending) == record:
        with suppress(OSError):  # a folder that cannot be written is read as it is
            os.replace(pending, final)
            return final
        return pending
    if not final.is_file():
        raise ArtifactError(f"{final} is missing; save the model again")
    size = final.stat().st_size
    if size != record.size:
        raise ArtifactError(f"{final} has {size:,} bytes where the manifest says {record.size:,}: it is incomplete")
    raise ArtifactError(f"{final} is damaged: its SHA-256 is not that of the manifest; save the model again")


def _flush(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
