"""Fine-tuning and evaluation, from options to results."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.lock import locked
from ddf_convert.artifacts.source import ConvertedFolder
from ddf_convert.errors import UsageError
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.schema import Losses
from ddf_convert.training import evaluation, setup
from ddf_convert.training.dataloader import evaluation_loader, image_settings
from ddf_convert.training.dataset import ImageDataset, OnBroken, Split, open_images
from ddf_convert.training.distributed import Processes, joined
from ddf_convert.training.evaluation import Evaluation, evaluate
from ddf_convert.training.finetuner import Finetuner
from ddf_convert.training.logs import Row
from ddf_convert.training.progress import Progress, progress_of
from ddf_convert.training.run_dir import FinetuneRun, resume_message
from ddf_convert.training.setup import FinetuneRequest, Say
from ddf_convert.training.signals import Interrupted, Interruption, signals_noted
from ddf_convert.utils.logging import logger_level


@dataclass(frozen=True)
class FinetuneOutcome:
    """How a run ended."""

    finished: bool  # False: asked to stop, and can be resumed
    output: Path
    steps: int
    before: Row | None  # the evaluation before training
    best: Row | None
    last: Row | None
    seconds: float  # interruptions left out
    images_per_s: float | None  # in training
    one_loss: bool  # all stages have the same losses, so that evaluations can be compared by them

    def to_dict(self) -> dict[str, Any]:
        """Returns the outcome as JSON."""
        rows = {"before": self.before, "best": self.best, "last": self.last}
        return {
            "finished": self.finished,
            "run": str(self.output),
            "steps": self.steps,
            **{name: None if row is None else asdict(row) for name, row in rows.items()},
            "seconds": self.seconds,
            "images_per_s": self.images_per_s,
        }


def finetune(request: FinetuneRequest) -> FinetuneOutcome | None:
    """Fine-tunes a converted model: in this process, or in all that torchrun started.

    SIGTERM and Ctrl-C end it early, after a checkpoint.

    Returns:
        The outcome in the first process; None in the others.

    Raises:
        UsageError: Something asked for does not fit; nothing was trained.
        DDFError: Something went wrong on the way; what was done until the last checkpoint is not lost.
    """
    with (
        joined(request.device) as processes,
        progress_of(processes.is_main) as progress,
        signals_noted() as interruption,
        locked(request.output) if processes.is_main else contextlib.nullcontext(),
    ):
        return _finetune(request, processes, progress, interruption)


def _finetune(
    request: FinetuneRequest, processes: Processes, progress: Progress, interruption: Interruption
) -> FinetuneOutcome | None:
    run = FinetuneRun(request.output)
    run.check(request.resume)
    prepared = setup.prepare(request, processes, progress.say)
    # All processes see the same checkpoints: the first one warns of what is wrong with them.
    with contextlib.nullcontext() if processes.is_main else logger_level(logging.ERROR, "ddf_convert"):
        state, resumed_at = run.checkpoints.latest() or (None, None)
    if processes.is_main:
        record, entries = setup.describe(request, prepared, processes)
        before = None if state is None else run.recorded(state)
        for note in run.compare(before, record, entries) if before is not None else []:
            progress.say(note)
    if request.resume:
        progress.say(resume_message(request.output, resumed_at))
    processes.wait()  # all have looked at the folder before one writes there
    if processes.is_main:
        run.begin(record, entries, resumed_at, before)
    if request.classes is None:
        run.original = prepared.teacher  # a model with another classifier is no longer made of this original
    trainer = Finetuner(
        prepared.model.train(),
        prepared.recipe,
        prepared.data,
        processes,
        request.options,
        run,
        prepared.teacher,
        progress=progress,
        interruption=interruption,
    )
    try:
        trainer.run(state)
        finished = True
    except Interrupted:
        finished = False
    if not processes.is_main:
        return None
    if (missing := run.end()) is not None:
        progress.say(missing)
    return _outcome(trainer, run, finished)


def _outcome(trainer: Finetuner, run: FinetuneRun, finished: bool) -> FinetuneOutcome:
    rows = run.rows()
    evaluations = [row for row in rows if row.kind == "validation"]
    trained = [row for row in rows if row.kind == "train" and row.images and row.images_per_s]
    seconds = sum((row.images or 0) / (row.images_per_s or 1) for row in trained)
    best = trainer.best
    return FinetuneOutcome(
        finished=finished,
        output=run.path,
        steps=trainer.position.total,
        before=next((row for row in evaluations if row.step == 0), None),
        best=next((row for row in evaluations if best is not None and row.step == best.step), None),
        last=evaluations[-1] if evaluations else None,
        seconds=trainer.seconds,
        images_per_s=sum(row.images or 0 for row in trained) / seconds if seconds else None,
        one_loss=len({None if each.losses.needs_labels else each.losses for each in trainer.recipe.stages}) == 1,
    )


# --- evaluating what there is ---


@dataclass(frozen=True)
class EvaluateRequest:
    """What to evaluate, on what."""

    name: str  # a run, a converted folder, or any model that open_model opens
    data: str  # see ddf_convert.training.dataset
    split: Split = "validation"
    checkpoint: Path | None = None  # weights of a model that is not in a folder
    pretrained: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of timm.create_model, for such a model
    model: str | None = None  # package.module:callable that builds the user's own model before conversion
    batch_size: int = 64  # images of one process at a time
    input_size: tuple[int, int, int] | None = None  # (C, H, W); None: the model's
    device: str | None = None  # cpu, cuda or cuda:N; None: the GPU if there is one
    workers: int = 0
    on_broken: OnBroken = "stop"


def evaluate_model(request: EvaluateRequest) -> tuple[Evaluation, str] | None:
    """Evaluates a model: top-1 and top-5 where there are labels, else agreement with the original.

    Returns:
        What was measured, and the model's name, in the first process; None in the others.

    Raises:
        UsageError: There is no such model, there are no such data, or they do not fit each other.
    """
    with joined(request.device) as processes, progress_of(processes.is_main) as progress:
        name, model, source = _open_model(request)
        settings = image_settings(model, request.input_size)
        model = model.to(processes.device)
        classes = setup.count_classes(model, settings)
        images = _open_images(request, classes, source, progress.say)
        teacher = None
        if not images.has_labels:
            teacher = None if source is None else source.load_original()
            if teacher is None:
                raise UsageError(
                    f"{request.data} has no labels for {classes} classes, and {name} does not keep the original"
                    " model's weights to be compared with: give labelled images"
                )
            teacher = teacher.to(processes.device)
        loader = evaluation_loader(
            images,
            settings,
            request.batch_size,
            processes.rank,
            processes.world,
            request.workers,
            processes.device,
        )
        how = evaluation.EvaluationSettings(processes, labeled=images.has_labels, batch_size=request.batch_size)
        objective = None
        if teacher is not None and classes is not None:
            objective = Objective(model, Losses(task=0, logits=1.0), teacher)
        found = evaluate(model, loader, how, objective, teacher, progress)
        return (found, name) if processes.is_main else None


def _open_model(request: EvaluateRequest) -> tuple[str, nn.Module, ConvertedFolder | None]:
    name, model, folder = setup.open_trained(
        request.name, request.model, request.checkpoint, request.pretrained, request.arguments
    )
    if folder is None and request.checkpoint is None and not request.pretrained and ":" not in request.name:
        raise UsageError(f"{request.name}: give its weights with --checkpoint FILE, or --pretrained")
    return name, model, folder


def _open_images(
    request: EvaluateRequest, classes: int | None, source: ConvertedFolder | None, say: Say
) -> ImageDataset:
    options: dict[str, Any] = {"on_broken": request.on_broken, "undivided": True}
    try:
        images = open_images(request.data, request.split, True, **options)
    except UsageError:
        if source is None or artifact.read_manifest(source.folder).original is None:
            raise
        say(f"{request.data}: without labels; the model is compared with the original")
        return open_images(request.data, request.split, False, **options)
    if images.classes is not None and classes is not None and len(images.classes) != classes:
        raise UsageError(
            f"{request.data} has {len(images.classes)} classes and the model {classes}: they are not its classes"
        )
    return images
