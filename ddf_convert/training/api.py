"""A run from its options to its results, and the evaluation of what there is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ValidationError
from torch import nn

from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.atomic import FileRecord
from ddf_convert.artifacts.lock import locked
from ddf_convert.artifacts.source import ConvertedFolder
from ddf_convert.errors import UsageError, in_one_line
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.recipes.schema import Losses
from ddf_convert.training import evaluation, fingerprint, resume, setup
from ddf_convert.training.dataloader import evaluation_loader, image_settings
from ddf_convert.training.dataset import ImageDataset, OnBroken, Split, open_images
from ddf_convert.training.distributed import Processes, joined
from ddf_convert.training.evaluation import Evaluation, evaluate
from ddf_convert.training.fingerprint import Entry
from ddf_convert.training.logs import Row
from ddf_convert.training.progress import Progress, telling
from ddf_convert.training.run_dir import BEST, LAST, Record, RunFolder, told_by_one
from ddf_convert.training.setup import Say
from ddf_convert.training.signals import Interrupted, Interruption, signals_noted
from ddf_convert.training.stage import Data, Options
from ddf_convert.training.trainer import Engine
from ddf_convert.version import __version__


@dataclass(frozen=True)
class Request:
    """What to fine-tune, with what, and where to.

    Attributes:
        folder: Of the converted model.
        data: To train with; see ``ddf_convert.training.dataset``.
        output: Folder of the run.
        validation: Data to evaluate on; None is the validation part of ``data``, or a tenth of it.
        recipe: A name or a file; None is the one that the model was converted with, or "finetune".
        changes: What to change in every stage; see ``Recipe.changed``. An ``amp`` of "none" is float32.
        resume: Go on with the run in ``output``, if there is one.
        model: ``package.module:callable`` that builds the user's own model before conversion.
        teacher_checkpoint: Weights of the original model; None is those that ``folder`` keeps.
        classes: Gives the model a new classifier.
        input_size: (C, H, W) of the images; None is the model's.
        device: "cpu", "cuda" or "cuda:N"; None is the GPU if there is one.
        on_broken: What to do with images that cannot be read.
        options: How to train.
    """

    folder: Path
    data: str
    output: Path
    validation: str | None = None
    recipe: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    model: str | None = None
    teacher_checkpoint: Path | None = None
    classes: int | None = None
    input_size: tuple[int, int, int] | None = None
    device: str | None = None
    on_broken: OnBroken = "stop"
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: Whether all of it was done; if not, it was asked to stop, and can be resumed.
        output: Its folder.
        steps: That were taken.
        before: The evaluation before training, a row of the log.
        best: The best one.
        last: The last one.
        seconds: The run took, interruptions left out.
        images_per_s: In training.
        one_loss: Whether the losses of all evaluations are the same, so that they can be compared.
    """

    finished: bool
    output: Path
    steps: int
    before: Row | None
    best: Row | None
    last: Row | None
    seconds: float
    images_per_s: float | None
    one_loss: bool

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        rows = {name: None if row is None else asdict(row) for name, row in self._rows().items()}
        return {
            "finished": self.finished,
            "run": str(self.output),
            "steps": self.steps,
            **rows,
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
        }

    def _rows(self) -> dict[str, Row | None]:
        return {"before": self.before, "best": self.best, "last": self.last}


def finetune(request: Request) -> Outcome | None:
    """Fine-tunes a converted model: in this process, or in all that torchrun started.

    SIGTERM and Ctrl-C end it early, after a checkpoint.

    Returns:
        The outcome, in the first process; None in the others.

    Raises:
        UsageError: Something asked for does not fit; nothing was trained.
        DDFError: Something went wrong on the way; what was done until the last checkpoint is not lost.
    """
    with (
        joined(request.device) as processes,
        telling(processes.is_main) as progress,
        signals_noted() as interruption,
    ):
        return _finetune(request, processes, progress, interruption)


def _finetune(request: Request, processes: Processes, progress: Progress, interruption: Interruption) -> Outcome | None:
    with locked(request.output) if processes.is_main else contextlib.nullcontext():
        return _finetune_here(request, processes, progress, interruption)


def _finetune_here(
    request: Request, processes: Processes, progress: Progress, interruption: Interruption
) -> Outcome | None:
    recipe = changed(setup.choose_recipe(request.recipe, request.folder), request.changes, processes.device)
    run = RunFolder(request.output)
    run.check(request.resume)
    source = ConvertedFolder(request.folder, request.model)
    options = request.options
    model = source.load().float()
    if request.classes is not None:
        setup.replace_head(model, request.classes, options.seed)
    settings = image_settings(model, request.input_size)
    model = placed(model, processes, options)
    classes = setup.outputs(model, settings)
    teacher = _teacher(request, recipe, source, processes)
    setup.check_outputs(recipe, classes, setup.outputs(teacher, settings, "the original") if teacher else None)
    data = setup.open_data(
        request.data, request.validation, recipe, settings, classes, request.on_broken, options.seed, progress.say
    )
    setup.check_stages(recipe, model, data, processes, options.seed)
    setup.announce_precision(recipe.stages, processes.device, progress.say)

    with told_by_one(processes):
        found = run.checkpoints.latest() if run.exists else None
    state, resumed_at = (None, None) if found is None else found
    if processes.is_main:
        described, entries = _described(request, recipe, source, model, data, processes)
        asked, before = Record(recipe, described), None if state is None else run.recorded(state)
        if before is not None:
            for words in run.check_same(before, asked, entries):
                progress.say(words)
    if request.resume:
        progress.say(
            f"nothing to resume in {request.output}: starting from the beginning"
            if resumed_at is None
            else f"going on from step {resumed_at} of {request.output}"
        )
    processes.wait()  # all have looked at the folder before one writes there
    if processes.is_main:
        run.begin(asked, entries, resumed_at, before)
    if request.classes is None:
        run.original = teacher  # a model with another classifier is no longer made of this original
    engine = Engine(
        model.train(), recipe, data, processes, options, run, teacher, progress=progress, interruption=interruption
    )
    try:
        engine.run(state)
        finished = True
    except Interrupted:
        finished = False
    if not processes.is_main:
        return None
    if (missing := run.end()) is not None:
        progress.say(missing)
    return _outcome(engine, run, finished)


def _described(
    request: Request, recipe: Recipe, source: ConvertedFolder, model: nn.Module, data: Data, processes: Processes
) -> tuple[dict[str, Any], list[Entry]]:
    """All that decides the result beside the recipe, as JSON, and what the images are."""
    options, manifest = request.options, artifact.read_manifest(request.folder)
    teacher = manifest.original if request.teacher_checkpoint is None else FileRecord.of(request.teacher_checkpoint)
    entries = fingerprint.of_images(data.training, "training") + fingerprint.of_images(data.validation, "validation")
    settings = {
        "versions": {"ddf_convert": __version__, "torch": torch.__version__, "timm": timm.__version__},
        "folder": str(request.folder),
        "weights": manifest.weights.sha256,
        resume.ARCHITECTURE: resume.architecture(model),
        "model": request.model,
        "teacher": None if request.teacher_checkpoint is None else str(request.teacher_checkpoint),
        "teacher_weights": teacher.sha256 if teacher is not None and recipe.needs_teacher else None,
        "data": request.data,
        "images": len(data.training),
        "validation": request.validation,
        "validation_images": len(data.validation),
        resume.DATA: fingerprint.digest(entries),
        "labelled": data.validation.has_labels,
        "classes": data.classes,
        resume.CLASS_NAMES: None if data.training.classes is None else list(data.training.classes),
        "input_size": list(data.settings.input_size),
        "preparation": json.loads(json.dumps(asdict(data.settings))),
        "on_broken": request.on_broken,
        "seed": options.seed,
        "world": processes.world,
        "device": str(processes.device),
        "workers": options.workers,
        "channels_last": options.channels_last,
        "compile": options.compiled,
        resume.ENVIRONMENT: resume.environment(processes.device, processes.world),
    }
    return settings, entries


def changed(recipe: Recipe, changes: dict[str, Any], device: torch.device) -> Recipe:
    """The recipe with changes in every stage.

    Raises:
        UsageError: They do not fit; float16 on the CPU among them.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if given.get("amp") == "float16" and device.type == "cpu":
        raise UsageError("--amp float16 is for GPUs: give bfloat16, or none")
    if given.get("amp") == "none":
        del given["amp"]
        stages = tuple(stage.model_copy(update={"amp": None}) for stage in recipe.stages)
        recipe = recipe.model_copy(update={"stages": stages})
    try:
        return recipe.changed(**given)
    except ValidationError as error:
        raise UsageError(f"recipe {recipe.name}, changed by options: {in_one_line(error)}") from error


def _teacher(request: Request, recipe: Recipe, source: ConvertedFolder, processes: Processes) -> nn.Module | None:
    if not recipe.needs_teacher:
        if request.teacher_checkpoint is not None:
            raise UsageError(f"--teacher-checkpoint: recipe {recipe.name} does not learn from the original model")
        return None
    teacher = source.load_original(request.teacher_checkpoint)
    if teacher is None:
        raise UsageError(
            f"recipe {recipe.name} learns from the original model, whose weights {request.folder} does not keep:"
            " convert with --recipe distill (or the like), or give them with --teacher-checkpoint FILE"
        )
    return placed(teacher.float(), processes, request.options).requires_grad_(False)


def placed(model: nn.Module, processes: Processes, options: Options) -> nn.Module:
    """The model on this process's device, in the memory format of the run."""
    moved: nn.Module = model.to(processes.device).to(memory_format=options.memory_format)
    return moved


def _outcome(engine: Engine, run: RunFolder, finished: bool) -> Outcome:
    rows = run.rows()
    looks = [row for row in rows if row.kind == "validation"]
    trained = [row for row in rows if row.kind == "train" and row.images and row.images_per_s]
    seconds = sum((row.images or 0) / (row.images_per_s or 1) for row in trained)
    best = engine.best
    return Outcome(
        finished=finished,
        output=run.path,
        steps=engine.position.total,
        before=next((row for row in looks if row.step == 0), None),
        best=next((row for row in looks if best is not None and row.step == best.step), None),
        last=looks[-1] if looks else None,
        seconds=engine.seconds,
        images_per_s=sum(row.images or 0 for row in trained) / seconds if seconds else None,
        one_loss=len({None if each.losses.needs_labels else each.losses for each in engine.recipe.stages}) == 1,
    )


# --- evaluating what there is ---


@dataclass(frozen=True)
class Question:
    """What to evaluate, on what.

    Attributes:
        name: A run, a converted folder, or any model that ``ddf_convert.artifacts.source.open_model`` opens.
        data: See ``ddf_convert.training.dataset``.
        split: Which part of the data, if they are divided.
        checkpoint: Weights of a model that is not in a folder.
        pretrained: Download timm's.
        arguments: Of ``timm.create_model``, for such a model.
        model: ``package.module:callable`` that builds the user's own model before conversion.
        batch_size: Images of one process at a time.
        input_size: (C, H, W) of the images; None is the model's.
        device: As in :class:`Request`.
        workers: Processes that load images.
        on_broken: What to do with images that cannot be read.
    """

    name: str
    data: str
    split: Split = "validation"
    checkpoint: Path | None = None
    pretrained: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    batch_size: int = 64
    input_size: tuple[int, int, int] | None = None
    device: str | None = None
    workers: int = 0
    on_broken: OnBroken = "stop"


def measure(question: Question) -> tuple[Evaluation, str] | None:
    """Evaluates a model: top-1 and top-5 where there are labels, else agreement with the original.

    Returns:
        What was measured, and the model's name, in the first process; None in the others.

    Raises:
        UsageError: There is no such model, there are no such data, or they do not fit each other.
    """
    with joined(question.device) as processes, telling(processes.is_main) as progress:
        name, model, source = _open(question)
        settings = image_settings(model, question.input_size)
        model = model.to(processes.device)
        classes = setup.outputs(model, settings)
        images = _to_evaluate(question, classes, source, progress.say)
        teacher = None
        if not images.has_labels:
            teacher = None if source is None else source.load_original()
            if teacher is None:
                raise UsageError(
                    f"{question.data} has no labels for {classes} classes, and {name} does not keep the original"
                    " model's weights to be compared with: give labelled images"
                )
            teacher = teacher.to(processes.device)
        loader = evaluation_loader(
            images,
            settings,
            question.batch_size,
            processes.rank,
            processes.world,
            question.workers,
            processes.device,
        )
        how = evaluation.EvaluationSettings(processes, labeled=images.has_labels, batch_size=question.batch_size)
        objective = None
        if teacher is not None and classes is not None:
            objective = Objective(model, Losses(task=0, logits=1.0), teacher)
        found = evaluate(model, loader, how, objective, teacher, progress)
        return (found, name) if processes.is_main else None


def _open(question: Question) -> tuple[str, nn.Module, ConvertedFolder | None]:
    name, model, folder = setup.open_trained(
        question.name, question.model, question.checkpoint, question.pretrained, question.arguments
    )
    if folder is None and question.checkpoint is None and not question.pretrained and ":" not in question.name:
        raise UsageError(f"{question.name}: give its weights with --checkpoint FILE, or --pretrained")
    return name, model, folder


def _to_evaluate(question: Question, classes: int | None, source: ConvertedFolder | None, say: Say) -> ImageDataset:
    arguments: dict[str, Any] = {"on_broken": question.on_broken, "undivided": True}
    try:
        images = open_images(question.data, question.split, True, **arguments)
    except UsageError:
        keeps = source is not None and artifact.read_manifest(source.folder).original is not None
        if not keeps:
            raise
        say(f"{question.data}: without labels; the model is compared with the original")
        return open_images(question.data, question.split, False, **arguments)
    if images.classes is not None and classes is not None and len(images.classes) != classes:
        raise UsageError(
            f"{question.data} has {len(images.classes)} classes and the model {classes}: they are not its classes"
        )
    return images


__all__ = ["BEST", "LAST", "Outcome", "Question", "Request", "changed", "finetune", "measure"]
