"""A run on disk: what was asked for, checkpoints, logs, curves, and the models.

RUN/recipe.yaml     the recipe as it was run, every value spelt out
RUN/settings.json   everything else that decides the result
RUN/checkpoints/    to go on from
RUN/log.csv, RUN/tensorboard/, RUN/curves.png
RUN/best/, RUN/last/    converted models, for ddf_convert.load
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ddf_convert import artifact
from ddf_convert.errors import UsageError
from ddf_convert.files import write_file
from ddf_convert.recipes.files import parse
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.training import curves, logs
from ddf_convert.training.checkpoints import Checkpoints
from ddf_convert.training.distributed import Processes
from ddf_convert.training.logs import Log, Row

BEST, LAST = "best", "last"
_RECIPE, _SETTINGS, _CURVES = "recipe.yaml", "settings.json", "curves.png"
_FORMAT_VERSION = 1

# What must be the same when a run goes on, and the option that says it.
_DECISIVE = {
    "weights": "DIR",
    "data": "--data",
    "images": "--data",
    "validation": "--val-data",
    "validation_images": "--val-data",
    "classes": "--num-classes",
    "input_size": "--input-size",
    "seed": "--seed",
    "on_broken": "--on-broken",
    "teacher": "--teacher-checkpoint",
    "model": "--model",
}


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

    @property
    def exists(self) -> bool:
        """Whether it holds a run with something to lose: a checkpoint."""
        return is_run(self.path) and bool(self.checkpoints.steps())

    def check(self, resume: bool) -> None:
        """Whether a run may be written here.

        Raises:
            UsageError: It holds one that is not to be resumed, or something else.
            ArtifactError: It cannot be written.
        """
        artifact.check_writable(self.path)
        if self.exists:
            if not resume:
                raise UsageError(f"{self.path} already holds a run: --resume goes on with it, or give another folder")
        elif self.path.is_dir() and any(self.path.iterdir()) and not is_run(self.path):
            raise UsageError(f"{self.path} is not empty, and holds no run: give another folder")
        elif is_run(self.path):
            self._settings()  # another program's file of this name is not to be written over
            if not resume and any((self.path / name).exists() for name in (BEST, LAST)):
                raise UsageError(
                    f"{self.path} already holds models of a run: --resume goes on with it, or give another folder"
                )
        for name in (BEST, LAST):
            artifact.check_free(self.path / name)

    def check_same(self, recipe: Recipe, settings: dict[str, Any]) -> None:
        """Whether a run that goes on here is the one that began here.

        Raises:
            UsageError: It says what is different; or the files of the run are damaged.
        """
        before = self._settings()
        for name, option in _DECISIVE.items():
            if before.get(name) != settings.get(name):
                raise UsageError(
                    f"{self.path} was begun with {name.replace('_', ' ')} {before.get(name)}, and this is"
                    f" {settings.get(name)} ({option}): give the same, or another folder"
                )
        old, new = (_comparable(*each) for each in ((self.recipe(), before["world"]), (recipe, settings["world"])))
        if old != new:
            place, was, now = next(iter(_differences(old, new)))
            raise UsageError(
                f"{self.path} was begun with another recipe: {place} was {was} and is {now}"
                f" ({self.path / _RECIPE}); give the same --recipe and options, or another folder"
            )

    def begin(self, recipe: Recipe, settings: dict[str, Any], resumed_at: int | None) -> None:
        """Writes what was asked for, and opens the log.

        Args:
            recipe: As it will be run.
            settings: As JSON.
            resumed_at: The step that the run goes on from; None is the beginning.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(self.path / _RECIPE, recipe.to_yaml())
        # Last: a folder that has it is a run.
        content = {"format_version": _FORMAT_VERSION, **settings}
        write_file(self.path / _SETTINGS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        self._log = Log(self.path, resumed_at)

    def recipe(self) -> Recipe:
        """As it was begun.

        Raises:
            UsageError: Its file is damaged.
        """
        file = self.path / _RECIPE
        try:
            return parse(file.read_text(encoding="utf-8"), str(file))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from error

    def rows(self) -> list[Row]:
        """Of the log."""
        return logs.read(self.path / logs.FILE)

    def write(self, state: dict[str, Any], step: int) -> None:
        """A checkpoint."""
        self.checkpoints.write(state, step)

    def log(self, row: Row) -> None:
        """A row of the log."""
        assert self._log is not None
        self._log.write(row)

    def model(self, model: nn.Module, best: bool) -> None:
        """The model as it is now, which may be the best so far."""
        for name in (LAST, *([BEST] if best else [])):
            artifact.save(model, self.path / name, original=self.original)

    def end(self) -> str | None:
        """Draws the curves and closes the log. Returns why there are no curves, if there are none."""
        if self._log is not None:
            self._log.close()
        try:
            write_file(self.path / _CURVES, curves.draw(self.rows()))
        except ImportError:
            return f"{_CURVES} needs matplotlib: pip install 'ddf-convert[plot]'"
        return None

    def _settings(self) -> dict[str, Any]:
        file = self.path / _SETTINGS
        try:
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if content["format_version"] == _FORMAT_VERSION:
                return content
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f"{file} cannot be read, or is damaged; give another folder") from error
        raise UsageError(f"{file} was written by another version of ddf_convert; give another folder")


def is_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    return (path / _SETTINGS).is_file()


@contextlib.contextmanager
def told_by_one(processes: Processes) -> Iterator[None]:
    """A context in which warnings about what all processes see come from the first one alone."""
    logger = logging.getLogger("ddf_convert")
    before = logger.level
    if not processes.is_main:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _comparable(recipe: Recipe, world: int) -> dict[str, Any]:
    """The stages as data, with the batches of all processes together: half of them may take twice as many each."""
    content = recipe.model_dump(mode="json", by_alias=True)
    for stage in content["stages"]:
        stage["accumulate"] *= world
    return {"stages": content["stages"]}


def _differences(before: Any, after: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        for name in before:
            yield from _differences(before[name], after[name], f"{place}.{name}" if place else name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(*pair, f"{place}.{index}")
    elif before != after:
        yield place, before, after
