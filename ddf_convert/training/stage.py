"""What a stage of a recipe is trained with, whatever is trained: optimizer, schedule, loss scale, averaged weights."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddf_convert.errors import UsageError, first_line
from ddf_convert.recipes.parameters import learning_rate
from ddf_convert.recipes.schema import Stage
from ddf_convert.training.sampler import TrainingSampler

AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Position:
    """Where a run is.

    Attributes:
        stage: Number of the stage.
        step: Steps taken in the stage.
        total: Steps taken in the run.
        due: Whether the evaluation at this step is still to be done.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    due: bool = True


@dataclass
class StageState:
    """A stage while it is trained.

    Attributes:
        stage: Its part of the recipe.
        order: The images of each step.
        steps: Length of the stage.
        epochs_before: Passes over the data in earlier stages.
        parameters: Those that learn.
        optimizer: timm's.
        scheduler: timm's, updated at every step.
        scaler: Scales the loss, for float16.
        ema: timm's ModelEmaV3, or None.
        amp: Autocast's dtype; None is float32.
        parallel: Keeps the gradients of several processes equal; None in one process.
    """

    stage: Stage
    order: TrainingSampler
    steps: int
    epochs_before: int
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: Any
    amp: torch.dtype | None
    parallel: DistributedDataParallel | None = None

    @classmethod
    def begin(
        cls,
        stage: Stage,
        model: nn.Module,
        groups: list[dict[str, Any]],
        order: TrainingSampler,
        device: torch.device,
        epochs_before: int = 0,
    ) -> StageState:
        """Makes the state of a stage at its first step."""
        amp = amp_dtype(stage, device)
        optimizer = make_optimizer(stage, groups, learning_rate(stage, order.images_per_step))
        return cls(
            stage=stage,
            order=order,
            steps=stage_steps(stage, order),
            epochs_before=epochs_before,
            parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            scheduler=make_scheduler(stage, optimizer, order),
            scaler=torch.amp.GradScaler(device.type, enabled=amp is torch.float16),
            ema=timm.utils.ModelEmaV3(model, stage.ema_decay, use_warmup=True) if stage.ema_decay else None,
            amp=amp,
        )

    @property
    def lr(self) -> float:
        """The current learning rate of the new layers."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Returns a context of the stage's precision."""
        return torch.autocast(device.type, self.amp) if self.amp else contextlib.nullcontext()

    def no_sync(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for a micro-batch of a step: before the last one gradients stay in their process."""
        return self.parallel.no_sync() if self.parallel is not None and not last else contextlib.nullcontext()

    def averaged(self, model: nn.Module) -> nn.Module:
        """Returns the model to evaluate and to save: the averaged weights, if the stage averages them."""
        return self.ema.module if self.ema is not None else model

    def gradient_norm(self) -> Tensor:
        """Unscales the gradients, and returns their norm."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def step(self, model: nn.Module, position: Position) -> None:
        """Clips the gradients, takes a step, and updates schedule, averaged weights and position."""
        if self.stage.clip is not None:
            timm.utils.dispatch_clip_grad(self.parameters, self.stage.clip.value, mode=self.stage.clip.mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        position.step += 1
        position.total += 1
        self.scheduler.step_update(position.step)
        if self.ema is not None:
            self.ema.update(model, step=position.step)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint needs beside the model."""
        return {
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])  # with the learning rates: the scheduler has no state
        if state["scaler"]:  # empty on a CPU: a run may move between GPU and CPU
            self.scaler.load_state_dict(state["scaler"])


def stage_steps(stage: Stage, order: TrainingSampler) -> int:
    """Returns the length of a stage in steps."""
    return stage.steps or (stage.epochs or 0) * order.steps_per_epoch


def amp_dtype(stage: Stage, device: torch.device) -> torch.dtype | None:
    """Returns autocast's dtype. float16 becomes float32 on the CPU, where it gains nothing: recipes fit any device."""
    if stage.amp == "float16" and device.type == "cpu":
        return None
    return AMP[stage.amp] if stage.amp else None


def make_optimizer(stage: Stage, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Makes timm's optimizer. A group's own learning rate becomes timm's ``lr_scale``, which scales the schedule."""
    options = stage.optimizer
    for group in groups:
        group["lr_scale"] = group["lr"] / lr
        group["lr"] = lr
    optional: dict[str, Any] = {"eps": options.eps, "betas": options.betas}
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            groups,
            opt=options.opt,
            lr=lr,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            **{name: value for name, value in optional.items() if value is not None},
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"stage {stage.name!r}: timm cannot make {options.opt}: {first_line(error)}") from error
    return optimizer


def make_scheduler(stage: Stage, optimizer: torch.optim.Optimizer, order: TrainingSampler) -> Any:
    """Makes timm's scheduler, which is updated at every step."""
    schedule = stage.schedule
    lr = learning_rate(stage, order.images_per_step)
    scale = lr / stage.optimizer.lr  # the rates where the schedule starts and ends scale with it
    warmup: Any = schedule.warmup_epochs if stage.epochs else schedule.warmup_steps
    constant = schedule.sched == "constant"  # which older versions of timm have not: steps that change nothing
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched="step" if constant else schedule.sched,
        num_epochs=stage.epochs or stage.steps or 1,
        decay_epochs=1 if constant else schedule.decay_epochs,
        decay_milestones=list(schedule.decay_milestones),
        decay_rate=1.0 if constant else schedule.decay_rate,
        min_lr=min(schedule.min_lr * scale, lr),
        warmup_lr=min(schedule.warmup_lr * scale, lr),
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=order.steps_per_epoch if stage.epochs else 1,
    )
    return scheduler
