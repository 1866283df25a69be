"""How good a model is on images: every image counts once, whatever the number of processes."""

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
_PARTS = ("task_loss", "logits_loss", "features_loss")


class Batches(Sized, Protocol):
    """Images (B, C, H, W) and labels (B,), those of this process."""

    def __iter__(self) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Evaluation:
    """What was measured, over the images of all processes. What does not apply is None.

    Attributes:
        images: How many.
        loss: Cross-entropy, if the labels count; else what the recipe minimizes.
        top1: Fraction whose label has the highest score.
        top5: Fraction whose label is among the five highest, of more than five.
        agreement: Fraction whose highest score is also the original's.
        divergence: Kullback-Leibler divergence from the original's class probabilities, the same whatever the recipe.
        parts: The parts of what the recipe minimizes, without their weights.
        seconds: It took.
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
        """Of all processes."""
        return self.images / max(self.seconds, 1e-9)

    @property
    def rank(self) -> tuple[float, float]:
        """The higher the better: accuracy if there are labels, else agreement with the original; then a distance.

        The distance is one that stages with different losses have in common.
        """
        first = self.top1 if self.top1 is not None else self.agreement
        distances = (self.divergence, self.parts.get("features_loss"), self.loss)
        distance = next((each for each in distances if each is not None), None)
        return (-1.0 if first is None else first, _downwards(distance))


@dataclass(frozen=True)
class EvaluationSettings:
    """How to evaluate.

    Attributes:
        processes: That share the images.
        labeled: Whether the labels mean anything.
        amp: Autocast's dtype.
        memory_format: Of the images.
        batch_size: Images at a time, for the words of an error.
        stop: Whether this process was asked to stop; looked at after every batch.
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
    """Measures a model.

    Args:
        model: The model; in evaluation mode meanwhile, and then as it was.
        batches: Those of this process; the processes may have different numbers of them.
        settings: How.
        objective: What the recipe minimizes, of this model, to be measured too where it learns from the original.
        teacher: The original, to be compared with.
        progress: Told of every batch.

    Raises:
        Stopped: A process was asked to stop.
        UsageError: A label is none of the model's classes.
        DDFError: Memory ran out.
    """
    told = progress or Progress()
    processes = settings.processes
    sums = _Sums(processes.device)
    rounds = int(max(count.item() for count in processes.gathered(torch.tensor([len(batches)]))))
    began = time.perf_counter()
    source = iter(batches)
    with (
        evaluating(*(each for each in (model, objective) if each is not None)),
        torch.no_grad(),
        told.counting("evaluating", rounds),
        memory_explained(settings.batch_size),
    ):
        for _ in range(rounds):
            batch = next(source, None)
            if batch is not None:
                _measure(sums, model, batch, settings, objective, teacher)
            if processes.any(settings.stop()):
                raise Stopped
            told.step()
    figures = sums.over(processes)
    return Evaluation(
        images=int(figures.pop("images", 0.0)),
        loss=figures.pop("loss", None),
        top1=figures.pop("top1", None),
        top5=figures.pop("top5", None),
        agreement=figures.pop("agreement", None),
        divergence=figures.pop("divergence", None),
        parts=figures,
        seconds=time.perf_counter() - began,
    )


def check_labels(labels: Tensor, classes: int) -> None:
    """Finds labels that a model cannot give: of data that do not say how many classes they have.

    Args:
        labels: On the CPU, where looking at them is free.
        classes: Of the model.

    Raises:
        UsageError: There is one.
    """
    if len(labels) and (highest := int(labels.max())) >= classes:
        raise UsageError(
            f"a label is {highest}, and the model's {classes} classes go from 0 to {classes - 1}: --num-classes"
            f" {highest + 1} or more gives it a new classifier"
        )


class _Sums:
    """Sums over images, kept on the device until the end."""

    names = ("images", "loss", "top1", "top5", "agreement", "divergence", *_PARTS)

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=device)  # value, and how often counted

    def add(self, name: str, value: Tensor | float, images: int) -> None:
        row = self._sums[self.names.index(name)]
        row[0] += torch.as_tensor(value, device=row.device).double() * images
        row[1] += images

    def over(self, processes: Processes) -> dict[str, float]:
        """Means over all images, and their number."""
        sums = processes.total(self._sums).tolist()
        figures = {name: value / count for name, (value, count) in zip(self.names, sums, strict=True) if count}
        figures["images"] = sums[0][1]
        return figures


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


def _downwards(distance: float | None) -> float:
    """For the comparison: nothing, and no number, are the worst."""
    return -distance if distance is not None and not math.isnan(distance) else -math.inf
