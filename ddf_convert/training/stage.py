"""What a stage of a recipe is trained with: objective, optimizer, schedule, averaged weights, order of images."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import timm.data
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ddf_convert.errors import UsageError, first_line
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.parameters import learning_rate, parameter_groups
from ddf_convert.recipes.schema import Stage
from ddf_convert.training.dataloader import ImageLoader, ImageSettings, training_loader
from ddf_convert.training.dataset import ImageDataset
from ddf_convert.training.diagnostics import memory_explained
from ddf_convert.training.distributed import Processes
from ddf_convert.training.sampler import TrainingSampler
from ddf_convert.utils.modules import evaluating

AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """How to train, whatever the recipe.

    Attributes:
        seed: Of everything that is random.
        workers: Processes that load images, for each process that trains.
        channels_last: Memory format of the maps.
        compiled: Use ``torch.compile``.
        checkpoint_every: Steps between two checkpoints; None is ``checkpoint_seconds``.
        checkpoint_seconds: Between two checkpoints.
    """

    seed: int = 0
    workers: int = 0
    channels_last: bool = False
    compiled: bool = False
    checkpoint_every: int | None = None
    checkpoint_seconds: float = 600.0

    @property
    def memory_format(self) -> torch.memory_format:
        """Of images and models."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclass(frozen=True)
class Data:
    """What is looked at.

    Attributes:
        training: Images to train with.
        validation: Images to evaluate on.
        settings: What is made of them for the model.
        classes: How many there are; None if labels play no part.
    """

    training: ImageDataset
    validation: ImageDataset
    settings: ImageSettings
    classes: int | None


@dataclass
class Position:
    """Where a run is.

    Attributes:
        stage: Number of the stage.
        step: Steps that were taken in it.
        total: Steps that were taken in all.
        due: Whether the model has yet to be evaluated here.
    """

    stage: int = 0
    step: int = 0
    total: int = 0
    due: bool = True


@dataclass
class Stepping:
    """A stage, and what takes its steps once there are gradients, whatever is trained.

    Attributes:
        stage: As the recipe has it.
        steps: Its length.
        parameters: That learn.
        optimizer: timm's.
        scheduler: timm's; it goes on with every step.
        scaler: Of the loss, for float16.
        ema: Averaged weights.
        amp: Autocast's dtype; None is float32.
    """

    stage: Stage
    steps: int
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    ema: Any
    amp: torch.dtype | None

    @property
    def lr(self) -> float:
        """The learning rate of the new layers, now."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast, if it is used."""
        return torch.autocast(device.type, self.amp) if self.amp else contextlib.nullcontext()

    def gradient_norm(self) -> Tensor:
        """Of all gradients, without the scale of the loss, which they lose here."""
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def advance(self, model: nn.Module, position: Position) -> None:
        """Takes a step along the gradients, clipped if the stage says so; schedule, averages and position go along."""
        if self.stage.clip is not None:
            timm.utils.dispatch_clip_grad(self.parameters, self.stage.clip.value, mode=self.stage.clip.mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        position.step += 1
        position.total += 1
        self.scheduler.step_update(position.step)
        if self.ema is not None:
            self.ema.update(model, step=position.step)


@dataclass
class Work(Stepping):
    """A stage of a converted model, and everything that exists for it alone.

    Attributes:
        epochs_before: Passes over the data that earlier stages took.
        objective: What is minimized.
        parallel: What keeps the gradients of several processes equal; None in one.
        mixup: timm's.
        order: Which images come when.
        loader: Gives them.
    """

    epochs_before: int
    objective: Objective
    parallel: DistributedDataParallel | None
    mixup: Any
    order: TrainingSampler
    loader: ImageLoader

    @property
    def steps_per_epoch(self) -> int:
        """Of the optimizer."""
        return self.order.steps_per_epoch

    def collecting(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """A context for a batch of a step; before the last one gradients stay in their process."""
        return self.parallel.no_sync() if self.parallel is not None and not last else contextlib.nullcontext()

    def train(self, model: nn.Module) -> None:
        """Training mode, except where the stage says otherwise."""
        self.objective.train()
        if self.stage.freeze_batch_norm:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def trained(self, model: nn.Module) -> nn.Module:
        """The model to evaluate and to save: with averaged weights, if there are any."""
        return self.ema.module if self.ema is not None else model


def begin(
    index: int,
    stages: tuple[Stage, ...],
    model: nn.Module,
    teacher: nn.Module | None,
    data: Data,
    processes: Processes,
    options: Options,
) -> Work:
    """Makes everything for a stage. What learns in the model, and what does not, is set.

    Args:
        index: Of the stage.
        stages: Of the recipe.
        model: On its device.
        teacher: The original model.
        data: To train with.
        processes: That train.
        options: How.

    Raises:
        UsageError: Something in the stage does not fit the model, the data or the device.
    """
    stage = stages[index]
    order = order_of(stage, len(data.training), processes, options.seed)
    steps = stage.steps or (stage.epochs or 0) * order.steps_per_epoch
    groups = parameter_groups(model, stage, order.images_per_step)
    objective = Objective(model, stage.losses, teacher)
    amp = amp_of(stage, processes.device)
    ema = timm.utils.ModelEmaV3(model, stage.ema_decay, use_warmup=True) if stage.ema_decay else None
    with memory_explained(2):
        parameters = _reached(objective, model, stage, data, processes, options)
    optimizer = make_optimizer(stage, groups, learning_rate(stage, order.images_per_step))
    parallel = None
    if processes.world > 1:
        devices = [processes.device] if processes.device.type == "cuda" else None
        with warnings.catch_warnings():
            # Newer versions of torch have another name for it, which the oldest that we run with does not know.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            parallel = DistributedDataParallel(objective.trainable_module, devices, broadcast_buffers=False)
        objective.trainable_module = parallel
    if options.compiled:
        objective.trainable_module = torch.compile(objective.trainable_module)  # type: ignore[assignment]
    return Work(
        stage=stage,
        steps=steps,
        epochs_before=sum(_epochs(each, len(data.training), processes, options.seed) for each in stages[:index]),
        objective=objective,
        parallel=parallel,
        parameters=parameters,
        optimizer=optimizer,
        scheduler=make_scheduler(stage, optimizer, order),
        scaler=torch.amp.GradScaler(processes.device.type, enabled=amp is torch.float16),
        ema=ema,
        mixup=mixup_of(stage, data.classes),
        order=order,
        loader=training_loader(
            data.training, data.settings, stage.augmentation, order, options.workers, processes.device
        ),
        amp=amp,
    )


def order_of(stage: Stage, images: int, processes: Processes, seed: int) -> TrainingSampler:
    """Which images a process sees when.

    Raises:
        UsageError: There are fewer images than one step needs.
    """
    return TrainingSampler(images, seed, stage.batch_size, stage.accumulate, processes.rank, processes.world)


def amp_of(stage: Stage, device: torch.device) -> torch.dtype | None:
    """Autocast's dtype. On the CPU float16 is no gain, and float32 takes its place: the recipes are for any device."""
    if stage.amp == "float16" and device.type == "cpu":
        return None
    return AMP[stage.amp] if stage.amp else None


def mixup_of(stage: Stage, classes: int | None) -> Any:
    """Mixup and CutMix as timm has them; None if the stage has neither."""
    augmentation = stage.augmentation
    if augmentation is None or not augmentation.mixes or classes is None:
        return None
    return timm.data.Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=stage.losses.label_smoothing,
        num_classes=classes,
    )


def _epochs(stage: Stage, images: int, processes: Processes, seed: int) -> int:
    """Passes over the data, a part of one counted as one."""
    if stage.epochs is not None:
        return stage.epochs
    return -(-(stage.steps or 0) // order_of(stage, images, processes, seed).steps_per_epoch)


def make_optimizer(stage: Stage, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """timm's; a group's own learning rate becomes timm's ``lr_scale``, so that the whole schedule is scaled by it."""
    asked = stage.optimizer
    for group in groups:
        group["lr_scale"] = group["lr"] / lr
        group["lr"] = lr
    given: dict[str, Any] = {"eps": asked.eps, "betas": asked.betas}
    try:
        optimizer: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            groups,
            opt=asked.opt,
            lr=lr,
            weight_decay=asked.weight_decay,
            momentum=asked.momentum,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(f"stage {stage.name!r}: timm cannot make {asked.opt}: {first_line(error)}") from error
    return optimizer


def make_scheduler(stage: Stage, optimizer: torch.optim.Optimizer, order: TrainingSampler) -> Any:
    """timm's, which is told of every step."""
    asked = stage.schedule
    scale = learning_rate(stage, order.images_per_step) / stage.optimizer.lr  # where it starts and ends goes along
    lr = stage.optimizer.lr * scale
    warmup: Any = asked.warmup_epochs if stage.epochs else asked.warmup_steps
    constant = asked.sched == "constant"  # in the words of every version of timm: steps that change nothing
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        sched="step" if constant else asked.sched,
        num_epochs=stage.epochs or stage.steps or 1,
        decay_epochs=1 if constant else asked.decay_epochs,
        decay_milestones=list(asked.decay_milestones),
        decay_rate=1.0 if constant else asked.decay_rate,
        min_lr=min(asked.min_lr * scale, lr),
        warmup_lr=min(asked.warmup_lr * scale, lr),
        warmup_epochs=warmup,
        step_on_epochs=False,
        updates_per_epoch=order.steps_per_epoch if stage.epochs else 1,
    )
    return scheduler


def _reached(
    objective: Objective, model: nn.Module, stage: Stage, data: Data, processes: Processes, options: Options
) -> list[nn.Parameter]:
    """What learns, once a trial pass has told which parameters the losses depend on; the others do not learn.

    A loss of features alone leaves the classifier out, and some models hold parameters that they never use. Neither
    would ever get a gradient, for which ``DistributedDataParallel`` waits.

    Raises:
        UsageError: Nothing learns.
    """
    candidates = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shape = (2, *data.settings.input_size)
    images = torch.zeros(shape, device=processes.device).to(memory_format=options.memory_format)
    labels = torch.zeros(2, dtype=torch.int64, device=processes.device) if stage.losses.needs_labels else None
    with evaluating(objective), torch.autocast(processes.device.type, enabled=False):
        loss: Tensor = objective(images, labels)["loss"]
        found = (
            torch.autograd.grad(loss, candidates, allow_unused=True) if loss.requires_grad else [None] * len(candidates)
        )
    for parameter, gradient in zip(candidates, found, strict=True):
        parameter.requires_grad_(gradient is not None)
    reached = [parameter for parameter in candidates if parameter.requires_grad]
    if not reached:
        raise UsageError(
            f"stage {stage.name!r}: its losses depend on nothing that it trains ({', '.join(stage.trainable)});"
            " change trainable: or losses:"
        )
    return reached
