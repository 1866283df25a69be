"""Losses of a stage: the task loss on labels, and distillation of the original's features and class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ddf_convert.conversion.record import recorded
from ddf_convert.errors import UsageError
from ddf_convert.recipes.parameters import new_layers
from ddf_convert.recipes.schema import Losses
from ddf_convert.utils.capture import captured_outputs

_TINY = 1e-12  # of a norm that is divided by


class Objective(nn.Module):
    """A module that runs a model and returns its loss, as a dict like timm's training tasks.

    Args:
        model: The converted model.
        losses: Weights of the losses.
        teacher: The original model; needed if ``losses.needs_teacher``. It runs in evaluation mode and is not trained.

    Attributes:
        trainable_module: Runs the model. To train in several processes, or compiled, replace it with
            ``DistributedDataParallel(objective.trainable_module)`` or its ``torch.compile``. Parameters that get no
            gradient (the classifier, with a features loss alone) must be frozen first for ``DistributedDataParallel``.

    Raises:
        UsageError: The teacher is missing, or has none of the layers that were replaced in the model.
    """

    def __init__(self, model: nn.Module, losses: Losses, teacher: nn.Module | None = None) -> None:
        super().__init__()
        if losses.needs_teacher and teacher is None:
            raise UsageError("these losses learn from the original model: give it as the teacher")
        self.losses = losses
        names = _shared_layers(model, teacher) if teacher is not None and losses.features else []
        self.trainable_module: nn.Module = FeatureExtractor(model, names)
        self.teacher: FeatureExtractor | None = None
        if teacher is not None and losses.needs_teacher:
            self.teacher = FeatureExtractor(teacher, names).eval()
        self._task_loss = _task_loss(losses)

    def train(self, mode: bool = True) -> Objective:
        """Sets the mode, but for the teacher, which stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Any]:
        """Computes the loss of a batch.

        Args:
            images: (B, C, H, W).
            targets: (B,) class numbers, or (B, classes) probabilities as mixup makes them; None without a task loss.

        Returns:
            ``loss``, a scalar to minimize; ``output``, the model's output; and, unweighted, those of ``task_loss``,
            ``logits_loss`` and ``features_loss`` that have a weight.

        Raises:
            UsageError: Labels are missing, or the model returns no class scores.
        """
        output, features = self.trainable_module(images)
        parts: dict[str, Tensor] = {}
        if self.losses.needs_labels:
            if targets is None:
                raise UsageError("the task loss needs labels, and there are none")
            parts["task_loss"] = self._task_loss(_logits(output).float(), targets)
        if self.teacher is not None:
            with torch.no_grad():
                expected, expected_features = self.teacher(images)
            if self.losses.logits:
                parts["logits_loss"] = divergence(_logits(output), _logits(expected), self.losses.temperature)
            if self.losses.features:
                parts["features_loss"] = torch.stack(
                    [relative_error(mine, theirs) for mine, theirs in zip(features, expected_features, strict=True)]
                ).mean()
        weights = {
            "task_loss": self.losses.task,
            "logits_loss": self.losses.logits,
            "features_loss": self.losses.features,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": loss, "output": output, **{name: part.detach() for name, part in parts.items()}}


class FeatureExtractor(nn.Module):
    """A model whose forward also returns the outputs of the named modules.

    It returns them so that ``DistributedDataParallel`` sees them as outputs.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(names)

    def forward(self, images: Tensor) -> tuple[Any, list[Tensor]]:
        """Returns the model's output, and the modules' outputs in the order of their calls."""
        with captured_outputs(*(self.model.get_submodule(name) for name in self.names)) as features:
            output = self.model(images)
        return output, features


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Squared distance over squared norm of a whole batch, in float32."""
    found, expected = found.float(), expected.float()
    return (found - expected).square().sum() / expected.square().sum().clamp_min(_TINY)


def divergence(found: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of softened class probabilities, times temperature squared; logits are (B, classes).

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    mine = F.log_softmax(found.float() / temperature, dim=-1)
    theirs = F.log_softmax(expected.float() / temperature, dim=-1)
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2


def _shared_layers(model: nn.Module, teacher: nn.Module) -> list[str]:
    """Names of the new layers that the teacher has too; for a convolution with a pixel shuffle, the shuffle's name."""
    known = dict(teacher.named_modules())
    conversion = recorded(model)
    shuffles = {step.names[0]: step.removed[0] for step in conversion.replaced if step.removed} if conversion else {}
    names = [name for name in (shuffles.get(layer, layer) for layer in new_layers(model)) if name in known]
    if not names:
        raise UsageError("the teacher has none of the layers that were replaced: is it the model before conversion?")
    return names


def _task_loss(losses: Losses) -> Callable[[Tensor, Tensor], Tensor]:
    if losses.bce:
        binary: nn.Module = BinaryCrossEntropy(smoothing=losses.label_smoothing)
        return binary
    hard: nn.Module = (
        LabelSmoothingCrossEntropy(losses.label_smoothing) if losses.label_smoothing else nn.CrossEntropyLoss()
    )
    soft = SoftTargetCrossEntropy()
    return lambda output, targets: soft(output, targets) if targets.is_floating_point() else hard(output, targets)


def _logits(output: Any) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2:
        what = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UsageError(f"the task and logits losses need class scores (B, classes), and the model returns {what}")
    return output
