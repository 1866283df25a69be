"""Atomic, durable writes of files and of folders with a manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ddf_convert.errors import ArtifactError, DDFError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "manifest.json"
_MAX_JSON_BYTES = 2**26  # manifests of thousands of layers have some 2**20
_TEMPORARY = re.compile(r"\.saving-[0-9a-f]{32}")
_STALE_S = 24 * 3600  # age at which a temporary path is a leftover, where file locks do not say so
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors reports errors of the system in this form
_DEVICE_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM}
_PENDING = ".commit"  # new files of a folder that exists; it holds its manifest until that is in place
_OLD_PENDING = ".new"  # suffix of pending files in older versions

FilesOf = Callable[[dict[str, Any]], Mapping[str, Any] | None]
"""Returns the file records in a manifest's content, by file name; None if another program wrote the manifest."""


# --- single files ---


def write_file(file: Path, content: str | bytes) -> None:
    """Writes a file atomically and durably, text as UTF-8; raises UsageError, or DDFError if the disk is full."""
    remove_leftovers(file.parent)
    try:
        with temporary_path(file.parent) as part:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
            flush(part)
            part.replace(file)
            flush(file.parent)
    except OSError as error:
        kind = DDFError if is_full(error) else UsageError
        raise kind(f"cannot write {file}: {os_error_text(error)}") from error


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file; errors of the operating system are raised as OSError."""
    import safetensors.torch

    try:
        safetensors.torch.save_file(dict(tensors), file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        match = _OS_ERROR.search(str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1])), str(file)) from error


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file; raises ArtifactError if it cannot be read, or is damaged."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {os_error_text(error)}") from error
    if len(text) > _MAX_JSON_BYTES:
        raise ArtifactError(f"{file} is damaged: it has more than {_MAX_JSON_BYTES:,} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: it is not JSON ({str(error).splitlines()[0]})") from error


def flush(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def os_error_text(error: BaseException) -> str:
    """Returns the operating system's message for an error, or else the error's own."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def is_full(error: OSError) -> bool:
    """Returns whether the device takes no more data, so that another file name would not help."""
    return error.errno in _DEVICE_FULL


# --- temporary paths ---


@contextmanager
def temporary_path(parent: Path, folder: bool = False) -> Iterator[Path]:
    """Makes a file or folder in ``parent``, removed at the end unless moved; a lock keeps other processes from it."""
    path, lock = _make_locked(parent, folder)
    try:
        yield path
    finally:
        _remove(path)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary paths of killed processes; those that are locked, or cannot be removed, stay."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _remove_leftover(folder / name)


def _make_locked(parent: Path, folder: bool) -> tuple[Path, int | None]:
    while True:
        path = parent / f".saving-{uuid.uuid4().hex}"
        if folder:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(BlockingIOError, FileNotFoundError):  # another process took it for a leftover before the lock
            lock = _lock(path)
            if lock is None or os.path.lexists(path):
                return path, lock
            os.close(lock)


def _lock(path: Path) -> int | None:
    """Returns a descriptor that holds the lock, or None where there are no locks; raises BlockingIOError if taken."""
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_leftover(path: Path) -> None:
    lock = _lock(path)
    if lock is None and time.time() - path.stat().st_mtime < _STALE_S:
        return
    try:
        _remove(path)
    finally:
        if lock is not None:
            os.close(lock)


def _remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


# --- folders with a manifest ---
#
# A reader finds the old files or the new ones, never a mixture. The manifest names every other file with its size and
# SHA-256. New files are first written to a folder inside, and putting the manifest in place commits them. A reader that
# meets a folder between that moment and the end moves the other files itself. The manifest also says which files are
# ours: any other file in their place belongs to the user.


class FileRecord(BaseModel):
    """Size in bytes and SHA-256 (hexadecimal) of a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Returns the record of a file."""
        with path.open("rb") as file:
            return cls(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def matches(self, path: Path) -> bool:
        """Returns whether the file exists and has this size and hash."""
        return path.is_file() and path.stat().st_size == self.size and FileRecord.of(path) == self


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], names: Iterable[str] = (), files_of: FilesOf | None = None
) -> Iterator[Path]:
    """Gives an empty folder to write files into, the manifest among them, and at the end moves them to ``path`` as one.

    If the body fails nothing has changed. Files that only the previous manifest names are removed.

    Args:
        path: The folder.
        names: Names of the files that will be written beside the manifest.
        files_of: Reads the file records of a manifest. None: everything in the folder may be replaced.
    """
    folder = Path(path)
    check_writable(folder)
    before: dict[str, FileRecord] = {}
    if files_of is not None:
        _finish_commit(folder, files_of)
        before = check_replaceable(folder, names, files_of)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        exists = folder.is_dir()
        for parent in (folder.parent, *([folder] if exists else [])):
            remove_leftovers(parent)
        identities = {name: _identity(folder / name) for name in names}
        with temporary_path(folder if exists else folder.parent, folder=True) as stage:
            yield stage
            for file in stage.iterdir():
                file.chmod((stage / MANIFEST).stat().st_mode)  # safetensors makes files that only their owner can read
                flush(file)
            for name, identity in identities.items():
                if _identity(folder / name) != identity:
                    raise ArtifactError(f"{folder / name} was changed meanwhile; nothing was written")
            if exists:
                _commit(stage, folder)
            else:
                os.rename(stage, folder)
                flush(folder.parent)
        for name in before.keys() - set(names):
            if _matches(before[name], folder / name):
                _remove(folder / name)
    except OSError as error:
        raise DDFError(f"could not write {folder}: {os_error_text(error)}") from error


def locate_files(folder: Path, records: Mapping[str, FileRecord]) -> dict[str, Path]:
    """Returns the paths of the files in a manifest, after finishing an interrupted commit; checks their hashes."""
    return {name: _locate(folder, name, record) for name, record in records.items()}


def check_replaceable(path: str | os.PathLike[str], names: Iterable[str], files_of: FilesOf) -> dict[str, FileRecord]:
    """Checks that writing these files replaces only what the folder's manifest accounts for; returns its records."""
    folder = Path(path)
    records = _read_records(folder, files_of)
    for name in names:
        file = folder / name
        if name == MANIFEST or not os.path.lexists(file):
            continue
        if name not in records:
            raise ArtifactError(
                f"{file} is in the way: ddf_convert would write its own {name} there, and did not write this one;"
                " move it away, or choose another folder"
            )
        if not _matches(records[name], file):
            raise ArtifactError(
                f"{file} is in the way: it is not the file that {MANIFEST} describes, but was changed or replaced;"
                " move it away, or choose another folder"
            )
    return records


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raises ArtifactError if no folder can be written at a path; leaves nothing behind."""
    folder = Path(path)
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            if existing.is_symlink():
                raise ArtifactError(f"cannot write to {folder}: {existing} is a link to nothing; choose another folder")
            existing = existing.parent
        is_folder = existing.is_dir()
        if is_folder:
            with tempfile.TemporaryFile(dir=existing):
                pass
            for name in folder.parts[len(existing.parts) :]:  # refuses names that no folder can have
                with suppress(FileNotFoundError):
                    os.lstat(existing / name)
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(f"cannot write to {folder}: {os_error_text(error)}; choose another folder") from error
    if not is_folder:
        raise ArtifactError(f"cannot write to {folder}: {existing} is a file; choose another folder")


def _read_records(folder: Path, files_of: FilesOf) -> dict[str, FileRecord]:
    """Returns the file records of a folder's manifest, if there is one; raises ArtifactError if it is not ours."""
    file = folder / MANIFEST
    if not os.path.lexists(file):
        return {}
    entries = None
    with suppress(ArtifactError):
        content = read_json(file)
        entries = files_of(content) if isinstance(content, dict) else None
    if not isinstance(entries, Mapping):
        raise ArtifactError(
            f"{file} is in the way: it is not a manifest that can be replaced here; move it away, or choose another"
            " folder"
        )
    records = {}
    for name, record in entries.items():
        with suppress(ValidationError):
            records[name] = FileRecord.model_validate(record)
    return records


def _finish_commit(folder: Path, files_of: FilesOf) -> None:
    """Finishes a commit that was interrupted, as far as its files are there."""
    if not (folder / _PENDING).is_dir() and not any(folder.glob(f"*{_OLD_PENDING}")):
        return
    for name, record in _read_records(folder, files_of).items():
        with suppress(ArtifactError):  # what cannot be finished is about to be replaced, or in the way
            _locate(folder, name, record)


def _commit(stage: Path, folder: Path) -> None:
    pending = folder / _PENDING
    _remove(pending)
    os.rename(stage, pending)
    flush(folder)
    os.replace(pending / MANIFEST, folder / MANIFEST)  # from here on the folder is the new one
    flush(folder)
    for name in os.listdir(pending):
        with suppress(FileNotFoundError):  # a reader moved this one
            os.replace(pending / name, folder / name)
    flush(folder)
    with suppress(OSError):
        pending.rmdir()


def _locate(folder: Path, name: str, record: FileRecord) -> Path:
    final = folder / name
    if record.matches(final):
        return final
    for pending in (folder / _PENDING / name, folder / (name + _OLD_PENDING)):
        with suppress(FileNotFoundError):  # its writer moves it at this moment
            if record.matches(pending):
                with suppress(OSError):  # a read-only folder
                    os.replace(pending, final)
                    return final
                return pending
    if not final.is_file():
        raise ArtifactError(f"{final} is missing; save the model again")
    size = final.stat().st_size
    if size != record.size:
        raise ArtifactError(f"{final} has {size:,} bytes where the manifest says {record.size:,}: it is incomplete")
    if record.matches(final):
        return final
    raise ArtifactError(f"{final} is damaged: its SHA-256 is not that of the manifest; save the model again")


def _identity(file: Path) -> tuple[int, ...] | None:
    """Returns numbers that differ once a file was changed or replaced; None if there is no file."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _matches(record: FileRecord, file: Path) -> bool:
    try:
        return record.matches(file)
    except OSError:
        return False
