"""The parts of a recipe as data that is checked when it is made: conversion, initialization, stages of fine-tuning.

Terms are timm's: ``opt``, ``sched``, ``warmup_epochs``, ``auto_augment``, ``re_prob`` mean what they do there.
"""

from __future__ import annotations

from typing import Annotated, Literal

import timm.optim
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.errors import suggestion

Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Method = Literal["paper", "preserve", "calibrate"]


def _check_optimizer(name: str) -> str:
    known = [str(each) for each in timm.optim.list_optimizers()]
    if name not in known:
        raise ValueError(f"timm has no optimizer {name!r}{suggestion(name, known)}")
    return name


class RecipePart(BaseModel):
    """Unknown keys are errors, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RecipeConversion(ConvertConfig):
    """How to convert: the fields of :class:`ConvertConfig`, and which convolutions."""

    include: Patterns = Field(default=(), description="Patterns of names; only these are replaced.")
    exclude: Patterns = Field(default=(), description="Patterns of names; these are not replaced.")


class Initialize(RecipePart):
    """What the new layers start from."""

    method: Method = Field(
        default="paper",
        description='"paper": random weights, as in the paper. "preserve": the nearest fixed layer to the old'
        ' convolution, with the dynamic parts at zero. "calibrate": that, then every layer in turn is fitted to the'
        " original's outputs on images; upsampling and functional calls are preserved and not fitted.",
    )
    num_images: int = Field(default=128, ge=1, description='"calibrate": number of images.')
    batch_size: int = Field(default=16, ge=1, description='"calibrate": images at a time.')
    steps: int = Field(
        default=16,
        ge=0,
        description='"calibrate": gradient steps of each layer after the closed form, its dynamic parts included.',
    )
    lr: float = Field(default=1e-3, gt=0, description='"calibrate": learning rate of these steps (Adam).')
    batch_norm: bool = Field(
        default=True,
        description='"calibrate": re-estimate the statistics of batch normalizations, from the first to the last.',
    )
    keep_frozen: bool = Field(
        default=False,
        description='"preserve" and "calibrate": freeze a layer that takes over frozen weights. Layers are trainable'
        " otherwise.",
    )


class Optimizer(RecipePart):
    """Arguments of ``timm.optim.create_optimizer_v2``."""

    opt: Annotated[str, AfterValidator(_check_optimizer)] = Field(
        default="adamw", description="Name of the optimizer in timm."
    )
    lr: float = Field(gt=0, description="Learning rate of the new layers.")
    lr_base_size: int | None = Field(
        default=None,
        ge=1,
        description="Images a step that ``lr`` is meant for: it is scaled in proportion to the images of a step, of all"
        " processes and accumulated batches. None does not scale it.",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, description="Of weights; biases, norms and FilterNorm's scales and shifts have none."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="For optimizers that have one.")
    eps: float | None = Field(default=None, gt=0, description="None is the optimizer's default.")
    betas: tuple[float, float] | None = Field(default=None, description="None is the optimizer's default.")
    old_lr_scale: float = Field(
        default=1.0,
        gt=0,
        description="Learning rate of the original's parameters, as a fraction of the new layers'.",
    )


class Schedule(RecipePart):
    """Arguments of ``timm.scheduler.create_scheduler_v2``; the learning rate is updated at every step."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = Field(
        default="cosine", description='Name of the schedule; "constant" only warms up.'
    )
    warmup_epochs: float = Field(default=0, ge=0, description="For a stage that is counted in epochs.")
    warmup_steps: int = Field(default=0, ge=0, description="For a stage that is counted in steps.")
    warmup_lr: float = Field(default=1e-6, ge=0, description="Learning rate at the start of the warm-up.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of the schedule.")
    decay_epochs: float = Field(default=30, gt=0, description='"step": epochs between two decays.')
    decay_milestones: tuple[int, ...] = Field(default=(), description='"multistep": epochs of the decays.')
    decay_rate: float = Field(default=0.1, gt=0, description='For "step", "multistep" and "poly".')


class Losses(RecipePart):
    """What is minimized: a weighted sum."""

    task: float = Field(default=1.0, ge=0, description="Weight of the loss against the labels; 0 needs no labels.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Smoothing of the labels.")
    bce: bool = Field(default=False, description="Binary cross-entropy for each class instead of cross-entropy.")
    logits: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the Kullback-Leibler divergence from the original's class probabilities.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Both logits are divided by it for the divergence.")
    features: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the relative squared error of every new layer's output against the original's.",
    )

    @property
    def needs_labels(self) -> bool:
        """Whether images alone are not enough."""
        return self.task > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the original model is needed."""
        return self.logits > 0 or self.features > 0

    @model_validator(mode="after")
    def _check(self) -> Losses:
        if not self.needs_labels and not self.needs_teacher:
            raise ValueError("every weight is 0: give task, logits or features a weight")
        if not self.needs_labels and (self.label_smoothing or self.bce):
            raise ValueError("label_smoothing and bce belong to the task loss, whose weight is 0")
        return self


class Augmentation(RecipePart):
    """Arguments of ``timm.data.create_transform`` and ``timm.data.Mixup``."""

    scale: tuple[float, float] = Field(default=(0.08, 1.0), description="Range of the random crop's area.")
    ratio: tuple[float, float] = Field(default=(3 / 4, 4 / 3), description="Range of the random crop's aspect ratio.")
    hflip: float = Field(default=0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    vflip: float = Field(default=0.0, ge=0, le=1, description="Probability of a vertical flip.")
    color_jitter: float = Field(default=0.0, ge=0, description="Strength of the color jitter.")
    auto_augment: str | None = Field(
        default=None, description='A policy in timm\'s notation, such as "rand-m9-mstd0.5-inc1".'
    )
    re_prob: float = Field(default=0.0, ge=0, le=1, description="Probability of random erasing.")
    mixup: float = Field(default=0.0, ge=0, description="Alpha of mixup; 0 turns it off.")
    cutmix: float = Field(default=0.0, ge=0, description="Alpha of CutMix; 0 turns it off.")

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class Clip(RecipePart):
    """Gradient clipping, by ``timm.utils.dispatch_clip_grad``."""

    value: float = Field(gt=0, description="The limit.")
    mode: Literal["norm", "value", "agc"] = Field(
        default="norm", description='Of the norm of all gradients, of each value, or adaptive ("agc").'
    )


class Stage(RecipePart):
    """A stage of fine-tuning."""

    name: str = Field(min_length=1, description="Name in logs.")
    trainable: Patterns = Field(
        default=("all",),
        description='What is trained: "all"; "new" (the new layers); "norms" (all kinds of normalizations); "head" (the'
        " classifier); or globs and ``re:`` patterns of parameter names. The rest is frozen.",
    )
    epochs: int | None = Field(default=None, ge=1, description="Length in epochs.")
    steps: int | None = Field(default=None, ge=1, description="Length in optimizer steps; give one of the two.")
    optimizer: Optimizer = Field(description="Optimizer and learning rate.")
    schedule: Schedule = Field(default=Schedule(), description="Learning rate schedule.")
    losses: Losses = Field(default=Losses(), description="What is minimized.")
    augmentation: Augmentation | None = Field(
        default=Augmentation(), description="How images are augmented; None transforms them as in evaluation."
    )
    freeze_batch_norm: bool = Field(
        default=False, description="Keep the statistics of batch normalizations, as in evaluation."
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Decay of the averaged weights that are evaluated and saved; None is off."
    )
    clip: Clip | None = Field(default=None, description="Gradient clipping; None is off.")
    amp: Literal["bfloat16", "float16"] | None = Field(default=None, description="dtype of autocast; None is off.")
    batch_size: int = Field(default=64, ge=1, description="Images of one process at a time.")
    accumulate: int = Field(default=1, ge=1, description="Batches that make a step.")

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("a stage lasts so many epochs or so many steps: give one of the two")
        if self.steps is not None and self.schedule.warmup_epochs:
            raise ValueError("warmup_epochs in a stage that is counted in steps: write warmup_steps")
        if self.epochs is not None and self.schedule.warmup_steps:
            raise ValueError("warmup_steps in a stage that is counted in epochs: write warmup_epochs")
        warmup, length = (
            (self.schedule.warmup_epochs, self.epochs) if self.epochs else (self.schedule.warmup_steps, self.steps)
        )
        if length is not None and warmup >= length:
            raise ValueError(f"a warm-up of {warmup:g} leaves nothing of a stage of {length}")
        if self.steps is not None and self.schedule.sched in ("step", "multistep"):
            raise ValueError(f"the schedule {self.schedule.sched!r} counts epochs, and this stage counts steps")
        if self.augmentation and self.augmentation.mixes and not self.losses.needs_labels:
            raise ValueError("mixup and cutmix mix labels, and the task loss has no weight")
        if "all" in self.trainable and len(self.trainable) > 1:
            raise ValueError("trainable: 'all' leaves nothing to add")
        return self
