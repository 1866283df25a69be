"""The checkpoints of a run: whole whenever the run is killed, checked when they are read, the newest two kept."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
import zipfile
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ddf_convert.artifacts.atomic import check_writable, flush, os_error_text, remove_leftovers, temporary_path
from ddf_convert.artifacts.checkpoint import why_unreadable
from ddf_convert.errors import ArtifactError, DDFError, UsageError, error_chain, first_line
from ddf_convert.utils.logging import warn

KEPT = 2
_STATE = "state.pt"
_NAME = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints of a run, ``step-00001234/state.pt``. One process writes; any may read at any time.

    A file appears under its name when it is whole. torch.load does not compare the checksums that torch.save writes
    for each tensor, so they are compared here.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def write(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint, then deletes all but it and the one before.

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
        folder = self._folder_of(step)
        check_writable(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for place in (self.folder, *self.folder.glob("step-*")):
                remove_leftovers(place)
            with temporary_path(self.folder, folder=True) as stage:
                with (stage / _STATE).open("wb") as file:
                    torch.save(state, file)
                flush(stage / _STATE)
                if folder.is_dir():
                    os.replace(stage / _STATE, folder / _STATE)
                    flush(folder)
                else:
                    os.rename(stage, folder)
                    flush(self.folder)
        except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError after its file failed
            raise DDFError(f"could not write {folder}: {_system_reason(error)}") from error
        before = [other for other in self.steps() if other < step]
        for other in self.steps():
            if other != step and other not in before[-(KEPT - 1) :]:
                self._delete(other)

    def latest(self) -> tuple[dict[str, Any], int] | None:
        """Returns the newest checkpoint that is whole, on the CPU, and its step; None where there are none.

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
        """Returns the steps that have a checkpoint, whole or damaged, in ascending order."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        return sorted(int(match[1]) for match in matches if match)

    def _folder_of(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def _read(self, step: int) -> dict[str, Any]:
        file = self._folder_of(step) / _STATE
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ArtifactError(f"{file} is damaged: {damaged} does not have its checksum")
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except (ArtifactError, MemoryError):
            raise
        except FileNotFoundError as error:
            raise ArtifactError(f"{file} is missing: the checkpoint is incomplete") from error
        except zipfile.BadZipFile as error:
            raise ArtifactError(f"{file} is damaged or incomplete: {first_line(error)}") from error
        except Exception as error:
            raise ArtifactError(f"{file} cannot be read: {why_unreadable(error) or 'it is damaged'}") from None
        return state

    def _delete(self, step: int) -> None:
        # Under another name first: interrupted, it is a leftover, and not a damaged checkpoint.
        aside = self.folder / f".saving-{uuid.uuid4().hex}"
        with contextlib.suppress(OSError):  # the new checkpoint stands, and that is what matters
            os.rename(self._folder_of(step), aside)
            shutil.rmtree(aside)


def set_aside(path: Path, reason: str, consequence: str) -> None:
    """Renames a damaged file or folder of a run to ``NAME.damaged-1``, or the next free number, and warns."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(aside)
    except OSError as error:
        raise UsageError(f"{path} is damaged ({reason}), and cannot be renamed: {error.strerror}") from error
    warn(f"{path} is damaged ({reason}): it is kept as {aside.name}, and {consequence}")


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


def _system_reason(error: BaseException) -> str:
    """Returns the operating system's words for what failed, if it is behind the error."""
    return next((os_error_text(each) for each in error_chain(error) if isinstance(each, OSError)), first_line(error))
