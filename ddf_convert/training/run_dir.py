"""A run on disk: what was asked for, checkpoints, logs, curves, and the models.

RUN/recipe.yaml     the recipe as it was run, every value spelt out
RUN/settings.json   everything else that decides the result, and where the run went on
RUN/data.jsonl.gz   the images that it was begun with
RUN/checkpoints/    to go on from, with a copy of recipe and settings in each
RUN/log.csv, RUN/tensorboard/, RUN/curves.png
RUN/best/, RUN/last/    converted models, for ddf_convert.load
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.atomic import MANIFEST, atomic_folder, locate_files, write_file
from ddf_convert.errors import ArtifactError, UsageError
from ddf_convert.recipes.files import parse
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.training import fingerprint, logs, resume
from ddf_convert.training import logs as curves
from ddf_convert.training.checkpoints import Checkpoints
from ddf_convert.training.damaged import set_aside
from ddf_convert.training.distributed import Processes
from ddf_convert.training.fingerprint import Entry
from ddf_convert.training.logs import Log, Row
from ddf_convert.utils.logging import logger_level

BEST, LAST = "best", "last"
_RECIPE, _SETTINGS, _CURVES = "recipe.yaml", "settings.json", "curves.png"
_FORMAT, _FORMAT_VERSION = "format_version", 1
_RECORD = "record"  # in a checkpoint
_Content = TypeVar("_Content")


class Record(NamedTuple):
    """What a run was asked for.

    Attributes:
        recipe: As it is run.
        settings: Everything else, as JSON.
    """

    recipe: Recipe
    settings: dict[str, Any]


class RunFolder:
    """The folder of one run; a ``Keeper`` of the engine, for the process that writes.

    Args:
        path: Of the folder.
        original: The model before conversion, which is kept beside the models if the recipe learns from it.
    """

    def __init__(self, path: Path, original: nn.Module | None = None) -> None:
        self.path = path
        self.original = original
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._log: Log | None = None
        self._record: dict[str, str] = {}

    @property
    def exists(self) -> bool:
        """Whether it holds a run that can go on: one with a checkpoint."""
        return is_run(self.path) and bool(self.checkpoints.steps())

    def check(self, resume: bool) -> None:
        """Whether a run may be written here.

        Raises:
            UsageError: It holds one that is not to be resumed, or cannot be; or something else.
            ArtifactError: It cannot be written.
        """
        artifact.check_writable(self.path)
        if self.exists:
            if not resume:
                raise UsageError(f"{self.path} already holds a run: --resume goes on with it, or give another folder")
        elif self._has_trained():
            raise UsageError(
                f"{self.path} holds what a run has made, and no checkpoint to go on from: give another folder"
                f" ({LAST}/ in it is a converted model, which can be trained further)"
            )
        elif not is_run(self.path) and not is_empty(self.path):
            raise UsageError(f"{self.path} is not empty, and holds no run: give another folder")
        for name in (BEST, LAST):
            if _is_whole(self.path / name):  # a damaged one is set aside
                artifact.check_free(self.path / name)

    def recorded(self, state: dict[str, Any]) -> Record:
        """What the run here was asked for: from its files, or where these are damaged, from a checkpoint.

        Args:
            state: A checkpoint.

        Raises:
            UsageError: The files are damaged, and the checkpoint is of a version that did not hold a copy.
        """
        copy = state.get(_RECORD) or {}
        recipe = _read(self.path / _RECIPE, parse, copy.get(_RECIPE))
        return Record(recipe, _read(self.path / _SETTINGS, _settings, copy.get(_SETTINGS)))

    def check_same(self, before: Record, asked: Record, entries: Sequence[Entry]) -> list[str]:
        """Whether a run that goes on here is the one that began here.

        Args:
            before: What it was begun with.
            asked: For this run.
            entries: Its images.

        Returns:
            What to tell the user of what is different and allowed.

        Raises:
            UsageError: It says what is different.
        """
        resume.check(self.path, before.settings, asked.settings, entries)
        stages = [(each.recipe, each.settings["world"]) for each in (before, asked)]
        resume.check_recipe(self.path, *stages)
        return resume.noted(self.path, before.settings, asked.settings)

    def begin(
        self, asked: Record, entries: Sequence[Entry], resumed_at: int | None = None, before: Record | None = None
    ) -> None:
        """Writes what was asked for, and opens the log.

        Args:
            asked: For this run.
            entries: Its images.
            resumed_at: The step that the run goes on from; None is the beginning.
            before: What it was begun with, if it goes on.
        """
        recipe, settings = asked.recipe, {_FORMAT: _FORMAT_VERSION, **asked.settings}
        if before is not None:
            recipe, settings = before.recipe, resume.gone_on(before.settings, settings, resumed_at)
        content = {_SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False) + "\n", _RECIPE: recipe.to_yaml()}
        self.path.mkdir(parents=True, exist_ok=True)
        for name, text in content.items():  # the settings first: a folder that has them is a run
            write_file(self.path / name, text)
        if before is None or not (self.path / fingerprint.FILE).is_file():
            write_file(self.path / fingerprint.FILE, fingerprint.pack(entries))
        self._record = content
        for name in (BEST, LAST):
            if not _is_whole(self.path / name) and not is_empty(self.path / name):
                set_aside(self.path / name, "it is no whole model", "another is written")
        self._log = Log(self.path, resumed_at)

    def rows(self) -> list[Row]:
        """Of the log."""
        return [] if self._log is None else self._log.rows

    def write(self, state: dict[str, Any], step: int) -> None:
        """A checkpoint."""
        self.checkpoints.write({**state, _RECORD: self._record}, step)

    def log(self, row: Row) -> None:
        """A row of the log."""
        assert self._log is not None
        self._log.write(row)

    def model(self, model: nn.Module, best: bool) -> None:
        """The model as it is now, which may be the best so far."""
        for name in (LAST, *([BEST] if best else [])):
            artifact.save(model, self.path / name, original=self.original)

    def has_last(self) -> bool:
        """Whether the model of the last evaluation is there."""
        return _is_whole(self.path / LAST)

    def has_best(self, step: int) -> bool:
        """Whether the best model is there. One that is missing is written again if it was also the last one.

        Args:
            step: Of its evaluation.
        """
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
            write_file(self.path / _CURVES, curves.draw(self.rows()))
        except ImportError:
            return f"{_CURVES} needs matplotlib: pip install 'ddf-convert[plot]'"
        except UsageError as error:
            return str(error)
        return None

    def _has_trained(self) -> bool:
        """Whether the folder holds results. A run writes its first checkpoint before its first step."""
        try:
            return any(row.step > 0 for row in logs.read(self.path / logs.FILE))
        except UsageError:
            return is_run(self.path) and any(_is_whole(self.path / name) for name in (BEST, LAST))


def is_run(path: Path) -> bool:
    """Whether a folder holds a run of ``finetune``: its settings, or if these are missing or damaged, checkpoints."""
    try:
        return _FORMAT in json.loads((path / _SETTINGS).read_bytes())
    except (OSError, ValueError, TypeError):
        return bool(Checkpoints(path / "checkpoints").steps())


def is_empty(path: Path) -> bool:
    """Whether there is nothing at a path, or a folder with nothing but hidden files, such as locks and leftovers."""
    if path.is_dir():
        return all(entry.name.startswith(".") for entry in path.iterdir())
    return not path.exists()


@contextlib.contextmanager
def told_by_one(processes: Processes) -> Iterator[None]:
    """A context in which warnings about what all processes see come from the first one alone."""
    with contextlib.nullcontext() if processes.is_main else logger_level(logging.ERROR, "ddf_convert"):
        yield


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds a model, undamaged."""
    try:
        locate_files(folder, artifact.read_manifest(folder).files())
    except ArtifactError:
        return False
    return True


def _read(file: Path, parsed: Callable[[str, str], _Content], copy: str | None) -> _Content:
    """The content of a file of a run, or if that is missing or damaged, of the copy in a checkpoint."""
    try:
        return parsed(file.read_text(encoding="utf-8"), str(file))
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:  # a UsageError is one
        if copy is None:
            raise UsageError(f"{file} cannot be read, or is damaged: give another folder") from error
    if os.path.lexists(file):
        set_aside(file, "it cannot be read", "the copy in the checkpoint takes its place")
    return parsed(copy, f"{file}, as the checkpoint has it")


def _settings(text: str, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get(_FORMAT), int):
        raise ValueError(f"{file} is not the settings of a run")
    if content[_FORMAT] != _FORMAT_VERSION:
        raise ArtifactError(f"{file} was written by another version of ddf_convert; give another folder")
    return content
