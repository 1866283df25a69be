"""A training run of a depth upsampling network, from its options to its folder.

RUN/manifest.json, RUN/model.safetensors    the network, for ``ddf-convert depth predict``
RUN/settings.json    what was asked for, the recipe included
RUN/data.jsonl.gz    the pairs that it was begun with
RUN/log.jsonl        a row of figures a line
RUN/checkpoints/     to go on from
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from ddf_convert import recipes
from ddf_convert.artifacts.atomic import MANIFEST
from ddf_convert.artifacts.lock import locked
from ddf_convert.depth import checkpoint, pairs
from ddf_convert.depth.inference import interpolate, upsample
from ddf_convert.depth.lowres import Downsampling, cut_to_factor, downsample
from ddf_convert.depth.maps import Unit
from ddf_convert.depth.metrics import Errors, errors, mean_rmse
from ddf_convert.depth.pairs import Pairs, each, open_pairs
from ddf_convert.depth.trainer import DepthRow, DepthSettings, DepthTrainer, check
from ddf_convert.errors import UsageError
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.recipes import Recipe
from ddf_convert.training import fingerprint, resume
from ddf_convert.training.logs import LogFile, ReadLog, read_lines
from ddf_convert.training.progress import Progress, progress_of
from ddf_convert.training.run_dir import SETTINGS, RunFolder, RunRecord, resume_message
from ddf_convert.training.sampler import seeded
from ddf_convert.training.setup import change_recipe
from ddf_convert.training.signals import Interrupted, Interruption, signals_noted
from ddf_convert.utils.device import choose

RECIPE = "depth-upsample"
_LOG = "log.jsonl"

# What has to be the same when a run goes on, and the option that gives it.
_DECISIVE = {
    "data": "DATA",
    "unit": "--unit",
    "factor": "--factor",
    resume.DATA: "DATA",
    "pairs": "DATA",
    "upsampler": "--upsampler",
    "arguments": "--width",
    "crop": "--crop",
    "downsample": "--downsample",
    "loss": "--loss",
    "turned": "--turned",
    "seed": "--seed",
}


@dataclass(frozen=True)
class DepthTrainRequest:
    """What to train, with what, and where to."""

    data: Path  # see ddf_convert.depth.pairs.open_pairs
    output: Path  # folder of the run
    factor: int  # of the network
    upsampler: checkpoint.Upsampler = "ddf"
    arguments: dict[str, int] = field(default_factory=dict)  # of the network's class, beside factor and sampling
    recipe: str = RECIPE  # a name or a file
    changes: dict[str, Any] = field(default_factory=dict)  # of every stage, see Recipe.changed
    settings: DepthSettings = field(default_factory=DepthSettings)
    unit: str | None = None  # of the depth maps' numbers
    allow_8bit: bool = False  # take depth maps in PNG of 8 bits
    resume: bool = False
    device: str | None = None  # cpu, cuda or cuda:N; None: the GPU if there is one


@dataclass(frozen=True)
class DepthTrainOutcome:
    """How a run ended."""

    finished: bool  # False: asked to stop, and can be resumed
    output: Path
    factor: int
    parameters: int  # of the network
    pairs: int  # to train with
    validation: int  # number of pairs
    steps: int
    seconds: float  # interruptions left out
    unit: str  # that errors are in
    rmse: float | None = None  # mean over the validation pairs; None without any, or if the run did not end
    bilinear: float | None = None  # the same of bilinear interpolation

    def to_dict(self) -> dict[str, Any]:
        """Returns the outcome as JSON."""
        return {**asdict(self), "output": str(self.output)}


def train(request: DepthTrainRequest) -> DepthTrainOutcome:
    """Trains a network and leaves it in a folder. SIGTERM and Ctrl-C end it early, after a checkpoint.

    Raises:
        UsageError: Something asked for does not fit; nothing was trained.
        DDFError: Something went wrong on the way; what was done until the last checkpoint is not lost.
    """
    with locked(request.output), progress_of(True) as progress, signals_noted() as interruption:
        return _train(request, progress, interruption)


def _train(request: DepthTrainRequest, progress: Progress, interruption: Interruption) -> DepthTrainOutcome:
    device = choose(request.device, use="used")
    recipe = change_recipe(recipes.load(request.recipe), request.changes, device)
    settings = request.settings
    check(recipe, settings, request.factor)
    model = _build(request).to(device)
    training, validation = open_pairs(request.data, request.unit, request.allow_8bit)
    training[0]  # fails before anything is written if a pair cannot be read, or does not fit
    unit = training.unit
    folder = DepthRun(request.output, unit, settings.downsample)
    folder.check(request.resume)
    entries = [*pairs.entries(training, "training"), *(pairs.entries(validation, "validation") if validation else [])]
    record = RunRecord(
        recipe,
        {
            **_describe(request, training),
            resume.DATA: fingerprint.digest(entries),
            resume.ENVIRONMENT: resume.environment(device, 1),
        },
    )
    state, resumed_at = folder.checkpoints.latest() or (None, None)
    before = None if state is None else folder.recorded(state)
    if request.resume:
        progress.say(resume_message(request.output, resumed_at))
    for note in folder.compare(before, record, entries) if before is not None else []:
        progress.say(note)
    folder.begin(record, entries, resumed_at, before)
    trainer = DepthTrainer(model, recipe, training, settings, folder, progress, interruption)
    outcome: dict[str, Any] = {
        "output": request.output,
        "factor": request.factor,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pairs": len(training),
        "validation": 0 if validation is None else len(validation),
        "unit": unit.shown,
    }
    try:
        trained = cast(JointUpNet, trainer.run(state))
    except Interrupted:
        return DepthTrainOutcome(False, steps=trainer.position.total, seconds=trainer.seconds, **outcome)
    steps = trainer.position.total
    folder.save_model(trained, steps)  # it may have been deleted since it was trained
    if validation is not None:
        progress.say(f"measuring on {len(validation)} pairs")
        rmse, bilinear = (unit.show(mean_rmse(found)) for found in measure(trained, validation, settings))
        outcome |= {"rmse": rmse, "bilinear": bilinear}
        folder.log(DepthRow("validation", steps, rmse=rmse, unit=unit.shown, bilinear=bilinear))
    return DepthTrainOutcome(True, steps=steps, seconds=trainer.seconds, **outcome)


def measure(model: JointUpNet, pairs: Pairs, settings: DepthSettings) -> tuple[list[Errors], list[Errors]]:
    """Returns the errors of a network, and of bilinear interpolation, on pairs whose depth maps are made small first.

    Rows and columns at the end that are no whole cell are left out.
    """
    found: tuple[list[Errors], list[Errors]] = ([], [])
    factor = model.scale_factor
    for _, photo, depth in each(pairs):
        photo, depth = (cut_to_factor(image, factor) for image in (photo, depth))
        small = downsample(depth[None], factor, settings.downsample)[0]
        if not small.any():
            continue
        found[0].append(errors(upsample(model, photo, small)[0], depth))
        found[1].append(errors(interpolate(small, factor, depth.shape[-2:], mode="bilinear"), depth))
    if not found[0]:
        raise UsageError(f"no pair to validate with keeps a measurement at a factor of {factor}")
    return found


class DepthLog(LogFile[DepthRow]):
    """``log.jsonl``: a row a line, as JSON."""

    @staticmethod
    def line(row: DepthRow) -> str:
        """Returns a row as a line."""
        return json.dumps(row.to_dict()) + "\n"

    @staticmethod
    def read(file: Path) -> ReadLog[DepthRow]:
        """Returns what can be read of a file."""
        text, fault, unfinished = read_lines(file)
        rows = []
        for line in text.splitlines():
            try:
                rows.append(DepthRow(**json.loads(line)))
            except (ValueError, TypeError, RecursionError):
                fault = fault or "a line is no row"
        return ReadLog(rows, fault, unfinished)


class DepthRun(RunFolder):
    """The folder of a run of ``depth train``, which is the folder of its network too."""

    decisive = _DECISIVE
    foreign = "is not empty, and holds no run of depth train: give another folder"

    def __init__(self, path: Path, unit: Unit, downsample: Downsampling) -> None:
        super().__init__(path)
        self._unit, self._downsample = unit, downsample
        self._recipe: dict[str, Any] = {}

    def encode(self, record: RunRecord) -> dict[str, str]:
        """Returns the settings, the recipe among them, as text."""
        self._recipe = record.recipe.model_dump(mode="json", by_alias=True)
        return {SETTINGS: json.dumps({**record.settings, "recipe": self._recipe}, indent=2) + "\n"}

    def recorded(self, state: dict[str, Any]) -> RunRecord:
        """Returns what the run was asked for."""
        return self.read_or_copy(SETTINGS, _parse_settings, state)

    def is_begun(self) -> bool:
        """Returns whether the folder has settings of ``depth train``."""
        try:
            _parse_settings((self.path / SETTINGS).read_text(encoding="utf-8"), SETTINGS)
        except (OSError, ValueError, RecursionError):
            return False
        return True

    def check_models(self) -> None:
        """Raises a UsageError if a network is here without a checkpoint, or something is in its way."""
        checkpoint.check_free(self.path)
        if not self.exists and self.is_begun() and (self.path / MANIFEST).exists():
            raise UsageError(
                f"{self.path} holds a network, and no checkpoint to go on from: give another folder, or remove it"
            )

    def open_log(self, resumed_at: int | None) -> DepthLog:
        """Opens ``log.jsonl``."""
        return DepthLog(self.path / _LOG, resumed_at)

    def save_model(self, model: nn.Module, step: int, best: bool = True) -> None:
        """Writes the network of a step, which replaces the one before."""
        network = cast(JointUpNet, model)
        checkpoint.save(network, self.path, self._unit, downsample=self._downsample, recipe=self._recipe, steps=step)


def _parse_settings(text: str, file: str) -> RunRecord:
    content = json.loads(text)
    if not isinstance(content, dict) or "upsampler" not in content:
        raise ValueError(f"{file} is not the settings of a run")
    return RunRecord(Recipe.model_validate(content.get("recipe")), content)


def _build(request: DepthTrainRequest) -> JointUpNet:
    sampling = "nearest" if request.settings.downsample == "nearest" else "mean"
    arguments = {"scale_factor": request.factor, "sampling": sampling, **request.arguments}
    with seeded(request.settings.seed):
        try:
            return checkpoint.build(request.upsampler, **arguments)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _describe(request: DepthTrainRequest, pairs: Pairs) -> dict[str, Any]:
    """Returns the options that decide the result beside the recipe, as JSON."""
    settings = asdict(request.settings)
    del settings["checkpoint_seconds"]
    return {
        "data": os.path.abspath(request.data),
        "pairs": len(pairs),
        "unit": pairs.unit.name,
        "factor": request.factor,
        "upsampler": request.upsampler,
        "arguments": request.arguments,
        **settings,
    }
