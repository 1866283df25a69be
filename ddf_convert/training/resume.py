"""What must be the same when a run is resumed, and what is reported if it differs."""

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

# Settings that decide the result, and the options that give them: they must not change.
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
# These become part of the recipe, which must not change either.
RECIPE = ("--recipe", "--epochs", "--steps", "--batch-size", "--accumulate", "--lr", "--amp")
# A run may go on elsewhere; what changes is recorded, since the last digits may depend on it.
NOTED = ("--device",)
# These change nothing in the result.
FREE = ("--output", "--resume", "--workers", "--checkpoint-every", "--json", "--debug")

_HASHES = ("weights", ARCHITECTURE, "teacher_weights")


def environment(device: torch.device, world: int) -> dict[str, Any]:
    """Returns what a run computes with, as far as the last digits of its results depend on it."""
    machine = describe(device)
    kept = ("device", "processor", "gpu", "threads", "torch", "numba", "cuda", "cudnn", "numba_cuda")
    found = {name: machine[name] for name in kept if machine.get(name) is not None}
    return {**found, "timm": timm.__version__, "ddf_convert": __version__, "processes": world}


def architecture(model: nn.Module) -> str:
    """Returns a hash of a model's printed tree, which shows rates and strides that no weight has."""
    return hashlib.sha256(str(model).encode()).hexdigest()


def check_settings(
    path: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    entries: Sequence[Entry],
    decisive: Mapping[str, str] = DECISIVE,
) -> None:
    """Makes sure that settings and data are those that a run began with, as far as its version recorded them.

    Args:
        path: Folder of the run.
        before: The recorded settings.
        now: The requested ones.
        entries: The data now.
        decisive: Names of the settings that must not change, and the options that give them.
    """
    for name, option in decisive.items():
        if name not in before or before[name] == now[name]:
            continue
        if name == CLASS_NAMES:
            _raise_data_changed(path, "classes", _class_changes(before[name], now[name]))
        elif name == DATA:
            if changed := _data_changes(path, entries):
                _raise_data_changed(path, "data", changed)
        elif name != ARCHITECTURE or _versions(before) == _versions(now):  # others may print it in other words
            difference = _describe_difference(name, before[name], now[name])
            raise UsageError(f"{path} was begun with {difference} ({option}): give the same, or another folder")


def notes(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns notes for the user on what may differ and does, or could not be compared."""
    lines = []
    if DATA not in before:
        lines.append(f"{path} was begun by a version of ddf_convert that did not record the data: not compared")
    old, new = before.get(ENVIRONMENT, {}), now[ENVIRONMENT]
    changes = [f"{name} {old[name]} -> {new.get(name, 'none')}" for name in old if old[name] != new.get(name)]
    if changes:
        lines.append(
            f"{path} goes on elsewhere ({', '.join(changes)}): its results may differ from those of a run without"
            " interruption"
        )
    return lines


def check_recipe(path: Path, before: tuple[Recipe, int], now: tuple[Recipe, int]) -> None:
    """Makes sure that the stages are those that a run began with; recipes come with the number of processes."""
    old, new = (_stages(*each) for each in (before, now))
    if old != new:
        place, was, is_now = next(iter(_walk_differences(old, new)))
        raise UsageError(
            f"{path} was begun with another recipe: {place} was {was} and is {is_now}; give the same --recipe and"
            " options, or another folder"
        )


def merge_settings(before: Mapping[str, Any], now: Mapping[str, Any], step: int | None) -> dict[str, Any]:
    """Returns the settings to record for a run that goes on from a step: those before win, where they were recorded."""
    place = {"step": step, ENVIRONMENT: now[ENVIRONMENT]}
    return {**now, **before, "went_on": [*before.get("went_on", []), place]}


def _versions(settings: Mapping[str, Any]) -> tuple[Any, ...]:
    versions = settings.get("versions") or {}
    return tuple(versions.get(name) for name in ("torch", "timm", "ddf_convert"))


def _describe_difference(name: str, before: Any, now: Any) -> str:
    words = name.replace("_", " ")
    if name in _HASHES:
        return f"{'another' if name == ARCHITECTURE else 'other'} {words}"
    if isinstance(before, dict) and isinstance(now, dict):
        words, before, now = next(_walk_differences(before, now))
    return f"{words} {before}, and this is {now}"


def _raise_data_changed(path: Path, what: str, changed: str) -> NoReturn:
    raise UsageError(
        f"the {what} are not those that {path} was begun with: {changed}; put them back as they were, or start a new"
        " run in another folder"
    )


def _class_changes(before: Sequence[str] | None, now: Sequence[str] | None) -> str:
    if before is None or now is None:
        return f"there {'are no' if before else 'were no'} labels"
    gone, new = ([name for name in one if name not in other] for one, other in ((before, now), (now, before)))
    named = [f"{fingerprint.first(names)} {words}" for names, words in ((gone, "missing"), (new, "new")) if names]
    return ", ".join(named) or "they come in another order"


def _data_changes(path: Path, entries: Sequence[Entry]) -> str:
    try:
        before = fingerprint.unpack((path / fingerprint.FILE).read_bytes())
    except (OSError, ValueError):
        return f"{fingerprint.FILE} is missing or damaged, which would say where they differ"
    return fingerprint.differences(before, entries)  # none, if only a decoder rounds otherwise


def _stages(recipe: Recipe, world: int) -> dict[str, Any]:
    """Returns the stages as data. Accumulation counts all processes: half as many may take twice the batches each."""
    content = recipe.model_dump(mode="json", by_alias=True)
    for stage in content["stages"]:
        stage["accumulate"] *= world
    return {"stages": content["stages"]}


def _walk_differences(before: Any, after: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        for name in before:
            yield from _walk_differences(before[name], after[name], f"{place}.{name}" if place else name)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _walk_differences(*pair, f"{place}.{index}")
    elif before != after:
        yield place, before, after
