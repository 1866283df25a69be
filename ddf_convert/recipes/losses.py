"""What a stage minimizes: the labels' loss, and distances from the original's features and class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ddf_convert.conversion.record import recorded
from ddf_convert.errors import UsageError
from ddf_convert.recipes.parameters import new_layers
from ddf_convert.recipes.schema import Losses

_LEAST = 1e-12  # of a norm that is divided by


class Objective(nn.Module):
    """One forward pass and its loss, in the form of timm's training tasks: a dict of ``loss``, ``output`` and parts.

    Args:
        model: The converted model.
        losses: What is minimized.
        teacher: The original model; needed if ``losses.needs_teacher``. It is used in evaluation mode, and it never
            learns.

    Attributes:
        trainable_module: What calls the model. To train in several processes, or compiled, put
            ``DistributedDataParallel(objective.trainable_module)`` or its ``torch.compile`` in its place. What the
            losses do not reach (the classifier, if they look at features alone) must be frozen first, or
            ``DistributedDataParallel`` waits for its gradients.

    Raises:
        UsageError: The teacher is missing, or has none of the layers that were replaced in the model.
    """

    def __init__(self, model: nn.Module, losses: Losses, teacher: nn.Module | None = None) -> None:
        super().__init__()
        if losses.needs_teacher and teacher is None:
            raise UsageError("these losses learn from the original model: give it as the teacher")
        self.losses = losses
        watched = _pairs(model, teacher) if teacher is not None and losses.features else []
        self.trainable_module: nn.Module = Watched(model, watched)
        self.teacher: Watched | None = None
        if teacher is not None and losses.needs_teacher:
            self.teacher = Watched(teacher, watched).eval()
        self._task_loss = _task_loss(losses)

    def train(self, mode: bool = True) -> Objective:
        """As for any module; the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, images: Tensor, targets: Tensor | None = None) -> dict[str, Any]:
        """The loss of a batch.

        Args:
            images: (B, C, H, W).
            targets: (B,) class numbers, or (B, classes) probabilities as mixup makes them; None if labels do not count.

        Returns:
            ``loss``, a scalar to minimize; ``output``, what the model returned; and, unweighted, ``task_loss``,
            ``logits_loss`` and ``features_loss`` where they count.

        Raises:
            UsageError: The model's output is not what the losses can look at.
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
                parts["features_loss"] = _mean(
                    [relative_error(mine, theirs) for mine, theirs in zip(features, expected_features, strict=True)]
                )
        weights = {
            "task_loss": self.losses.task,
            "logits_loss": self.losses.logits,
            "features_loss": self.losses.features,
        }
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": loss, "output": output, **{name: part.detach() for name, part in parts.items()}}


class Watched(nn.Module):
    """A model whose forward also returns what some of its modules put out.

    They are returned, and not kept aside, so that ``DistributedDataParallel`` sees them as outputs.

    Args:
        model: The model.
        names: Of the modules.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = list(names)

    def forward(self, images: Tensor) -> tuple[Any, list[Tensor]]:
        """The model's output, and those of the modules, in the order of their calls."""
        seen: list[Tensor] = []
        with ExitStack() as hooks:
            for name in self.names:
                handle = self.model.get_submodule(name).register_forward_hook(partial(_keep, seen))
                hooks.callback(handle.remove)
            output = self.model(images)
        return output, seen


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Squared distance over squared norm, of a batch as a whole; calculated in float32."""
    found, expected = found.float(), expected.float()
    return (found - expected).square().sum() / expected.square().sum().clamp_min(_LEAST)


def divergence(found: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of softened class probabilities, mean over the batch, times temperature squared.

    Args:
        found: Logits (B, classes).
        expected: Logits (B, classes) of the teacher.
        temperature: Both logits are divided by it.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    mine = F.log_softmax(found.float() / temperature, dim=-1)
    theirs = F.log_softmax(expected.float() / temperature, dim=-1)
    return F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * temperature**2


def _keep(seen: list[Tensor], _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
    seen.append(output)


def _pairs(model: nn.Module, teacher: nn.Module) -> list[str]:
    """The replaced layers that the teacher has under the same name.

    Of a convolution that was replaced together with a pixel shuffle, what comes out is looked at behind the shuffle.
    """
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


def _mean(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).mean()
