"""Training on tensors in memory, the same numbers at every run: what a study compares is all that differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.recipes import Recipe, Stage

_CLIP = 1.0  # as in the built-in recipes


def train(
    model: nn.Module,
    recipe: Recipe,
    stage: Stage,
    data: tuple[Tensor, Tensor],
    seed: int,
    measure: Callable[[], float],
    teacher: nn.Module | None = None,
) -> list[float]:
    """One stage, with AdamW and a cosine.

    Args:
        model: Learns.
        recipe: Makes the parameter groups and the losses; anyone's own loop looks like this.
        stage: Its epochs, optimizer and losses.
        data: Images and labels.
        seed: Of the order.
        measure: Called before the first epoch and after each.
        teacher: The original model, if the losses need it.

    Returns:
        What ``measure`` returned.
    """
    images, labels = data
    objective = recipe.losses(model, stage, teacher)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, stage))
    assert stage.epochs is not None
    steps = stage.epochs * math.ceil(len(images) / stage.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    measured = [measure()]
    for _ in range(stage.epochs):
        objective.train()
        for batch in torch.randperm(len(images), generator=generator).split(stage.batch_size):
            step(objective, optimizer, images[batch], labels[batch])
            schedule.step()
        measured.append(measure())
    return measured


def step(objective: nn.Module, optimizer: Any, images: Tensor, targets: Tensor | None = None) -> float:
    """One step.

    Returns:
        The loss.
    """
    optimizer.zero_grad()
    loss = objective(images, targets)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), _CLIP)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor], at_once: int = 500) -> float:
    """Share of images that are classified right, in evaluation mode."""
    images, labels = data
    was, right = model.training, 0
    model.eval()
    for some, their in _batches(images, labels, at_once):
        right += int((model(some).argmax(1) == their).sum())
    model.train(was)
    return right / len(images)


def _batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.split(size), labels.split(size), strict=True)


def spread(runs: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Mean, least and most of several runs, epoch by epoch."""
    epochs = list(zip(*runs, strict=True))
    return {
        "mean": [sum(values) / len(values) for values in epochs],
        "min": [min(values) for values in epochs],
        "max": [max(values) for values in epochs],
    }
