"""The state of a run on disk: whole whenever the run is killed, checked when it is read, the newest two kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from ddf_convert.artifacts.atomic import MANIFEST, FileRecord, atomic_folder, locate_files
from ddf_convert.artifacts.checkpoint import why_unreadable
from ddf_convert.errors import ArtifactError, DDFError, first_line
from ddf_convert.utils.logging import warn

FORMAT_VERSION = 1
KEPT = 2
_STATE = "state.pt"
_NAME = re.compile(r"step-(\d+)")
_LEFTOVER = ".saving-*"  # the names of ddf_convert.artifacts.atomic.temporary_path, and ours for what is being deleted


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    step: int
    files: dict[str, FileRecord]


class Checkpoints:
    """The checkpoints of one run: folders ``step-00001234`` with the state and a manifest that says what it hashes to.

    One process writes; any may read at any time.

    Args:
        folder: Where they are; it need not exist.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def write(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint, and when it stands deletes all but it and the one before.

        Checkpoints of later steps are deleted too: a run that writes step 8 after step 9 was resumed before it.

        Args:
            state: Nested dicts, lists and tuples of tensors and plain values (int, float, str, bool, None).
            step: Its number, >= 0.

        Raises:
            TypeError: The state holds what could not be read back.
            ArtifactError: The folder cannot be written.
            DDFError: Writing failed, for instance because the disk is full; the checkpoints before are whole.
        """
        _check_plain(state, "state")
        self._clear_leftovers()
        with atomic_folder(self._at(step)) as stage:
            try:
                with (stage / _STATE).open("wb") as file:
                    torch.save(state, file)
            except RuntimeError as error:  # torch's writer, after its file failed
                raise DDFError(f"could not write {self._at(step)}: {_cause(error)}") from error
            manifest = _Manifest(step=step, files={_STATE: FileRecord.of(stage / _STATE)})
            (stage / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        before = [other for other in self.steps() if other < step]
        for other in self.steps():
            if other != step and other not in before[-(KEPT - 1) :]:
                self._delete(other)

    def latest(self) -> tuple[dict[str, Any], int] | None:
        """The newest checkpoint that is whole, its tensors on the CPU, and its step; None where there are none.

        Newer ones that are damaged are named in a warning.

        Raises:
            ArtifactError: There are checkpoints, and none is whole.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                state = self._read(step)
            except ArtifactError as error:
                damaged.append(str(error))
                continue
            for reason in damaged:
                warn(f"{reason}; going on from the checkpoint of step {step} instead")
            return state, step
        if damaged:
            raise ArtifactError(f"no checkpoint in {self.folder} can be read: {'; '.join(damaged)}; start the run anew")
        return None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, whole or damaged, in ascending order."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _read(self, step: int) -> dict[str, Any]:
        folder = self._at(step)
        try:
            manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise ArtifactError(f"{folder} has no {MANIFEST}: it is incomplete") from error
        except (OSError, ValidationError) as error:
            raise ArtifactError(f"{folder / MANIFEST} is damaged, or of another version") from error
        try:
            files = locate_files(folder, manifest.files)
        except ArtifactError as error:
            raise ArtifactError(str(error).removesuffix("; save the model again")) from error
        try:
            state: dict[str, Any] = torch.load(files[_STATE], map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except Exception as error:
            raise ArtifactError(
                f"{folder / _STATE} cannot be read: {why_unreadable(error) or 'it is damaged'}"
            ) from None
        return state

    def _delete(self, step: int) -> None:
        # Under another name first: interrupted, it is a leftover, and not a damaged checkpoint.
        aside = self.folder / f".saving-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):  # the new checkpoint stands, and that is what matters
            os.rename(self._at(step), aside)
            shutil.rmtree(aside)

    def _clear_leftovers(self) -> None:
        for leftover in [*self.folder.glob(_LEFTOVER), *self.folder.glob(f"step-*/{_LEFTOVER}")]:
            shutil.rmtree(leftover, ignore_errors=True)


def _check_plain(value: Any, name: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_plain(key, f"a key of {name}")
            _check_plain(inner, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _check_plain(inner, f"{name}[{index}]")
    elif not (value is None or isinstance(value, torch.Tensor) or type(value) in (int, float, str, bool)):
        raise TypeError(f"{name} is {type(value).__name__}: only tensors and plain values are read back")


def _cause(error: BaseException) -> str:
    """Why, in the words of the operating system if it said so."""
    for link in _chain(error):
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
    return first_line(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
