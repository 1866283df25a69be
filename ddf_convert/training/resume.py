"""Whether a run that is resumed is the one that began: what has to be the same, and what is noted if it is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from torch import nn

from ddf_convert.errors import UsageError
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.training import fingerprint
from ddf_convert.training.fingerprint import Entry
from ddf_convert.utils.device import describe
from ddf_convert.version import __version__

ARCHITECTURE, CLASS_NAMES, DATA, ENVIRONMENT = "architecture", "class_names", "data_sha256", "environment"

# What decides the result: what it is called in the settings, and the option that says it. These have to be the same.
DECISIVE = {
    "weights": "DIR",
    ARCHITECTURE: "DIR or --model",
    "model": "--model",
    "teacher": "--teacher-checkpoint",
    "teacher_weights": "DIR or --teacher-checkpoint",
    "data": "--data",
    "validation": "--val-data",
    CLASS_NAMES: "--data",
    DATA: "--data or --val-data",
    "images": "--data",
    "validation_images": "--val-data",
    "labelled": "--data",
    "classes": "--num-classes",
    "input_size": "--input-size",
    "preparation": "DIR",
    "seed": "--seed",
    "on_broken": "--on-broken",
    "channels_last": "--channels-last",
    "compile": "--compile",
}
# These become part of the recipe, which has to be the same as well.
RECIPE = ("--recipe", "--epochs", "--steps", "--batch-size", "--accumulate", "--lr", "--amp")
# Other machines may go on with a run: what changes is noted, since the last digits may depend on it.
NOTED = ("--device",)
# These change nothing in the result.
FREE = ("--output", "--resume", "--workers", "--checkpoint-every", "--json", "--debug")

_HASHES = ("weights", ARCHITECTURE, "teacher_weights")


def environment(device: torch.device, world: int) -> dict[str, Any]:
    """What a run calculates with, as far as the last digits of its results depend on it."""
    machine = describe(device)
    kept = ("device", "processor", "gpu", "threads", "torch", "numba", "cuda", "cudnn", "numba_cuda")
    found = {name: machine[name] for name in kept if machine.get(name) is not None}
    return {**found, "timm": timm.__version__, "ddf_convert": __version__, "processes": world}


def architecture(model: nn.Module) -> str:
    """A hash of a model's printed tree, which shows rates, strides and the like that no weight has."""
    return hashlib.sha256(str(model).encode()).hexdigest()


def check(
    path: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    entries: Sequence[Entry],
    decisive: Mapping[str, str] = DECISIVE,
) -> None:
    """Whether settings and data are those that a run began with. What an older version did not record is not compared.

    Args:
        path: Folder of the run.
        before: The settings recorded in it.
        now: Those that are asked for.
        entries: What the data are now.
        decisive: Names of the settings that have to be the same, and the options that give them.

    Raises:
        UsageError: It says what is different, and what to do.
    """
    for name, option in decisive.items():
        if name not in before or before[name] == now[name]:
            continue
        if name == CLASS_NAMES:
            _raise_other_data(path, "classes", _other_classes(before[name], now[name]))
        elif name == DATA:
            if changed := _other_entries(path, entries):
                _raise_other_data(path, "data", changed)
        elif name != ARCHITECTURE or _versions(before) == _versions(now):  # others may print it in other words
            raise UsageError(
                f"{path} was begun with {_difference(name, before[name], now[name])} ({option}): give the same, or"
                " another folder"
            )


def noted(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What to tell the user of what may differ, and does, or could not be compared.

    Args:
        path: Folder of the run.
        before: The settings recorded in it.
        now: Those that are asked for.
    """
    found = []
    if DATA not in before:
        found.append(f"{path} was begun by a version of ddf_convert that did not record the data: not compared")
    old, new = before.get(ENVIRONMENT, {}), now[ENVIRONMENT]
    changes = [f"{name} {old[name]} -> {new.get(name, 'none')}" for name in old if old[name] != new.get(name)]
    if changes:
        found.append(
            f"{path} goes on elsewhere ({', '.join(changes)}): its results may differ from those of a run without"
            " interruption"
        )
    return found


def check_recipe(path: Path, before: tuple[Recipe, int], now: tuple[Recipe, int]) -> None:
    """Whether the stages of a recipe are those that a run began with.

    Args:
        path: Folder of the run.
        before: The recipe, and the number of processes.
        now: Likewise.

    Raises:
        UsageError: It names the first difference.
    """
    old, new = (_stages(*each) for each in (before, now))
    if old != new:
        place, was, is_now = next(iter(_differences(old, new)))
        raise UsageError(
            f"{path} was begun with another recipe: {place} was {was} and is {is_now}; give the same --recipe and"
            " options, or another folder"
        )


def gone_on(before: Mapping[str, Any], now: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """The settings to record for a run that goes on: as it was begun, and where it went on.

    Args:
        before: The settings recorded.
        now: Those that are asked for; what an older version did not record is taken from here.
        step: That the run goes on from.
    """
    place = {"step": step, ENVIRONMENT: now[ENVIRONMENT]}
    return {**now, **before, "went_on": [*before.get("went_on", []), place]}


def _versions(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    versions = settings.get("versions") or {}
    return tuple(versions.get(name) for name in ("torch", "timm", "ddf_convert"))


def _difference(name: str, before: Any, now: Any) -> str:
    words = name.replace("_", " ")
    if name in _HASHES:
        return f"{'another' if name == ARCHITECTURE else 'other'} {words}"
    if isinstance(before, dict) and isinstance(now, dict):
        words, before, now = next(_differences(before, now))
    return f"{words} {before}, and this is {now}"


def _raise_other_data(path: Path, what: str, changed: str) -> NoReturn:
    raise UsageError(
        f"the {what} are not those that {path} was begun with: {changed}; put them back as they were, or start a new"
        " run in another folder"
    )


def _other_classes(before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    if before is None or now is None:
        return f"there {'are no' if before else 'were no'} labels"
    gone, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    named = [f"{fingerprint.first(names)} {words}" for names, words in ((gone, "missing"), (new, "new")) if names]
    return ", ".join(named) or "they come in another order"


def _other_entries(path: Path, entries: Sequence[Entry]) -> str:
    try:
        before = fingerprint.unpack((path / fingerprint.FILE).read_bytes())
    except (OSError, ValueError):
        return f"{fingerprint.FILE} is missing or damaged, which would say where they differ"
    return fingerprint.differences(before, entries)  # none, if only a decoder rounds otherwise


def _stages(recipe: Recipe, world: int) -> dict[str, Any]:
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
