"""Trains a converted model on images: its losses, its evaluations, and the best model so far."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import timm.data
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ddf_convert.errors import UsageError
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.parameters import parameter_groups
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.recipes.schema import Stage
from ddf_convert.training import evaluation
from ddf_convert.training.dataloader import ImageLoader, ImageSettings, evaluation_loader, training_loader
from ddf_convert.training.dataset import ImageDataset
from ddf_convert.training.diagnostics import memory_explained, where_it_began
from ddf_convert.training.distributed import Processes
from ddf_convert.training.evaluation import Evaluation, check_labels, evaluate
from ddf_convert.training.logs import Row
from ddf_convert.training.progress import Progress
from ddf_convert.training.run_dir import FinetuneRun
from ddf_convert.training.sampler import TrainingSampler
from ddf_convert.training.signals import Interrupted, Interruption
from ddf_convert.training.stage import StageState
from ddf_convert.training.trainer import LOSS_PARTS, Trainer, TrainingOptions
from ddf_convert.utils.modules import evaluating

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainingData:
    """The images of a run."""

    training: ImageDataset
    validation: ImageDataset
    settings: ImageSettings  # how images are prepared for the model
    classes: int | None  # None if labels play no part


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        epoch: Passes over the data before it.
        step: Steps before it.
        rank: What evaluations are compared by; see :class:`Evaluation`.
    """

    epoch: float
    step: int
    rank: tuple[float, float]


class Finetuner(Trainer):
    """Trains a converted model as a recipe says."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: TrainingData,
        processes: Processes,
        options: TrainingOptions,
        folder: FinetuneRun,
        teacher: nn.Module | None = None,
        progress: Progress | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        super().__init__(model, recipe, processes, options, folder, progress, interruption)
        self.data, self.teacher = data, teacher
        self.best: Best | None = None
        self._folder = folder
        self._objective: Objective
        self._loader: ImageLoader
        self._mixup: Any = None

    # --- training ---

    def begin_stage(self, index: int) -> StageState:
        """Makes everything that a stage needs, and freezes what does not learn in it."""
        stages, processes, images = self.recipe.stages, self.processes, self.data.training
        stage = stages[index]
        order = order_of(stage, len(images), processes, self.options.seed)
        groups = parameter_groups(self.model, stage, order.images_per_step)
        objective = Objective(self.model, stage.losses, self.teacher)
        with memory_explained(2):
            self._freeze_unreached(objective, stage)
        epochs_before = sum(self._epochs(each) for each in stages[:index])
        state = StageState.begin(stage, self.model, groups, order, processes.device, epochs_before)
        if processes.world > 1:
            devices = [processes.device] if processes.device.type == "cuda" else None
            with warnings.catch_warnings():
                # torch is renaming this argument; the oldest version that we support has the old name alone
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                state.parallel = DistributedDataParallel(objective.trainable_module, devices, broadcast_buffers=False)
            objective.trainable_module = state.parallel
        if self.options.compiled:
            objective.trainable_module = torch.compile(objective.trainable_module)  # type: ignore[assignment]
        self._objective, self._mixup = objective, make_mixup(stage, self.data.classes)
        self._loader = training_loader(
            images, self.data.settings, stage.augmentation, order, self.options.workers, processes.device
        )
        return state

    def begin_epoch(self, state: StageState, epoch: int, first: int) -> Iterator[Batch]:
        """Sets training mode, but for batch norms that the stage freezes, and returns the batches of an epoch."""
        state.order.start_at(state.epochs_before + epoch, first)
        self._objective.train()
        if state.stage.freeze_batch_norm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return iter(self._loader)

    def losses(self, state: StageState, batch: Batch) -> dict[str, Any]:
        """Returns the loss of a micro-batch and its parts."""
        images, targets = self._prepare(state, batch)
        with state.autocast(self.processes.device):
            losses: dict[str, Any] = self._objective(images, targets)
        return losses

    def explain_loss(self, state: StageState, batch: Batch) -> str:
        """Says where a loss that is not finite began: runs the batch once more."""
        images, _ = self._prepare(state, batch)
        return where_it_began(self.model, self.teacher, images)

    def _prepare(self, state: StageState, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns images and targets on the device, mixed up if the stage says so."""
        device = self.processes.device
        images = batch[0].to(device, non_blocking=True, memory_format=self.options.memory_format)
        if not state.stage.losses.needs_labels:
            return images, None
        if self.data.classes is not None:
            check_labels(batch[1], self.data.classes)
        labels = batch[1].to(device, non_blocking=True)
        if self._mixup is not None:
            mixed: Batch = self._mixup(images.clone(), labels)  # works in place
            return mixed
        return images, labels

    def _freeze_unreached(self, objective: Objective, stage: Stage) -> None:
        """Freezes the parameters that a trial pass shows the losses not to depend on.

        A loss of features alone leaves the classifier out, and some models hold parameters that they never use.
        ``DistributedDataParallel`` would wait for their gradients.
        """
        device, losses = self.processes.device, stage.losses
        candidates = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        images = torch.zeros((2, *self.data.settings.input_size), device=device)
        images = images.to(memory_format=self.options.memory_format)
        labels = torch.zeros(2, dtype=torch.int64, device=device) if losses.needs_labels else None
        gradients: Any = [None] * len(candidates)
        with evaluating(objective), torch.autocast(device.type, enabled=False):
            loss: Tensor = objective(images, labels)["loss"]
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss, candidates, allow_unused=True)
        for parameter, gradient in zip(candidates, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        if not any(parameter.requires_grad for parameter in candidates):
            raise UsageError(
                f"stage {stage.name!r}: its losses depend on nothing that it trains ({', '.join(stage.trainable)});"
                " change trainable: or losses:"
            )

    def _epochs(self, stage: Stage) -> int:
        """Returns the passes over the data that a stage takes, a part of one counted as one."""
        if stage.epochs is not None:
            return stage.epochs
        order = order_of(stage, len(self.data.training), self.processes, self.options.seed)
        return -(-(stage.steps or 0) // order.steps_per_epoch)

    # --- evaluating ---

    def end_epoch(self, state: StageState) -> None:
        """Evaluates, saves the model, and writes a checkpoint.

        Raises:
            Interrupted: The run was asked to stop meanwhile; the checkpoint says that the evaluation is still due.
        """
        try:
            found = self._evaluate(state)
        except evaluation.Stopped:
            self.write_checkpoint(state)
            raise Interrupted from None
        self.position.due = False
        self._forget_missing_best()
        better = self.best is None or found.rank > self.best.rank
        if better:
            self.best = Best(self._passes(state), self.position.total, found.rank)
        self.log(
            state,
            "validation",
            loss=found.loss,
            **{name: found.parts.get(key) for name, key in LOSS_PARTS.items()},
            top1=found.top1,
            top5=found.top5,
            agreement=found.agreement,
            images=found.images,
            images_per_s=found.images_per_s,
        )
        self._progress.say(self._describe(state, found, better))
        if self.processes.is_main:
            self._folder.save_model(state.averaged(self.model), self.position.total, better)
        self.write_checkpoint(state)

    def _evaluate(self, state: StageState) -> Evaluation:
        model, losses, batch_size = state.averaged(self.model), state.stage.losses, state.stage.batch_size
        data, processes = self.data, self.processes
        loader = evaluation_loader(
            data.validation,
            data.settings,
            batch_size,
            processes.rank,
            processes.world,
            self.options.workers,
            processes.device,
        )
        settings = evaluation.EvaluationSettings(
            processes,
            labeled=data.validation.has_labels,
            amp=state.amp,
            memory_format=self.options.memory_format,
            batch_size=batch_size,
            stop=lambda: self._interruption.requested,
        )
        teacher = self.teacher if losses.needs_teacher else None
        return evaluate(model, loader, settings, Objective(model, losses, teacher), teacher, self._progress)

    def _forget_missing_best(self) -> None:
        """If the best model was deleted, the best of those from here on replaces it."""
        if self.processes.is_main and self.best is not None and not self._folder.has_best(self.best.step):
            self._progress.say(
                f"the best model, of step {self.best.step}, is gone or damaged: the best from here on replaces it"
            )
            self.best = None

    # --- log and checkpoints ---

    def make_row(self, state: StageState, kind: Any, figures: dict[str, Any]) -> Row:
        """Returns a row of the log."""
        return Row(
            kind=kind,
            step=self.position.total,
            epoch=self._passes(state),
            stage=state.stage.name,
            seconds=self.seconds,
            **figures,
        )

    def _passes(self, state: StageState) -> float:
        return state.epochs_before + self.position.step / state.order.steps_per_epoch

    def _describe(self, state: StageState, found: Evaluation, better: bool) -> str:
        step = self.position.total
        where = f"{self._passes(state):.3g} epochs, step {step}" if step else "before training"
        figures = [
            f"{name} {100 * value:.2f}%"
            for name, value in (("top-1", found.top1), ("top-5", found.top5), ("agreement", found.agreement))
            if value is not None
        ]
        if found.loss is not None:
            figures.append(f"loss {found.loss:.4g}")
        mark = " (best)" if better and step else ""
        return f"{state.stage.name}: {where}: {', '.join(figures)}{mark}"

    def state_dict(self, state: StageState) -> dict[str, Any]:
        """Returns the content of a checkpoint."""
        return {**super().state_dict(state), "best": None if self.best is None else asdict(self.best)}

    def load_state_dict(self, state: StageState, saved: dict[str, Any]) -> None:
        """Restores a checkpoint. If models were deleted after an evaluation, it is due again, to write them."""
        super().load_state_dict(state, saved)
        best = saved["best"]
        self.best = None if best is None else Best(**{**best, "rank": tuple(best["rank"])})
        had_best = self.best is not None
        self._forget_missing_best()
        missing = self.processes.is_main and had_best and (self.best is None or not self._folder.has_last())
        step = self.position.step
        if self.processes.any(missing) and (step == state.steps or step % state.order.steps_per_epoch == 0):
            self.position.due = True


def order_of(stage: Stage, images: int, processes: Processes, seed: int) -> TrainingSampler:
    """Returns which images a process sees when."""
    return TrainingSampler(images, seed, stage.batch_size, stage.accumulate, processes.rank, processes.world)


def make_mixup(stage: Stage, classes: int | None) -> Any:
    """Returns timm's mixup and CutMix; None if the stage has neither."""
    augmentation = stage.augmentation
    if augmentation is None or not augmentation.mixes or classes is None:
        return None
    return timm.data.Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        label_smoothing=stage.losses.label_smoothing,
        num_classes=classes,
    )
