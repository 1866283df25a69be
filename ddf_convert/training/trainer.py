"""The training loop: the same for one process and for many, for a run from its beginning and for one that is resumed.

Whatever is random in a step comes from the seed and from the step's number, so that no generator's state is kept. A
run is where its :class:`Position` says, and with the tensors of a checkpoint that is all there is to going on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.recipe import Recipe
from ddf_convert.training import evaluation
from ddf_convert.training import stage as stages
from ddf_convert.training.dataloader import evaluation_loader
from ddf_convert.training.diagnostics import (
    gradient_not_finite,
    memory_explained,
    not_finite,
    where_it_began,
    worker_death,
)
from ddf_convert.training.distributed import PeerFailedError, Processes
from ddf_convert.training.evaluation import Evaluation, check_labels, evaluate
from ddf_convert.training.logs import Row
from ddf_convert.training.progress import Progress
from ddf_convert.training.sampler import seed_for, seeded
from ddf_convert.training.signals import Interrupted, Interruption
from ddf_convert.training.stage import Data, Options, Position, Work

_PARTS = {"task": "task_loss", "logits": "logits_loss", "features": "features_loss"}
_LEAST_SCALE = 2.0**-10  # of the loss in float16: gradients that overflow even so are not going to be finite
_ROWS_PER_EPOCH = 10
_MOST_STEPS_PER_ROW = 50


class Keeper(Protocol):
    """What a run leaves behind; only the first process is asked to keep anything."""

    def write(self, state: dict[str, Any], step: int) -> None:
        """A checkpoint."""

    def log(self, row: Row) -> None:
        """A row of the log."""

    def model(self, model: nn.Module, best: bool) -> None:
        """The model as it is now, which may be the best so far."""

    def has_last(self) -> bool:
        """Whether the model of the last evaluation is still there."""

    def has_best(self, step: int) -> bool:
        """Whether the best model, that of a step, is still there, or can be had again."""


@dataclass
class Interval:
    """Sums over the steps since the last row of the log."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    task: float = 0.0
    logits: float = 0.0
    features: float = 0.0
    grad_norm: float = 0.0


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        epoch: Passes over the data that came before it.
        step: Steps.
        rank: What makes it the best; see :class:`Evaluation`.
    """

    epoch: float
    step: int
    rank: tuple[float, float]


class Engine:
    """Trains a model as a recipe says.

    Args:
        model: A converted model, on the device; it is trained in place.
        recipe: With at least one stage.
        data: To train with and to evaluate on.
        processes: That train, of which this is one.
        options: How.
        keeper: Where results go.
        teacher: The original model, on the device, if the recipe learns from it.
        progress: Is told what happens.
        interruption: Says when to stop.

    Attributes:
        position: Where the run is.
        best: The best evaluation.
        seconds: That the run took, interruptions left out.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: Data,
        processes: Processes,
        options: Options,
        keeper: Keeper,
        teacher: nn.Module | None = None,
        progress: Progress | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.model, self.recipe, self.data, self.processes = model, recipe, data, processes
        self.options, self.keeper, self.teacher = options, keeper, teacher
        self._progress = progress or Progress()
        self._interruption = interruption or Interruption()
        self.position = Position()
        self.best: Best | None = None
        self.seconds = 0.0
        self._interval = Interval()
        self._clock = self._written = time.monotonic()

    def run(self, state: dict[str, Any] | None = None) -> None:
        """Trains to the end.

        Args:
            state: A checkpoint to go on from.

        Raises:
            Interrupted: It was asked to stop, and a checkpoint is written.
            DDFError: A loss is not finite, memory ran out, or an image cannot be read.
        """
        if state is not None:
            self.position = Position(**state["position"])
        for index in range(self.position.stage, len(self.recipe.stages)):
            if index != self.position.stage:
                self.position = Position(index, 0, self.position.total, due=False)
            work = stages.begin(
                index, self.recipe.stages, self.model, self.teacher, self.data, self.processes, self.options
            )
            if state is not None:
                self._restore(work, state)
                self._look_for_models(work)
                state = None
            try:
                self._stage(work)
            except RuntimeError as error:  # torch notices anywhere that a process which loads images was killed
                if (explained := worker_death(error)) is not None:
                    raise explained from error
                raise

    def _stage(self, work: Work) -> None:
        self._clock = self._written = time.monotonic()
        with self._progress.counting(work.stage.name, work.steps, self.position.step):
            if self.position.due:
                self._look(work)
            while self.position.step < work.steps:
                self._epoch(work)
                self._look(work)

    def _epoch(self, work: Work) -> None:
        """The rest of an epoch, or of the stage if that ends first."""
        per_epoch = work.steps_per_epoch
        epoch, first = divmod(self.position.step, per_epoch)
        end = min((epoch + 1) * per_epoch, work.steps)
        every = max(1, min(per_epoch // _ROWS_PER_EPOCH, _MOST_STEPS_PER_ROW))
        work.order.start_at(work.epochs_before + epoch, first)
        work.train(self.model)
        batches = iter(work.loader)
        while self.position.step < end:
            stop, save = self._step(work, batches)
            ends = self.position.step == end
            if ends or self.position.step % every == 0:
                self._row(work)
            if not ends and (stop or save):
                self._write(work)
            if not ends and stop:
                raise Interrupted
        self.processes.share_batch_norms(self.model, *([] if work.ema is None else [work.ema.module]))
        self.position.due = True

    # --- a step ---

    def _step(self, work: Work, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[bool, bool]:
        """Takes a step. Returns whether to stop then, and whether to write a checkpoint: the same in all processes."""
        stage, device = work.stage, self.processes.device
        began = time.monotonic()
        work.optimizer.zero_grad(set_to_none=True)
        taken: list[tuple[tuple[Tensor, Tensor], Tensor]] = []
        with memory_explained(stage.batch_size, stage.accumulate, amp=work.amp is not None):
            for turn in range(stage.accumulate):
                batch = next(batches)
                with work.collecting(last=turn == stage.accumulate - 1), self._drawing(work, turn):
                    found = self._forward(work, batch)
                    work.scaler.scale(found["loss"] / stage.accumulate).backward()
                parts = [found.get(name) for name in ("loss", *_PARTS.values())]
                taken.append((batch, torch.stack([_number(part, device) for part in parts])))
            norm = work.gradient_norm()
        # All that the processes have to agree on, and all that is read back from a GPU, at once.
        sums = torch.stack([figures for _, figures in taken]).sum(0) / stage.accumulate
        asked = sums.new_tensor([self._interruption.asked, self._wants_checkpoint()])
        shared = self.processes.total(torch.cat([sums, asked, (~sums[:1].isfinite()).double()]))
        *means, stop, save, lost, grad_norm = torch.cat([shared, norm.double().reshape(1)]).tolist()
        if lost:
            self._lost(work, taken)
        self._check_gradients(work, grad_norm)
        work.advance(self.model, self.position)
        self._count(work, means, grad_norm, time.monotonic() - began)
        return bool(stop), bool(save)

    def _forward(self, work: Work, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        images, targets = self._prepared(work, batch)
        with work.precision(self.processes.device):
            found: dict[str, Any] = work.objective(images, targets)
        return found

    def _prepared(self, work: Work, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        device = self.processes.device
        images = batch[0].to(device, non_blocking=True, memory_format=self.options.memory_format)
        if not work.stage.losses.needs_labels:
            return images, None
        if self.data.classes is not None:
            check_labels(batch[1], self.data.classes)
        labels = batch[1].to(device, non_blocking=True)
        if work.mixup is not None:
            mixed: tuple[Tensor, Tensor] = work.mixup(images.clone(), labels)  # it works in place
            return mixed
        return images, labels

    def _drawing(self, work: Work, turn: int) -> Any:
        """A context in which random numbers are those of a batch, whichever process it went to."""
        number = self.processes.rank * work.stage.accumulate + turn
        return seeded(seed_for(self.options.seed, self.position.total, number, 0), self.processes.device)

    def _wants_checkpoint(self) -> bool:
        if self.options.checkpoint_every is not None:
            return (self.position.total + 1) % self.options.checkpoint_every == 0
        return self.processes.is_main and time.monotonic() - self._written > self.options.checkpoint_seconds

    def _lost(self, work: Work, taken: list[tuple[tuple[Tensor, Tensor], Tensor]]) -> None:
        """Finds out, in a process whose loss is not finite, where that began: runs the batch once more.

        Raises:
            DDFError: Always.
        """
        for turn, (batch, figures) in enumerate(taken):
            if torch.isfinite(figures[0]):
                continue
            with self._drawing(work, turn), torch.no_grad(), work.precision(self.processes.device):
                images, _ = self._prepared(work, batch)
                where = where_it_began(self.model, self.teacher, images)
            raise not_finite(work.stage, self.position.step + 1, f"the loss is {figures[0].item()}", where, work.lr)
        raise PeerFailedError("the loss of another process is not finite")

    def _check_gradients(self, work: Work, norm: float) -> None:
        if math.isfinite(norm):
            return
        if work.scaler.is_enabled() and work.scaler.get_scale() >= _LEAST_SCALE:
            return  # the scaler leaves such a step out, and scales less from then on
        where = gradient_not_finite(self.model.named_parameters())
        raise not_finite(work.stage, self.position.step + 1, "a gradient is not finite", where, work.lr)

    # --- between the steps ---

    def _count(self, work: Work, sums: list[float], grad_norm: float, seconds: float) -> None:
        interval, images = self._interval, work.order.images_per_step
        interval.steps += 1
        interval.images += images
        interval.seconds += seconds
        for name, value in zip(("loss", *_PARTS), sums, strict=True):
            setattr(interval, name, getattr(interval, name) + value / self.processes.world)
        interval.grad_norm += grad_norm if math.isfinite(grad_norm) else 0.0
        rate = interval.images / max(interval.seconds, 1e-9)
        self._progress.step(f"loss {interval.loss / interval.steps:.4g}  lr {work.lr:.2g}  {rate:.0f} images/s")

    def _row(self, work: Work) -> None:
        """Logs the interval, and begins another."""
        interval = self._interval
        self._log(
            "train",
            work,
            loss=interval.loss / interval.steps,
            **{name: getattr(interval, name) / interval.steps for name in self._parts(work)},
            lr=work.lr,
            grad_norm=interval.grad_norm / interval.steps,
            images=interval.images,
            images_per_s=interval.images / max(interval.seconds, 1e-9),
        )
        self._interval = Interval()

    def _look(self, work: Work) -> None:
        """Evaluates, keeps the model, and writes a checkpoint.

        Raises:
            Interrupted: It was asked to stop meanwhile, and the evaluation is still due.
        """
        try:
            found = self._evaluated(work)
        except evaluation.Stopped:
            self._write(work)
            raise Interrupted from None
        self.position.due = False
        self._look_for_best()
        better = self.best is None or found.rank > self.best.rank
        if better:
            self.best = Best(self._passes(work), self.position.total, found.rank)
        self._log(
            "validation",
            work,
            loss=found.loss,
            **{name: found.parts.get(key) for name, key in _PARTS.items()},
            top1=found.top1,
            top5=found.top5,
            agreement=found.agreement,
            images=found.images,
            images_per_s=found.images_per_s,
        )
        self._progress.say(self._in_words(work, found, better))
        if self.processes.is_main:
            self.keeper.model(work.trained(self.model), better)
        self._write(work)

    def _look_for_best(self) -> None:
        """If somebody deleted the best model, the best of those from now on takes its place."""
        if self.processes.is_main and self.best is not None and not self.keeper.has_best(self.best.step):
            self._progress.say(
                f"the best model, of step {self.best.step}, is gone or damaged: the best from here on replaces it"
            )
            self.best = None

    def _look_for_models(self, work: Work) -> None:
        """If somebody deleted models of a run that goes on after an evaluation, that is done again, to write them."""
        kept_some = self.best is not None
        self._look_for_best()
        missing = self.processes.is_main and kept_some and (self.best is None or not self.keeper.has_last())
        step = self.position.step
        if self.processes.any(missing) and (step == work.steps or step % work.steps_per_epoch == 0):
            self.position.due = True

    def _evaluated(self, work: Work) -> Evaluation:
        model, losses = work.trained(self.model), work.stage.losses
        data, processes = self.data, self.processes
        batch_size = work.stage.batch_size
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
            amp=work.amp,
            memory_format=self.options.memory_format,
            batch_size=batch_size,
            stop=lambda: self._interruption.asked,
        )
        teacher = self.teacher if losses.needs_teacher else None
        return evaluate(model, loader, settings, Objective(model, losses, teacher), teacher, self._progress)

    def _log(self, kind: Any, work: Work, **figures: Any) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        if self.processes.is_main:
            self.keeper.log(
                Row(
                    kind=kind,
                    step=self.position.total,
                    epoch=self._passes(work),
                    stage=work.stage.name,
                    seconds=self.seconds,
                    **figures,
                )
            )

    def _passes(self, work: Work) -> float:
        return work.epochs_before + self.position.step / work.steps_per_epoch

    def _parts(self, work: Work) -> list[str]:
        """Names of the parts of the loss that the stage has."""
        losses = work.stage.losses
        return [name for name in _PARTS if getattr(losses, name) > 0]

    def _in_words(self, work: Work, found: Evaluation, better: bool) -> str:
        where = (
            f"{self._passes(work):.3g} epochs, step {self.position.total}" if self.position.total else "before training"
        )
        figures = [
            f"{name} {100 * value:.2f}%"
            for name, value in (("top-1", found.top1), ("top-5", found.top5), ("agreement", found.agreement))
            if value is not None
        ]
        if found.loss is not None:
            figures.append(f"loss {found.loss:.4g}")
        mark = " (best)" if better and self.position.total else ""
        return f"{work.stage.name}: {where}: {', '.join(figures)}{mark}"

    # --- checkpoints ---

    def _write(self, work: Work) -> None:
        """A checkpoint of this place; every process takes part, and the first one writes."""
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = self._written = now
        statistics = self.processes.gathered(_statistics(self.model, work))
        if not self.processes.is_main:
            return
        state = {
            "position": asdict(self.position),
            "interval": asdict(self._interval),
            "best": None if self.best is None else asdict(self.best),
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "ema": None if work.ema is None else work.ema.module.state_dict(),
            "optimizer": work.optimizer.state_dict(),
            "scaler": work.scaler.state_dict(),
            "statistics": statistics,
        }
        self.keeper.write(state, self.position.total)

    def _restore(self, work: Work, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if work.ema is not None:
            work.ema.module.load_state_dict(state["ema"])
        work.optimizer.load_state_dict(state["optimizer"])  # the learning rates among it
        if state["scaler"]:  # of a run on a GPU, which may go on where no loss is scaled, and the other way round
            work.scaler.load_state_dict(state["scaler"])
        every = state["statistics"]
        # The same number of processes: each goes on with its own. Another number: all with the mean.
        mine = every[self.processes.rank] if len(every) == self.processes.world else torch.stack(every).mean(0)
        _set_statistics(self.model, work, mine)
        self._interval = Interval(**state["interval"])
        self.best = None if state["best"] is None else Best(**{**state["best"], "rank": tuple(state["best"]["rank"])})
        self.seconds = state["seconds"]


def _number(value: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device) if value is None else value.detach().double()


def _running(model: nn.Module, work: Work) -> list[Tensor]:
    """The running statistics of batch normalizations, which differ between processes until the end of an epoch."""
    models = [model] if work.ema is None else [model, work.ema.module]
    return [
        buffer
        for each in models
        for name, buffer in each.named_buffers()
        if "running_mean" in name or "running_var" in name
    ]


def _statistics(model: nn.Module, work: Work) -> Tensor:
    running = _running(model, work)
    return torch.cat([buffer.double().flatten() for buffer in running]) if running else torch.zeros(0)


def _set_statistics(model: nn.Module, work: Work, values: Tensor) -> None:
    with torch.no_grad():
        start = 0
        for buffer in _running(model, work):
            buffer.copy_(values[start : start + buffer.numel()].view_as(buffer))
            start += buffer.numel()
