"""Trains a depth upsampling network on training's loop: random crops of pairs, and a loss over known pixels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
from ddf_convert.training.distributed import Processes
from ddf_convert.training.progress import Progress
from ddf_convert.training.run_dir import Keeper
from ddf_convert.training.sampler import TrainingSampler
from ddf_convert.training.signals import Interrupted, Interruption
from ddf_convert.training.stage import Position, StageState, stage_steps
from ddf_convert.training.trainer import Trainer, TrainingOptions

Loss = Literal["l1", "l2", "huber"]
_HUBER = 0.3  # deviations of a depth map: errors above it count by their size, those below by its square

_FOR_CLASSIFIERS = {
    "losses": ("logits", "features", "bce", "label_smoothing"),
    "augmentation": ("mixup", "cutmix", "re_prob", "auto_augment"),
}


@dataclass(frozen=True)
class DepthSettings:
    """How to train, apart from the recipe.

    Attributes:
        crop: Rows and columns of a crop; a multiple of the network's factor.
        downsample: How small depth maps are made.
        loss: Of the errors over the depth map's standard deviation: "l1", "l2" or "huber".
        seed: Seeds everything random but the network's start.
        turned: Probability that near and far change places in a crop: for few data.
        checkpoint_seconds: Seconds between two checkpoints.
    """

    crop: int = 128
    downsample: Downsampling = "nearest"
    loss: Loss = "huber"
    seed: int = 0
    turned: float = 0.0
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class DepthRow:
    """A row of the log: an interval of training, or the validation at the end. What does not apply is None."""

    kind: str  # "train" or "validation"
    step: int  # since the run began
    stage: str | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    seconds: float | None = None  # since the run began, interruptions left out
    crops_per_s: float | None = None
    rmse: float | None = None  # mean over the validation pairs
    unit: str | None = None  # of the RMSE
    bilinear: float | None = None  # RMSE of bilinear interpolation

    def to_dict(self) -> dict[str, Any]:
        """Returns what applies, as JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class DepthTrainer(Trainer):
    """Trains a network in place, in one process.

    The network is saved at the end of every stage, and of its epochs if the stage counts them.
    """

    unit = "crops"
    model: JointUpNet

    def __init__(
        self,
        model: JointUpNet,
        recipe: Recipe,
        pairs: Pairs,
        settings: DepthSettings,
        keeper: Keeper | None = None,
        progress: Progress | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        check(recipe, settings, model.scale_factor)
        alone = Processes(0, 1, next(model.parameters()).device)
        options = TrainingOptions(seed=settings.seed, checkpoint_seconds=settings.checkpoint_seconds)
        super().__init__(model, recipe, alone, options, keeper or Keeper(), progress, interruption)
        self.pairs, self.settings = pairs, settings
        self.position = Position(due=False)  # nothing is measured before training
        self._crops: Crops
        self._crops_before = 0  # in earlier stages

    def begin_stage(self, index: int) -> StageState:
        """Makes everything that a stage needs."""
        stage, settings = self.recipe.stages[index], self.settings
        self._crops = Crops(self.pairs, settings.crop, stage.augmentation, settings.seed, settings.turned)
        earlier = ((each, self._order(each)) for each in self.recipe.stages[:index])
        self._crops_before = sum(stage_steps(each, order) * order.images_per_step for each, order in earlier)
        order = self._order(stage)
        groups = parameter_groups(self.model, stage, order.images_per_step)
        return StageState.begin(stage, self.model, groups, order, self.processes.device)

    def begin_epoch(self, state: StageState, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Sets training mode, and returns the batches from the run's position on."""
        self.model.train()
        batch_size = state.stage.batch_size
        begin = self._crops_before + self.position.step * state.order.images_per_step
        return (self._crops.batch(number, batch_size) for number in itertools.count(begin, batch_size))

    def losses(self, state: StageState, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Returns the loss of a batch of crops."""
        photos, depths = (each.to(self.processes.device) for each in batch)
        small = downsample(depths, self.model.scale_factor, self.settings.downsample)
        with state.autocast(self.processes.device):
            output = self.model(small, photos)
        loss = loss_of(output.float(), depths, deviations(small), self.settings.loss)
        return {"loss": state.stage.losses.task * loss}

    def end_epoch(self, state: StageState) -> None:
        """Writes a checkpoint and the network; raises Interrupted if the run is to stop before the stage ends."""
        self.position.due = False
        self.write_checkpoint(state)  # first: a run whose network stands without a checkpoint cannot go on
        self._keeper.save_model(state.averaged(self.model), self.position.total)
        if self._interruption.requested and self.position.step < state.steps:
            raise Interrupted

    def make_row(self, state: StageState, kind: Any, figures: dict[str, Any]) -> DepthRow:
        """Returns a row of the log."""
        return DepthRow(
            kind=kind,
            step=self.position.total,
            stage=state.stage.name,
            loss=figures["loss"],
            grad_norm=figures["grad_norm"],
            lr=figures["lr"],
            seconds=self.seconds,
            crops_per_s=figures["images_per_s"],
        )

    def explain_loss(self, state: StageState, batch: Any) -> str:
        """Says where a loss that is not finite began."""
        return "in this step's crops or the weights"

    def steps_per_epoch(self, state: StageState) -> int:
        """Returns the steps after which the network is saved: of an epoch, or of a stage that counts steps."""
        return state.order.steps_per_epoch if state.stage.epochs else state.steps

    def row_is_due(self, state: StageState, epoch_ends: bool) -> bool:
        """Returns whether the log gets a row after this step: twenty in a stage, or one every 50 steps."""
        every = max(1, min(50, state.steps // 20))
        return self.position.step % every == 0 or self.position.step == state.steps

    def _order(self, stage: Stage) -> TrainingSampler:
        """Returns the steps of an epoch: a crop of every pair, but for those left over after the last whole step."""
        images_per_step = stage.batch_size * stage.accumulate
        return TrainingSampler(max(len(self.pairs), images_per_step), 0, stage.batch_size, stage.accumulate)


def loss_of(found: Tensor, truth: Tensor, deviation: Tensor, kind: Loss) -> Tensor:
    """Returns the mean loss over the pixels where the truth is known; errors are divided by each map's deviation.

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


def check(recipe: Recipe, settings: DepthSettings, factor: int) -> None:
    """Checks that this training can do what a recipe asks for."""
    if not recipe.stages:
        raise UsageError(f"recipe {recipe.name} has no stages: there is nothing to train with")
    if settings.crop % factor or settings.crop < 2 * factor:
        raise UsageError(f"--crop {settings.crop}: must be a multiple of the factor, {factor}, and at least twice it")
    for stage in recipe.stages:
        for part, names in _FOR_CLASSIFIERS.items():
            for name in names:
                if getattr(getattr(stage, part), name, None):
                    raise UsageError(
                        f"recipe {recipe.name}, stage {stage.name!r}: {part}.{name} is for classifiers; depth"
                        " upsampling has no use for it (recipe depth-upsample shows what it knows)"
                    )
