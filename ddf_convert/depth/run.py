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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddf_convert import recipes
from ddf_convert.artifacts.atomic import MANIFEST, check_writable, write_file
from ddf_convert.artifacts.lock import locked
from ddf_convert.depth import checkpoint, pairs
from ddf_convert.depth.inference import interpolate, upsample
from ddf_convert.depth.lowres import cut_to_factor, downsample
from ddf_convert.depth.metrics import Errors, errors, mean_rmse
from ddf_convert.depth.pairs import Pairs, each, open_pairs
from ddf_convert.depth.training import Settings, Trainer, check
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.recipes import Recipe
from ddf_convert.training import fingerprint, resume
from ddf_convert.training.api import changed
from ddf_convert.training.checkpoints import Checkpoints
from ddf_convert.training.damaged import set_aside
from ddf_convert.training.fingerprint import Entry
from ddf_convert.training.progress import Progress, telling
from ddf_convert.training.run_dir import is_empty
from ddf_convert.training.sampler import seeded
from ddf_convert.training.signals import Interrupted, Interruption, signals_noted
from ddf_convert.utils.device import choose

RECIPE = "depth-upsample"
_SETTINGS, _LOG = "settings.json", "log.jsonl"
_RECORD = "record"  # in a checkpoint

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
class Request:
    """What to train, with what, and where to.

    Attributes:
        data: See :func:`ddf_convert.depth.pairs.open_pairs`.
        output: Folder of the run.
        factor: Of the network.
        upsampler: "ddf", or "conv" for the network that it is compared with.
        arguments: Of the network's class; the factor and the sampling are added.
        recipe: A name or a file.
        changes: What to change in every stage; see ``Recipe.changed``.
        settings: How to train.
        unit: Of the depth maps' numbers.
        allow_8bit: Take depth maps in PNG of 8 bits.
        resume: Go on with the run in ``output``, if there is one.
        device: "cpu", "cuda" or "cuda:N"; None is the GPU if there is one.
    """

    data: Path
    output: Path
    factor: int
    upsampler: checkpoint.Upsampler = "ddf"
    arguments: dict[str, int] = field(default_factory=dict)
    recipe: str = RECIPE
    changes: dict[str, Any] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    unit: str | None = None
    allow_8bit: bool = False
    resume: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: Whether all of it was done; if not, it was asked to stop, and can be resumed.
        output: Its folder.
        factor: Of the network.
        parameters: Of the network.
        pairs: To train with.
        validation: Pairs to validate with.
        steps: That were taken.
        seconds: They took.
        unit: That errors are in.
        rmse: On the validation pairs, the mean of theirs; None without any, or if the run did not end.
        bilinear: Of bilinear interpolation on the same pairs.
    """

    finished: bool
    output: Path
    factor: int
    parameters: int
    pairs: int
    validation: int
    steps: int
    seconds: float
    unit: str
    rmse: float | None = None
    bilinear: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "output": str(self.output)}


def train(request: Request) -> Outcome:
    """Trains a network and leaves it in a folder. SIGTERM and Ctrl-C end it early, after a checkpoint.

    Raises:
        UsageError: Something asked for does not fit; nothing was trained.
        DDFError: Something went wrong on the way; what was done until the last checkpoint is not lost.
    """
    with locked(request.output), telling(True) as progress, signals_noted() as interruption:
        return _train(request, progress, interruption)


def _train(request: Request, progress: Progress, interruption: Interruption) -> Outcome:
    device = choose(request.device, use="used")
    recipe = changed(recipes.load(request.recipe), request.changes, device)
    settings = request.settings
    check(recipe, settings, request.factor)
    model = _model(request).to(device)
    training, validation = open_pairs(request.data, request.unit, request.allow_8bit)
    training[0]  # a pair that cannot be read, or does not fit, is told of before anything is written
    folder = RunFolder(request.output)
    entries = [*pairs.entries(training, "training"), *(pairs.entries(validation, "validation") if validation else [])]
    described = {
        **_described(request, recipe, training),
        resume.DATA: fingerprint.digest(entries),
        resume.ENVIRONMENT: resume.environment(device, 1),
    }
    state, notes = folder.begin(described, entries, request.resume)
    if request.resume:
        told = "starting from the beginning" if state is None else f"going on from step {state['position']['total']}"
        progress.say(f"{request.output}: {told}")
    for words in notes:
        progress.say(words)
    unit = training.unit

    def keep(model: JointUpNet, step: int) -> None:
        data = recipe.model_dump(mode="json", by_alias=True)
        checkpoint.save(model, request.output, unit, downsample=settings.downsample, recipe=data, steps=step)

    trainer = Trainer(
        model,
        recipe,
        training,
        settings,
        log=folder.log,
        keep=folder.write,
        look=keep,
        progress=progress,
        interruption=interruption,
    )
    said: dict[str, Any] = {
        "output": request.output,
        "factor": request.factor,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "pairs": len(training),
        "validation": 0 if validation is None else len(validation),
        "unit": unit.shown,
    }
    try:
        kept = trainer.run(state)
    except Interrupted:
        return Outcome(False, steps=trainer.position.total, seconds=trainer.seconds, **said)
    keep(kept, trainer.position.total)
    if validation is not None:
        progress.say(f"measuring on {len(validation)} pairs")
        found, plain = (mean_rmse(errors) for errors in measure(kept, validation, settings))
        said |= {"rmse": unit.show(found), "bilinear": unit.show(plain)}
        row = {"kind": "validation", "step": trainer.position.total, "rmse": said["rmse"], "unit": unit.shown}
        folder.log({**row, "bilinear": said["bilinear"]})
    return Outcome(True, steps=trainer.position.total, seconds=trainer.seconds, **said)


def measure(model: JointUpNet, pairs: Pairs, settings: Settings) -> tuple[list[Errors], list[Errors]]:
    """The errors of a network, and of bilinear interpolation, on pairs whose depth maps are made small and large again.

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


class RunFolder:
    """The folder of a run.

    Args:
        path: Where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._settings = ""

    def begin(
        self, described: dict[str, Any], entries: Sequence[Entry], resumed: bool
    ) -> tuple[dict[str, Any] | None, list[str]]:
        """Makes the folder, or goes on with what is in it.

        Args:
            described: All that decides the result, as JSON.
            entries: What the data are.
            resumed: Go on.

        Returns:
            The state to go on from, or None; and what to tell the user.

        Raises:
            UsageError: There is another run in it, or something else.
        """
        check_writable(self.path)
        steps = self.checkpoints.steps()
        if not is_empty(self.path) and not steps and not self._is_ours():
            raise UsageError(f"{self.path} is not empty, and holds no run of depth train: give another folder")
        checkpoint.check_free(self.path)
        if steps and not resumed:
            raise UsageError(f"{self.path} already holds a run: --resume goes on with it, or give another folder")
        if not steps and (self.path / MANIFEST).exists():
            raise UsageError(
                f"{self.path} holds a network, and no checkpoint to go on from: give another folder, or remove it"
            )
        found = self.checkpoints.latest() if resumed else None
        state, step = (None, 0) if found is None else found
        notes: list[str] = []
        if state is not None:
            before = self._before(state)
            resume.check(self.path, before, described, entries, _DECISIVE)
            recipes_of = [(Recipe.model_validate(each["recipe"]), 1) for each in (before, described)]
            resume.check_recipe(self.path, *recipes_of)
            notes = resume.noted(self.path, before, described)
            described = resume.gone_on(before, described, step)
        self.path.mkdir(parents=True, exist_ok=True)
        self._settings = json.dumps(described, indent=2) + "\n"
        write_file(self.path / _SETTINGS, self._settings)
        if state is None or not (self.path / fingerprint.FILE).is_file():
            write_file(self.path / fingerprint.FILE, fingerprint.pack(entries))
        self._cut_log(step)
        return state, notes

    def write(self, state: dict[str, Any], step: int) -> None:
        """A checkpoint."""
        self.checkpoints.write({**state, _RECORD: self._settings}, step)

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row.

        Raises:
            DDFError: It could not be written, for instance because the disk is full.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / _LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise DDFError(f"could not write {self.path / _LOG}: {error.strerror}") from error

    def _is_ours(self) -> bool:
        """Whether the folder has the settings of such a run."""
        try:
            content = json.loads((self.path / _SETTINGS).read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and "upsampler" in content

    def _before(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the run was begun with: its settings, or where these are damaged, the copy in a checkpoint."""
        file = self.path / _SETTINGS
        copy = state.get(_RECORD)
        if not self._is_ours():
            if copy is None:
                raise UsageError(f"{file} is missing or damaged, or of another command: give another folder")
            if os.path.lexists(file):
                set_aside(file, "it cannot be read", "the copy in the checkpoint replaces it")
        content: dict[str, Any] = json.loads(file.read_bytes() if file.exists() else str(copy))
        return content

    def _cut_log(self, step: int) -> None:
        """Leaves out rows of steps that will come again; a damaged log is kept under another name."""
        file = self.path / _LOG
        kept, damaged = [], ""
        if step and os.path.lexists(file):
            try:
                lines = file.read_bytes().splitlines()
            except OSError as error:
                lines, damaged = [], error.strerror or "it cannot be read"
            for line in lines:
                try:
                    row = json.loads(line)
                    # the network is measured again at the end
                    if row["step"] < step or (row["step"] == step and row["kind"] == "train"):
                        kept.append(line + b"\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    damaged = damaged or "a line is no row"
            if not damaged and not lines:
                damaged = "it is empty"
        if damaged:
            set_aside(file, damaged, f"{len(kept):,} of its rows are taken over")
        write_file(file, b"".join(kept))


def _model(request: Request) -> JointUpNet:
    sampling = "nearest" if request.settings.downsample == "nearest" else "mean"
    arguments = {"scale_factor": request.factor, "sampling": sampling, **request.arguments}
    with seeded(request.settings.seed):
        try:
            return checkpoint.build(request.upsampler, **arguments)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _described(request: Request, recipe: Recipe, pairs: Pairs) -> dict[str, Any]:
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
        "recipe": json.loads(json.dumps(recipe.model_dump(mode="json", by_alias=True))),
    }
