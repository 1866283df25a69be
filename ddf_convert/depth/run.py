"""A training run of a depth upsampling network, from its options to its folder.

RUN/manifest.json, RUN/model.safetensors    the network, for ``ddf-convert upsample``
RUN/settings.json    what was asked for, the recipe included
RUN/log.jsonl        a row of figures a line
RUN/checkpoints/     to go on from
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddf_convert import recipes
from ddf_convert.depth import checkpoint
from ddf_convert.depth.inference import interpolate, upsample
from ddf_convert.depth.lowres import cut_to_factor, downsample
from ddf_convert.depth.metrics import Errors, errors, mean_rmse
from ddf_convert.depth.pairs import Pairs, each, open_pairs
from ddf_convert.depth.training import Settings, Trainer, check
from ddf_convert.devices import choose
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.files import write_file
from ddf_convert.folder import MANIFEST, check_writable
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.recipes import Recipe
from ddf_convert.training.checkpoints import Checkpoints
from ddf_convert.training.progress import Progress, telling
from ddf_convert.training.randomness import seeded
from ddf_convert.training.run import changed
from ddf_convert.training.survival import Interrupted, Interruption, signals_noted

RECIPE = "depth-upsample"
_SETTINGS, _LOG = "settings.json", "log.jsonl"


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
    with telling(True) as progress, signals_noted() as interruption:
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
    state = folder.begin(_described(request, recipe, training), request.resume)
    if request.resume:
        told = "starting from the beginning" if state is None else f"going on from step {state['position']['total']}"
        progress.say(f"{request.output}: {told}")
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
        keep=folder.checkpoints.write,
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

    def begin(self, described: dict[str, Any], resume: bool) -> dict[str, Any] | None:
        """Makes the folder, or goes on with what is in it.

        Args:
            described: All that decides the result, as JSON.
            resume: Go on.

        Returns:
            The state to go on from, or None.

        Raises:
            UsageError: There is another run in it, or something else.
        """
        check_writable(self.path)
        file = self.path / _SETTINGS
        if self.path.is_dir() and any(self.path.iterdir()):
            if not file.is_file():
                raise UsageError(f"{self.path} is not empty, and holds no run of upsample-train: give another folder")
            checkpoint.check_free(self.path)
            if not resume and (self.checkpoints.steps() or (self.path / MANIFEST).exists()):
                raise UsageError(f"{self.path} already holds a run: --resume goes on with it, or give another folder")
        there = self._before(file) if file.is_file() else None
        before = there if resume else None
        if before is not None and before != described:
            different = [key for key in described if before.get(key) != described[key]] or ["something"]
            raise UsageError(
                f"{self.path} was begun with another {different[0]}: give the same options, or a new folder"
            )
        found = self.checkpoints.latest() if before is not None else None
        self.path.mkdir(parents=True, exist_ok=True)
        write_file(file, json.dumps(described, indent=2) + "\n")
        self._cut_log(found[1] if found else 0)
        return found[0] if found else None

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row.

        Raises:
            DDFError: It could not be written, for instance because the disk is full.
        """
        try:
            with (self.path / _LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise DDFError(f"could not write {self.path / _LOG}: {error.strerror}") from error

    def _before(self, file: Path) -> dict[str, Any]:
        try:
            content: Any = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{file} cannot be read, or is damaged: give another folder") from error
        if not isinstance(content, dict) or not {"factor", "upsampler"} <= content.keys():
            raise UsageError(f"{file} is not that of a run of upsample-train: give another folder")
        return content

    def _cut_log(self, step: int) -> None:
        """Leaves out rows of steps that will come again, and one that was not finished."""
        file = self.path / _LOG
        kept = []
        if step and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        write_file(file, "".join(kept))


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
