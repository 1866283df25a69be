"""Evaluation on images: every image counts once, whatever the number of processes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn

from ddf_convert.errors import UsageError
from ddf_convert.recipes.losses import Objective, divergence
from ddf_convert.training.diagnostics import memory_explained
from ddf_convert.training.distributed import Processes
from ddf_convert.training.progress import Progress
from ddf_convert.utils.capture import captured_outputs
from ddf_convert.utils.modules import evaluating

Batch = tuple[Tensor, Tensor]
_FIGURES = ("loss", "top1", "top5", "agreement", "divergence")
_PARTS = ("task_loss", "logits_loss", "features_loss")


class Batches(Sized, Protocol):
    """Batches of one process: images (B, C, H, W) and labels (B,)."""

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Evaluation:
    """The figures of an evaluation over the images of all processes; None where one does not apply.

    Attributes:
        images: Number of images.
        loss: Cross-entropy if the losses need labels; otherwise the recipe's loss.
        top1: Fraction of images whose label has the highest score.
        top5: Fraction of images whose label is among the five highest scores, with more than five classes.
        agreement: Fraction of images with the same highest score as the original.
        divergence: Kullback-Leibler divergence from the original's class probabilities, whatever the recipe's losses.
        parts: The parts of the recipe's loss, unweighted.
        seconds: Time taken.
    """

    images: int
    loss: float | None
    top1: float | None
    top5: float | None
    agreement: float | None
    divergence: float | None
    parts: dict[str, float]
    seconds: float

    @property
    def images_per_s(self) -> float:
        """Images a second, of all processes together."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def rank(self) -> tuple[float, float]:
        """The key by which evaluations are compared; higher is better.

        First comes the accuracy, or without labels the agreement with the original. Then comes a distance that stages
        with different losses have in common.
        """
        accuracy = self.top1 if self.top1 is not None else self.agreement
        distances = (self.divergence, self.parts.get("features_loss"), self.loss)
        distance = next((each for each in distances if each is not None), math.nan)
        return (-1.0 if accuracy is None else accuracy, -math.inf if math.isnan(distance) else -distance)


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    Attributes:
        processes: The processes that share the images.
        labeled: Whether there are labels.
        amp: dtype of autocast.
        memory_format: Of the images.
        batch_size: Images at a time, for errors.
        stop: Whether this process was asked to stop; called after every batch.
    """

    processes: Processes
    labeled: bool = True
    amp: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    batch_size: int = 1
    stop: Callable[[], bool] = lambda: False


class Stopped(Exception):  # noqa: N818
    """All processes agreed to stop evaluating."""


def evaluate(
    model: nn.Module,
    batches: Batches,
    settings: EvaluationSettings,
    objective: Objective | None = None,
    teacher: nn.Module | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates a model, in evaluation mode meanwhile.

    Args:
        model: The model.
        batches: Those of this process; the processes may have different numbers of them.
        settings: How to evaluate.
        objective: The recipe's losses of this model, which are evaluated too if they need the original.
        teacher: The original, to compare with.
        progress: Shows every batch.

    Raises:
        Stopped: A process was asked to stop.
        UsageError: A label is none of the model's classes.
        DDFError: Memory ran out.
    """
    progress = progress or Progress()
    processes = settings.processes
    sums = _Sums(processes.device)
    rounds = int(max(count.item() for count in processes.gathered(torch.tensor([len(batches)]))))
    began = time.perf_counter()
    source = iter(batches)
    with (
        evaluating(*(each for each in (model, objective) if each is not None)),
        torch.no_grad(),
        progress.counting("evaluating", rounds),
        memory_explained(settings.batch_size),
    ):
        for _ in range(rounds):
            batch = next(source, None)
            if batch is not None:
                _measure(sums, model, batch, settings, objective, teacher)
            if processes.any(settings.stop()):
                raise Stopped
            progress.step()
    images, means = sums.means(processes)
    return Evaluation(
        images=images,
        **{name: means.get(name) for name in _FIGURES},
        parts={name: means[name] for name in _PARTS if name in means},
        seconds=time.perf_counter() - began,
    )


def check_labels(labels: Tensor, classes: int) -> None:
    """Raises a UsageError if labels, on the CPU, are not among the classes of a model."""
    if len(labels) and (highest := int(labels.max())) >= classes:
        raise UsageError(
            f"a label is {highest}, and the model's {classes} classes go from 0 to {classes - 1}: --num-classes"
            f" {highest + 1} or more gives it a new classifier"
        )


class _Sums:
    """Sums over images, on the device until the end."""

    names = ("images", *_FIGURES, *_PARTS)

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)  # value, number of images

    def add(self, name: str, value: Tensor | float, images: int) -> None:
        row = self._sums[self.names.index(name)]
        row[0] += torch.as_tensor(value, device=row.device).double() * images
        row[1] += images

    def means(self, processes: Processes) -> tuple[int, dict[str, float]]:
        """Returns the number of images of all processes, and the means over them."""
        sums = processes.total(self._sums).tolist()
        means = {name: value / count for name, (value, count) in zip(self.names, sums, strict=True) if count}
        return int(sums[0][1]), means


def _measure(
    sums: _Sums,
    model: nn.Module,
    batch: Batch,
    settings: EvaluationSettings,
    objective: Objective | None,
    teacher: nn.Module | None,
) -> None:
    device = settings.processes.device
    images = batch[0].to(device, non_blocking=True, memory_format=settings.memory_format)
    labels = batch[1].to(device, non_blocking=True) if settings.labeled else None
    count = len(images)
    losses = None if objective is None else objective.losses
    autocast: Any = torch.autocast(device.type, settings.amp) if settings.amp else contextlib.nullcontext()
    # The objective may run the teacher itself: then it need not run twice.
    with autocast, captured_outputs(*([] if teacher is None else [teacher])) as teacher_outputs:
        if objective is not None and losses is not None and losses.needs_teacher:
            found = objective(images, labels)
            output = found["output"]
            for name in _PARTS:
                if name in found:
                    sums.add(name, found[name], count)
            if not losses.needs_labels:
                sums.add("loss", found["loss"], count)
        else:
            output = model(images)
        if teacher is not None and not teacher_outputs:
            teacher(images)
    sums.add("images", 1.0, count)
    if not isinstance(output, Tensor) or output.ndim != 2:
        return
    output = output.float()
    if labels is not None:
        check_labels(batch[1], output.shape[1])
        for k in (1, 5) if output.shape[1] > 5 else (1,):
            sums.add(f"top{k}", accuracy(output, labels, topk=(k,))[0] / 100, count)
        if losses is None or losses.needs_labels:
            sums.add("loss", F.cross_entropy(output, labels), count)
    expected = teacher_outputs[0] if teacher_outputs else None
    if isinstance(expected, Tensor) and expected.shape == output.shape:
        sums.add("agreement", (output.argmax(1) == expected.argmax(1)).double().mean(), count)
        sums.add("divergence", divergence(output, expected), count)
