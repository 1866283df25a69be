"""The folder of a run: what was asked for, checkpoints, log, and models.

RUN/recipe.yaml     the recipe as it was run, every value spelt out
RUN/settings.json   everything else that decides the result, and where the run went on
RUN/data.jsonl.gz   the images that it was begun with
RUN/checkpoints/    to go on from, with a copy of recipe and settings in each
RUN/log.csv, RUN/tensorboard/, RUN/curves.png
RUN/best/, RUN/last/    converted models, for ddf_convert.load
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import nn

from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.atomic import MANIFEST, atomic_folder, check_writable, locate_files, write_file
from ddf_convert.errors import ArtifactError, UsageError
from ddf_convert.recipes.files import parse as parse_recipe
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.training import fingerprint, logs, resume
from ddf_convert.training.checkpoints import Checkpoints, set_aside
from ddf_convert.training.fingerprint import Entry
from ddf_convert.training.logs import Log, LogFile, Row

BEST, LAST = "best", "last"
SETTINGS = "settings.json"
_RECIPE, _CURVES = "recipe.yaml", "curves.png"
_FORMAT, _FORMAT_VERSION = "format_version", 1
_RECORD = "record"  # in a checkpoint
_Content = TypeVar("_Content")


class RunRecord(NamedTuple):
    """What a run was asked for: the recipe as it is run, and everything else, as JSON."""

    recipe: Recipe
    settings: dict[str, Any]


class Keeper:
    """Where a trainer leaves checkpoints and rows of the log. This one discards them."""

    def write_checkpoint(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint."""

    def log(self, row: Any) -> None:
        """Adds a row to the log."""

    def save_model(self, model: nn.Module, step: int, best: bool = True) -> None:
        """Writes the model of a step, which may be the best so far."""


class RunFolder(Keeper, ABC):
    """The folder of a run, whatever was trained: its record, data, checkpoints and log. One process writes it."""

    decisive: ClassVar[Mapping[str, str]]  # settings that must not change, and the options that give them
    foreign = "is not empty, and holds no run: give another folder"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._record: dict[str, str] = {}
        self._log: LogFile[Any] | None = None

    # --- what a subclass defines ---

    @abstractmethod
    def encode(self, record: RunRecord) -> dict[str, str]:
        """Returns the files that say what a run was asked for; the settings first: a folder that has them is a run."""

    @abstractmethod
    def recorded(self, state: dict[str, Any]) -> RunRecord:
        """Returns what the run was asked for, from its files, or where they are damaged from a checkpoint."""

    @abstractmethod
    def is_begun(self) -> bool:
        """Returns whether the folder has the settings of a run of this kind."""

    @abstractmethod
    def check_models(self) -> None:
        """Raises a UsageError if models are here without a checkpoint, or something is in their way."""

    @abstractmethod
    def open_log(self, resumed_at: int | None) -> LogFile[Any]:
        """Opens the log; None begins a new one."""

    # --- to begin, or to go on ---

    @property
    def exists(self) -> bool:
        """Whether the folder holds a run that can go on: one with a checkpoint."""
        return bool(self.checkpoints.steps())

    def check(self, resume: bool) -> None:
        """Makes sure that a run may be written here."""
        check_writable(self.path)
        if self.exists and not resume:
            raise UsageError(f"{self.path} already holds a run: --resume goes on with it, or give another folder")
        self.check_models()
        if not self.exists and not self.is_begun() and not is_empty(self.path):
            raise UsageError(f"{self.path} {self.foreign}")

    def compare(self, before: RunRecord, now: RunRecord, entries: Sequence[Entry]) -> list[str]:
        """Makes sure that a run that goes on here is the one that began here."""
        resume.check_settings(self.path, before.settings, now.settings, entries, self.decisive)
        recipes = [(record.recipe, record.settings.get("world", 1)) for record in (before, now)]
        resume.check_recipe(self.path, *recipes)
        return resume.notes(self.path, before.settings, now.settings)

    def begin(
        self,
        record: RunRecord,
        entries: Sequence[Entry],
        resumed_at: int | None = None,
        before: RunRecord | None = None,
    ) -> None:
        """Writes what was asked for, and opens the log."""
        if before is not None:
            record = RunRecord(before.recipe, resume.merge_settings(before.settings, record.settings, resumed_at))
        self._record = self.encode(record)
        self.path.mkdir(parents=True, exist_ok=True)
        for name, text in self._record.items():
            write_file(self.path / name, text)
        if before is None or not (self.path / fingerprint.FILE).is_file():
            write_file(self.path / fingerprint.FILE, fingerprint.pack(entries))
        self._log = self.open_log(resumed_at)

    def read_or_copy(self, name: str, parse: Callable[[str, str], _Content], state: dict[str, Any]) -> _Content:
        """Returns the content of a file, or if ``parse`` raises a ValueError, of the copy in a checkpoint."""
        file = self.path / name
        record = state.get(_RECORD)
        copy = record.get(name) if isinstance(record, dict) else record  # depth once wrote a text
        try:
            return parse(file.read_text(encoding="utf-8"), str(file))
        except ArtifactError:
            raise
        except (OSError, ValueError, RecursionError) as error:  # a UsageError is a ValueError
            try:
                content = parse(copy or "", f"{file}, as the checkpoint has it")
            except (ValueError, RecursionError):
                raise UsageError(f"{file} cannot be read, or is damaged: give another folder") from error
        if os.path.lexists(file):
            set_aside(file, "it cannot be read", "the copy in the checkpoint replaces it")
        return content

    # --- what a trainer leaves ---

    def write_checkpoint(self, state: dict[str, Any], step: int) -> None:
        """Writes a checkpoint."""
        self.checkpoints.write({**state, _RECORD: self._record}, step)

    def log(self, row: Any) -> None:
        """Adds a row to the log."""
        assert self._log is not None
        self._log.write(row)


class FinetuneRun(RunFolder):
    """The folder of a run of ``finetune``."""

    decisive = resume.DECISIVE

    def __init__(self, path: Path, original: nn.Module | None = None) -> None:
        super().__init__(path)
        self.original = original

    def encode(self, record: RunRecord) -> dict[str, str]:
        """Returns settings and recipe as texts."""
        settings = {_FORMAT: _FORMAT_VERSION, **record.settings}
        return {
            SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
            _RECIPE: record.recipe.to_yaml(),
        }

    def recorded(self, state: dict[str, Any]) -> RunRecord:
        """Returns what the run was asked for."""
        recipe = self.read_or_copy(_RECIPE, parse_recipe, state)
        return RunRecord(recipe, self.read_or_copy(SETTINGS, _parse_settings, state))

    def is_begun(self) -> bool:
        """Returns whether the folder has settings of ``finetune``."""
        return is_run(self.path)

    def check_models(self) -> None:
        """Raises a UsageError if models are here without a checkpoint, or something is in their way."""
        if not self.exists and self._has_trained():
            raise UsageError(
                f"{self.path} holds what a run has made, and no checkpoint to go on from: give another folder"
                f" ({LAST}/ in it is a converted model, which can be trained further)"
            )
        for name in (BEST, LAST):
            if _is_whole(self.path / name):  # a damaged one is set aside
                artifact.check_free(self.path / name)

    def begin(
        self,
        record: RunRecord,
        entries: Sequence[Entry],
        resumed_at: int | None = None,
        before: RunRecord | None = None,
    ) -> None:
        """Writes what was asked for, sets damaged models aside, and opens the log."""
        super().begin(record, entries, resumed_at, before)
        for name in (BEST, LAST):
            if not _is_whole(self.path / name) and not is_empty(self.path / name):
                set_aside(self.path / name, "it is no whole model", "another is written")

    def open_log(self, resumed_at: int | None) -> Log:
        """Opens ``log.csv``."""
        return Log(self.path, resumed_at)

    def rows(self) -> list[Row]:
        """Returns the rows of the log."""
        return [] if self._log is None else self._log.rows

    def save_model(self, model: nn.Module, step: int, best: bool = True) -> None:
        """Writes the model as the last one, and as the best one if it is."""
        for name in (LAST, *([BEST] if best else [])):
            artifact.save(model, self.path / name, original=self.original)

    def has_last(self) -> bool:
        """Returns whether the model of the last evaluation is there."""
        return _is_whole(self.path / LAST)

    def has_best(self, step: int) -> bool:
        """Returns whether the best model is there. A missing one is copied from the last if both are of this step."""
        best, last = self.path / BEST, self.path / LAST
        if _is_whole(best):
            return True
        if self._log is None or self._log.evaluated != step or not is_empty(best) or not _is_whole(last):
            return False
        with atomic_folder(best) as stage:
            for name in (MANIFEST, *artifact.read_manifest(last).files()):
                shutil.copyfile(last / name, stage / name)
        return True

    def end(self) -> str | None:
        """Draws the curves and closes the log. Returns why there are no curves, if there are none."""
        if self._log is not None:
            self._log.close()
        try:
            write_file(self.path / _CURVES, logs.draw(self.rows()))
        except ImportError:
            return f"{_CURVES} needs matplotlib: pip install 'ddf-convert[plot]'"
        except UsageError as error:
            return str(error)
        return None

    def _has_trained(self) -> bool:
        """Returns whether the folder holds results. A run writes its first checkpoint before its first step."""
        try:
            return any(row.step > 0 for row in logs.read(self.path / logs.FILE))
        except UsageError:
            return is_run(self.path) and any(_is_whole(self.path / name) for name in (BEST, LAST))


def resume_message(path: Path, resumed_at: int | None) -> str:
    """Returns what to tell a user who asked for --resume."""
    if resumed_at is None:
        return f"nothing to resume in {path}: starting from the beginning"
    return f"going on from step {resumed_at} of {path}"


def is_run(path: Path) -> bool:
    """Returns whether a folder holds a run of ``finetune``: its settings, or checkpoints where these are damaged."""
    try:
        return _FORMAT in json.loads((path / SETTINGS).read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return bool(Checkpoints(path / "checkpoints").steps())


def is_empty(path: Path) -> bool:
    """Returns whether a path is free, or a folder with nothing but hidden files, such as locks and leftovers."""
    if path.is_dir():
        return all(entry.name.startswith(".") for entry in path.iterdir())
    return not path.exists()


def _is_whole(folder: Path) -> bool:
    """Returns whether a folder holds a model, undamaged."""
    try:
        locate_files(folder, artifact.read_manifest(folder).files())
    except ArtifactError:
        return False
    return True


def _parse_settings(text: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get(_FORMAT), int):
        raise ValueError(f"{file} is not the settings of a run")
    if content[_FORMAT] != _FORMAT_VERSION:
        raise ArtifactError(f"{file} was written by another version of ddf_convert; give another folder")
    return content
