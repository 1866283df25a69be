"""The parts of a recipe: how to convert, how to initialize, and stages of fine-tuning. Data, checked when it is made.

Terms are those of timm: ``opt``, ``sched``, ``warmup_epochs``, ``auto_augment``, ``re_prob`` mean what they do there.
"""

from __future__ import annotations

from typing import Annotated, Literal

import timm.optim
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.errors import suggestion

Patterns = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]
Method = Literal["paper", "preserve", "calibrate"]
_SCHEDULES = Literal["cosine", "tanh", "step", "multistep", "poly", "constant"]


def _known_optimizer(name: str) -> str:
    known = [str(each) for each in timm.optim.list_optimizers()]
    if name not in known:
        raise ValueError(f"timm has no optimizer {name!r}{suggestion(name, known)}")
    return name


class Part(BaseModel):
    """Unknown keys are errors, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ConversionPart(ConvertConfig):
    """How to convert: the fields of :class:`ConvertConfig`, and which convolutions.

    Attributes:
        include: Patterns; only these.
        exclude: Patterns; all but these.
    """

    include: Patterns = ()
    exclude: Patterns = ()


class Initialize(Part):
    """What the new layers start from.

    Attributes:
        method: "paper": random, as in the paper. "preserve": as close to the old convolution as the layer can be with
            its dynamic parts at zero. "calibrate": that, then every layer in turn fitted to the original's outputs on
            images; upsampling, and what is called as a function, is preserved and not fitted.
        num_images: "calibrate": how many images to look at.
        batch_size: "calibrate": images at a time.
        steps: "calibrate": gradient steps for each layer after the closed form, its dynamic parts included.
        lr: "calibrate": learning rate of these steps (Adam).
        batch_norm: "calibrate": estimate the statistics of batch normalizations anew, each before the layers behind it.
        keep_frozen: "preserve" and "calibrate": a layer that takes over frozen weights is frozen too. Layers are
            trainable otherwise.
    """

    method: Method = "paper"
    num_images: int = Field(default=128, ge=1)
    batch_size: int = Field(default=16, ge=1)
    steps: int = Field(default=16, ge=0)
    lr: float = Field(default=1e-3, gt=0)
    batch_norm: bool = True
    keep_frozen: bool = False


class Optimizer(Part):
    """Arguments of ``timm.optim.create_optimizer_v2``.

    Attributes:
        opt: Name of the optimizer.
        lr: Learning rate of the new layers.
        lr_base_size: Images a step that ``lr`` is meant for: it is scaled in proportion to the images that a step has
            (all processes and accumulated batches together). None: ``lr`` is used as it is.
        weight_decay: Of weights; biases, norms and the scales and shifts of FilterNorm have none.
        momentum: Of those that have one.
        eps: None is the optimizer's own.
        betas: None is the optimizer's own.
        old_lr_scale: Learning rate of what the original had already, as a fraction of that of the new layers.
    """

    opt: Annotated[str, AfterValidator(_known_optimizer)] = "adamw"
    lr: float = Field(gt=0)
    lr_base_size: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    eps: float | None = Field(default=None, gt=0)
    betas: tuple[float, float] | None = None
    old_lr_scale: float = Field(default=1.0, gt=0)


class Schedule(Part):
    """Arguments of ``timm.scheduler.create_scheduler_v2``; the rate changes with every step.

    Attributes:
        sched: Name of the schedule; "constant" has no other change than the warm-up.
        warmup_epochs: Of a stage that is counted in epochs.
        warmup_steps: Of a stage that is counted in steps.
        warmup_lr: Where the warm-up starts.
        min_lr: Where the schedule ends.
        decay_epochs: "step": epochs between two decays.
        decay_milestones: "multistep": epochs of the decays.
        decay_rate: "step", "multistep", "poly".
    """

    sched: _SCHEDULES = "cosine"
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=0.0, ge=0)
    decay_epochs: float = Field(default=30, gt=0)
    decay_milestones: tuple[int, ...] = ()
    decay_rate: float = Field(default=0.1, gt=0)


class Losses(Part):
    """What is minimized: a weighted sum.

    Attributes:
        task: Weight of the loss against the labels; 0 needs none.
        label_smoothing: Of the labels.
        bce: Binary cross-entropy for each class in the place of cross-entropy.
        logits: Weight of the Kullback-Leibler divergence from the original's class probabilities.
        temperature: Both are softened with for it.
        features: Weight of the relative squared error of every converted layer's output against the original's.
    """

    task: float = Field(default=1.0, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    bce: bool = False
    logits: float = Field(default=0.0, ge=0)
    temperature: float = Field(default=1.0, gt=0)
    features: float = Field(default=0.0, ge=0)

    @property
    def needs_labels(self) -> bool:
        """Whether images alone are not enough."""
        return self.task > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the original model is needed."""
        return self.logits > 0 or self.features > 0

    @model_validator(mode="after")
    def _something_to_minimize(self) -> Losses:
        if not self.needs_labels and not self.needs_teacher:
            raise ValueError("every weight is 0: give task, logits or features a weight")
        if not self.needs_labels and (self.label_smoothing or self.bce):
            raise ValueError("label_smoothing and bce belong to the task loss, whose weight is 0")
        return self


class Augmentation(Part):
    """Arguments of ``timm.data.create_transform`` and ``timm.data.Mixup``.

    Attributes:
        scale: Range of the random crop's area.
        ratio: Range of its aspect.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength.
        auto_augment: A policy in timm's words, such as "rand-m9-mstd0.5-inc1"; None is none.
        re_prob: Probability of random erasing.
        mixup: Alpha of mixup; 0 is none.
        cutmix: Alpha of CutMix; 0 is none.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = Field(default=0.5, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0)
    auto_augment: str | None = None
    re_prob: float = Field(default=0.0, ge=0, le=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


class Clip(Part):
    """Gradients are clipped, by ``timm.utils.dispatch_clip_grad``.

    Attributes:
        value: The limit.
        mode: Of the norm of all, of each value, or adaptively ("agc").
    """

    value: float = Field(gt=0)
    mode: Literal["norm", "value", "agc"] = "norm"


class Stage(Part):
    """One stretch of training.

    Attributes:
        name: For logs.
        trainable: What learns: "all"; "new" (the new layers); "norms" (batch and other normalizations); "head" (the
            classifier); or globs and ``re:`` patterns of parameter names.
        epochs: Its length in passes over the data.
        steps: Its length in steps of the optimizer; give one of the two.
        optimizer: How it steps.
        schedule: How the learning rate goes.
        losses: What is minimized.
        augmentation: How images are varied; None shows them as in evaluation.
        freeze_batch_norm: Batch normalizations keep their statistics, as in evaluation.
        ema_decay: Of the averaged weights that are evaluated and saved; None is none.
        clip: Of gradients; None is none.
        amp: Autocast's dtype; None is float32 throughout.
        batch_size: Images of one process at a time.
        accumulate: Batches that make a step.
    """

    name: str = Field(min_length=1)
    trainable: Patterns = ("all",)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    losses: Losses = Losses()
    augmentation: Augmentation | None = Augmentation()
    freeze_batch_norm: bool = False
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    clip: Clip | None = None
    amp: Literal["bfloat16", "float16"] | None = None
    batch_size: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Stage:
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
