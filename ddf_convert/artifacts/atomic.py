"""A folder of files that changes as one: whoever reads it finds the old files or the new ones, never a mixture.

The manifest names every other file with its size and SHA-256, and putting the manifest in place is the moment that
counts. In a folder that exists already, the new files come first in a folder of their own inside it; after the manifest
they get their places. A reader who meets a folder between the two finishes the job.

The manifest also says which files are ours. Whatever else stands where a file would go belongs to the user.
"""

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

_TEMPORARY = re.compile(r"\.saving-[0-9a-f]{32}")
_STALE = 24 * 3600  # seconds after which a temporary file is nobody's, where locks say nothing
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
# Of a device that takes no more, whoever may write to it.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOMEM}


@contextmanager
def temporary(beside: Path, folder: bool = False) -> Iterator[Path]:
    """A context with a new file, or folder, that is gone at its end, unless it was moved away.

    It is locked meanwhile: where a process was killed the lock is free, and :func:`remove_leftovers` knows.

    Args:
        beside: Folder that it is made in.
        folder: Whether to make a folder.

    Raises:
        OSError: It cannot be made.
    """
    path, lock = _locked(beside, folder)
    try:
        yield path
    finally:
        remove(path)
        if lock is not None:
            os.close(lock)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left of :func:`temporary`. What others still write, or cannot be removed, stays."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                with suppress(OSError):
                    _remove_leftover(folder / name)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def flush(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file.

    Raises:
        OSError: It could not be written, for instance because the disk is full.
    """
    import safetensors.torch

    try:
        safetensors.torch.save_file(dict(tensors), file, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # the system's errors come in its words
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error


def why(error: BaseException) -> str:
    """An error in the words of the operating system, if it has any."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__


def is_full(error: OSError) -> bool:
    """Whether the device takes no more, so that another name would not help."""
    return error.errno in _FULL


def _locked(beside: Path, folder: bool) -> tuple[Path, int | None]:
    while True:
        path = beside / f".saving-{uuid.uuid4().hex}"
        if folder:
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with suppress(BlockingIOError, FileNotFoundError):  # taken for a leftover between its making and its lock
            lock = _lock(path)
            if lock is None or os.path.lexists(path):
                return path, lock
            os.close(lock)


def _lock(path: Path) -> int | None:
    """A descriptor that holds the lock; None where the file system, or the system, has none.

    Raises:
        BlockingIOError: Another process holds it.
    """
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
    if lock is None and time.time() - path.stat().st_mtime < _STALE:
        return
    try:
        remove(path)
    finally:
        if lock is not None:
            os.close(lock)


MANIFEST = "manifest.json"
_PENDING = ".commit"  # a folder; it still holds its manifest unless that is in place
_OLD_PENDING = ".new"  # the end of pending files' names, once
_LARGEST_JSON = 2**26  # bytes: manifests of thousands of layers have some 2**20

# What the content of a manifest says of the files beside it, by name; None if it is another program's.
FilesOf = Callable[[dict[str, Any]], Mapping[str, Any] | None]


class FileRecord(BaseModel):
    """What a file must be.

    Attributes:
        size: In bytes.
        sha256: Of its contents, hexadecimal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of a file as it is."""
        with path.open("rb") as file:
            return cls(size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())

    def fits(self, path: Path) -> bool:
        """Whether a file is there and is as it must be."""
        return path.is_file() and path.stat().st_size == self.size and FileRecord.of(path) == self


def check_writable(path: str | os.PathLike[str]) -> None:
    """Makes sure that a folder can be written at a path, and leaves nothing behind.

    Raises:
        ArtifactError: The path is a file, or cannot be made or written.
    """
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
        raise ArtifactError(f"cannot write to {folder}: {why(error)}; choose another folder") from error
    if not is_folder:
        raise ArtifactError(f"cannot write to {folder}: {existing} is a file; choose another folder")


def check_replaceable(path: str | os.PathLike[str], names: Iterable[str], files_of: FilesOf) -> dict[str, FileRecord]:
    """Makes sure that files of these names can be written to a folder without losing any that is not ours.

    Ours are the manifest, and the files that are as it says.

    Args:
        path: The folder; it need not exist.
        names: Of the files beside the manifest.
        files_of: What the content of a manifest says of them.

    Returns:
        What the manifest says of the files beside it.

    Raises:
        ArtifactError: Something else is in the way; the message names it.
    """
    folder = Path(path)
    records = _records(folder, files_of)
    for name in names:
        file = folder / name
        if name == MANIFEST or not os.path.lexists(file):
            continue
        if name not in records:
            raise ArtifactError(
                f"{file} is in the way: ddf_convert would write its own {name} there, and did not write this one;"
                " move it away, or choose another folder"
            )
        if not _fits(records[name], file):
            raise ArtifactError(
                f"{file} is in the way: it is not the file that {MANIFEST} describes, but was changed or replaced;"
                " move it away, or choose another folder"
            )
    return records


@contextmanager
def replacing(
    path: str | os.PathLike[str], names: Iterable[str] = (), files_of: FilesOf | None = None
) -> Iterator[Path]:
    """A context that gives an empty folder to write files into, the manifest among them, and at its end puts them at
    ``path`` as one. If the body fails nothing has changed. Files that only the manifest before named are removed.

    Args:
        path: The folder.
        names: Of the files beside the manifest that will be written.
        files_of: What the content of a manifest says of the files beside it. None means that all of the folder is the
            package's own, whatever is in it.

    Raises:
        ArtifactError: The path is a file, or cannot be written; or files of the user are in the way.
        DDFError: Writing failed, for instance because the disk is full.
    """
    folder = Path(path)
    check_writable(folder)
    before: dict[str, FileRecord] = {}
    if files_of is not None:
        _finish(folder, files_of)
        before = check_replaceable(folder, names, files_of)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside = folder.is_dir()
        for place in (folder.parent, *([folder] if inside else [])):
            remove_leftovers(place)
        seen = {name: _identity(folder / name) for name in names}
        with temporary(folder if inside else folder.parent, folder=True) as stage:
            yield stage
            for file in stage.iterdir():
                file.chmod((stage / MANIFEST).stat().st_mode)  # safetensors keeps its files to their owner
                flush(file)
            for name, identity in seen.items():
                if _identity(folder / name) != identity:
                    raise ArtifactError(f"{folder / name} was changed meanwhile; nothing was written")
            if inside:
                _commit(stage, folder)
            else:
                os.rename(stage, folder)
                flush(folder.parent)
        for name in before.keys() - set(names):
            if _fits(before[name], folder / name):
                remove(folder / name)
    except OSError as error:
        raise DDFError(f"could not write {folder}: {why(error)}") from error


def finished(folder: Path, records: Mapping[str, FileRecord]) -> dict[str, Path]:
    """Where the files that a manifest names are, after finishing a commit that was interrupted.

    Raises:
        ArtifactError: A file is missing, truncated or damaged.
    """
    return {name: _located(folder, name, record) for name, record in records.items()}


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ArtifactError: It cannot be read, or is not JSON.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(_LARGEST_JSON + 1)
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {why(error)}") from error
    if len(text) > _LARGEST_JSON:
        raise ArtifactError(f"{file} is damaged: it has more than {_LARGEST_JSON:,} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: it is not JSON ({str(error).splitlines()[0]})") from error


def _records(folder: Path, files_of: FilesOf) -> dict[str, FileRecord]:
    """What the manifest of a folder says of the files beside it; empty where there is none.

    Raises:
        ArtifactError: The manifest is another program's, or cannot be read.
    """
    file = folder / MANIFEST
    if not os.path.lexists(file):
        return {}
    found = None
    with suppress(ArtifactError):
        content = read_json(file)
        found = files_of(content) if isinstance(content, dict) else None
    if not isinstance(found, Mapping):
        raise ArtifactError(
            f"{file} is in the way: it is not a manifest that can be replaced here; move it away, or choose another"
            " folder"
        )
    records = {}
    for name, record in found.items():
        with suppress(ValidationError):
            records[name] = FileRecord.model_validate(record)
    return records


def _finish(folder: Path, files_of: FilesOf) -> None:
    """Finishes a commit that was interrupted, as far as its files are there."""
    if not (folder / _PENDING).is_dir() and not any(folder.glob(f"*{_OLD_PENDING}")):
        return
    for name, record in _records(folder, files_of).items():
        with suppress(ArtifactError):  # what cannot be finished is about to be replaced, or in the way
            _located(folder, name, record)


def _identity(file: Path) -> tuple[int, ...] | None:
    """What is another after a file was changed or replaced."""
    try:
        found = file.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _fits(record: FileRecord, file: Path) -> bool:
    try:
        return record.fits(file)
    except OSError:
        return False


def _commit(stage: Path, folder: Path) -> None:
    pending = folder / _PENDING
    remove(pending)
    os.rename(stage, pending)
    flush(folder)
    os.replace(pending / MANIFEST, folder / MANIFEST)  # from here on the folder is the new one
    flush(folder)
    for name in os.listdir(pending):
        with suppress(FileNotFoundError):  # a reader finished this one
            os.replace(pending / name, folder / name)
    flush(folder)
    with suppress(OSError):
        pending.rmdir()


def _located(folder: Path, name: str, record: FileRecord) -> Path:
    final = folder / name
    if record.fits(final):
        return final
    for pending in (folder / _PENDING / name, folder / (name + _OLD_PENDING)):
        with suppress(FileNotFoundError):  # its writer finishes it at this moment
            if record.fits(pending):
                with suppress(OSError):  # a folder that cannot be written is read as it is
                    os.replace(pending, final)
                    return final
                return pending
    if not final.is_file():
        raise ArtifactError(f"{final} is missing; save the model again")
    size = final.stat().st_size
    if size != record.size:
        raise ArtifactError(f"{final} has {size:,} bytes where the manifest says {record.size:,}: it is incomplete")
    if record.fits(final):
        return final
    raise ArtifactError(f"{final} is damaged: its SHA-256 is not that of the manifest; save the model again")


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
