"""Trains a depth upsampling network as the stages of a recipe say: in one process, on any device.

Whatever is random in a step comes from the seed and from the step's number, so that a run which goes on from a
checkpoint takes the steps that it would have taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import timm.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.depth.crops import Crops
from ddf_convert.depth.lowres import Downsampling, downsample
from ddf_convert.depth.metrics import deviations
from ddf_convert.depth.pairs import Pairs
from ddf_convert.errors import UsageError
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.models.depth_holes import is_valid
from ddf_convert.recipes import Recipe, Stage
from ddf_convert.recipes.parameters import parameter_groups
from ddf_convert.training.diagnostics import gradient_not_finite, memory_explained, not_finite
from ddf_convert.training.progress import Progress
from ddf_convert.training.sampler import TrainingSampler
from ddf_convert.training.signals import Interrupted, Interruption
from ddf_convert.training.stage import Position, Stepping, amp_of, make_optimizer, make_scheduler

Loss = Literal["l1", "l2", "huber"]
LOSSES: tuple[Loss, ...] = get_args(Loss)
_HUBER = 0.3  # of the depth map's deviation: errors above it count by their size, those below by its square


@dataclass(frozen=True)
class Settings:
    """How to train, apart from the recipe.

    Attributes:
        crop: Rows, and columns, of what is looked at; a multiple of the network's factor.
        downsample: How small depth maps are made.
        loss: Of the errors over the depth map's standard deviation: "l1", "l2" or "huber".
        seed: Of everything that is random but the network's start.
        turned: Probability that near and far change places in a crop: for few data.
        checkpoint_seconds: Between two checkpoints.
    """

    crop: int = 128
    downsample: Downsampling = "nearest"
    loss: Loss = "huber"
    seed: int = 0
    turned: float = 0.0
    checkpoint_seconds: float = 60.0


@dataclass
class Interval:
    """Sums over the steps since the last row of the log."""

    steps: int = 0
    loss: float = 0.0
    grad_norm: float = 0.0
    seconds: float = 0.0


class Trainer:
    """Trains a network in place.

    Args:
        model: On its device.
        recipe: With at least one stage.
        pairs: To learn from.
        settings: How.
        log: Takes rows of figures, as JSON.
        keep: Takes the state after some steps, for going on from it.
        look: Called at the end of every stage, and of its epochs if it counts them, with the network to be kept.
        progress: Is told what happens.
        interruption: Says when to stop.

    Raises:
        UsageError: The recipe asks for what this training does not have, or the crop does not fit.
    """

    def __init__(
        self,
        model: JointUpNet,
        recipe: Recipe,
        pairs: Pairs,
        settings: Settings,
        log: Callable[[dict[str, Any]], None] = lambda row: None,
        keep: Callable[[dict[str, Any], int], None] = lambda state, step: None,
        look: Callable[[JointUpNet, int], None] = lambda model, step: None,
        progress: Progress | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        check(recipe, settings, model.scale_factor)
        self.model, self.recipe, self.settings = model, recipe, settings
        self.pairs = pairs
        self.position = Position()
        self.seconds = 0.0
        self._log, self._keep, self._look = log, keep, look
        self._progress = progress or Progress()
        self._interruption = interruption or Interruption()
        self._device = next(model.parameters()).device
        self._interval = Interval()
        self._seen = 0  # crops, over all stages
        self._written = time.monotonic()

    def run(self, state: dict[str, Any] | None = None) -> JointUpNet:
        """Trains to the end.

        Args:
            state: What ``keep`` was given, to go on from there.

        Returns:
            The network to keep: with averaged weights, if the last stage averages them.

        Raises:
            Interrupted: It was asked to stop, and the state was kept.
            DDFError: A loss is not finite, memory ran out, or a pair cannot be read.
        """
        if state is not None:
            self.position, self._seen = Position(**state["position"]), state["seen"]
        kept = self.model
        for index in range(self.position.stage, len(self.recipe.stages)):
            if index != self.position.stage:
                self.position = Position(index, 0, self.position.total)
            work = self._begin(self.recipe.stages[index])
            if state is not None:
                self._restore(work, state)
                state = None
            kept = self._stage(work)
        return kept

    def _begin(self, stage: Stage) -> Stepping:
        order = _order(stage, len(self.pairs))
        groups = parameter_groups(self.model, stage, order.images_per_step)
        amp = amp_of(stage, self._device)
        optimizer = make_optimizer(stage, groups, max(group["lr"] for group in groups))
        return Stepping(
            stage=stage,
            steps=stage.steps or (stage.epochs or 0) * order.steps_per_epoch,
            optimizer=optimizer,
            scheduler=make_scheduler(stage, optimizer, order),
            scaler=torch.amp.GradScaler(self._device.type, enabled=amp is torch.float16),
            ema=timm.utils.ModelEmaV3(self.model, stage.ema_decay, use_warmup=True) if stage.ema_decay else None,
            amp=amp,
            parameters=[parameter for parameter in self.model.parameters() if parameter.requires_grad],
        )

    def _stage(self, work: Stepping) -> JointUpNet:
        stage = work.stage
        per_epoch = _order(stage, len(self.pairs)).steps_per_epoch
        every = max(1, min(50, work.steps // 20))
        crops = Crops(self.pairs, self.settings.crop, stage.augmentation, self.settings.seed, self.settings.turned)
        self.model.train()
        with self._progress.counting(stage.name, work.steps, self.position.step):
            while self.position.step < work.steps:
                self._step(work, crops)
                step, ends = self.position.step, self.position.step == work.steps
                if ends or step % every == 0:
                    self._row(work)
                if self._interruption.asked and not ends:
                    self._write(work)
                    raise Interrupted
                looks = ends or bool(stage.epochs and step % per_epoch == 0)
                # The checkpoint first: a network without one is of a run that cannot go on.
                if looks or time.monotonic() - self._written > self.settings.checkpoint_seconds:
                    self._write(work)
                if looks:
                    self._look(self._kept(work), self.position.total)
        return self._kept(work)

    def _step(self, work: Stepping, crops: Crops) -> None:
        stage, began, total = work.stage, time.monotonic(), 0.0
        work.optimizer.zero_grad(set_to_none=True)
        with memory_explained(stage.batch_size, stage.accumulate, amp=work.amp is not None):
            for _ in range(stage.accumulate):
                photos, depths = crops.batch(self._seen, stage.batch_size)
                self._seen += stage.batch_size
                loss = self._loss(work, photos.to(self._device), depths.to(self._device)) / stage.accumulate
                work.scaler.scale(loss).backward()
                total += loss.item()
        step = self.position.step + 1
        lr = work.lr
        if not math.isfinite(total):
            raise not_finite(stage, step, f"the loss is {total}", "in this step's crops or the weights", lr)
        norm = float(work.gradient_norm())
        if not math.isfinite(norm) and not work.scaler.is_enabled():
            where = gradient_not_finite(self.model.named_parameters())
            raise not_finite(stage, step, "a gradient is not finite", where, lr)
        work.advance(self.model, self.position)
        interval, seconds = self._interval, time.monotonic() - began
        interval.steps += 1
        interval.loss += total
        interval.grad_norm += norm if math.isfinite(norm) else 0.0
        interval.seconds += seconds
        self.seconds += seconds
        self._progress.step(f"loss {interval.loss / interval.steps:.4g}  lr {lr:.2g}")

    def _loss(self, work: Stepping, photos: Tensor, depths: Tensor) -> Tensor:
        small = downsample(depths, self.model.scale_factor, self.settings.downsample)
        with work.precision(self._device):
            found = self.model(small, photos)
        return work.stage.losses.task * loss_of(found.float(), depths, deviations(small), self.settings.loss)

    def _row(self, work: Stepping) -> None:
        interval = self._interval
        self._log(
            {
                "kind": "train",
                "stage": work.stage.name,
                "step": self.position.total,
                "loss": interval.loss / interval.steps,
                "grad_norm": interval.grad_norm / interval.steps,
                "lr": work.lr,
                "seconds": self.seconds,
                "crops_per_s": interval.steps * work.stage.batch_size * work.stage.accumulate / interval.seconds,
            }
        )
        self._interval = Interval()

    def _kept(self, work: Stepping) -> JointUpNet:
        kept: JointUpNet = work.ema.module if work.ema is not None else self.model
        return kept

    def _write(self, work: Stepping) -> None:
        state = {
            "position": vars(self.position).copy(),
            "seen": self._seen,
            "seconds": self.seconds,
            "interval": asdict(self._interval),
            "model": self.model.state_dict(),
            "optimizer": work.optimizer.state_dict(),
            "scaler": work.scaler.state_dict(),
            "ema": work.ema.module.state_dict() if work.ema is not None else None,
        }
        self._keep(state, self.position.total)
        self._written = time.monotonic()

    def _restore(self, work: Stepping, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        work.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # of a run on a GPU, which may go on where no loss is scaled, and the other way round
            work.scaler.load_state_dict(state["scaler"])
        self._interval = Interval(**state.get("interval", {}))  # versions before did not keep it
        if work.ema is not None:
            work.ema.module.load_state_dict(state["ema"])
        self.seconds = state["seconds"]


def loss_of(found: Tensor, truth: Tensor, deviation: Tensor, kind: Loss) -> Tensor:
    """The mean over the pixels where the truth is known; errors are in units of each depth map's deviation.

    So a depth map counts as much in millimetres as in metres, and a near scene as much as a far one.

    Args:
        found: (B, 1, H, W).
        truth: (B, 1, H, W), holes 0.
        deviation: (B, 1, 1, 1).
        kind: "l1", "l2" or "huber" (quadratic up to 0.3 deviations).
    """
    known = is_valid(truth)
    distance = torch.where(known, found - truth, torch.zeros_like(truth)) / deviation
    if kind == "l1":
        each = distance.abs()
    elif kind == "l2":
        each = distance.square()
    else:
        each = F.huber_loss(distance, torch.zeros_like(distance), reduction="none", delta=_HUBER) / _HUBER
    return each.sum() / known.sum().clamp_min(1)


def check(recipe: Recipe, settings: Settings, factor: int) -> None:
    """Whether this training can do what a recipe asks for.

    Raises:
        UsageError: It cannot; the message names the key.
    """
    if not recipe.stages:
        raise UsageError(f"recipe {recipe.name} has no stages: there is nothing to train with")
    if settings.crop % factor or settings.crop < 2 * factor:
        raise UsageError(f"--crop {settings.crop}: must be a multiple of the factor, {factor}, and at least twice it")
    for stage in recipe.stages:
        losses, augmentation = stage.losses, stage.augmentation
        asked: dict[str, object] = {
            "losses.logits": losses.logits,
            "losses.features": losses.features,
            "losses.bce": losses.bce,
            "losses.label_smoothing": losses.label_smoothing,
        }
        if augmentation is not None:
            asked |= {
                "augmentation.mixup": augmentation.mixup,
                "augmentation.cutmix": augmentation.cutmix,
                "augmentation.re_prob": augmentation.re_prob,
                "augmentation.auto_augment": augmentation.auto_augment,
            }
        for key, value in asked.items():
            if value:
                raise UsageError(
                    f"recipe {recipe.name}, stage {stage.name!r}: {key} is for classifiers; depth upsampling has no use"
                    " for it (recipe depth-upsample shows what it knows)"
                )


def _order(stage: Stage, pairs: int) -> TrainingSampler:
    """How many steps make an epoch: a crop of every pair, those left over after the last whole step left out."""
    step = stage.batch_size * stage.accumulate
    return TrainingSampler(max(pairs, step), 0, stage.batch_size, stage.accumulate)
