"""The training loop: one for any task, any number of processes, and runs that are resumed.

Whatever is random in a step comes from the seed and the step's number, so no generator's state is saved: a position and
the tensors of a checkpoint are enough to go on exactly.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ddf_convert.recipes.recipe import Recipe
from ddf_convert.training.diagnostics import gradient_not_finite, memory_explained, not_finite, worker_death
from ddf_convert.training.distributed import PeerFailedError, Processes
from ddf_convert.training.progress import Progress
from ddf_convert.training.run_dir import Keeper
from ddf_convert.training.sampler import seed_for, seeded
from ddf_convert.training.signals import Interrupted, Interruption
from ddf_convert.training.stage import Position, StageState

LOSS_PARTS = {"task": "task_loss", "logits": "logits_loss", "features": "features_loss"}
_LEAST_SCALE = 2.0**-10  # of the loss in float16: gradients that overflow even so will not become finite
_ROWS_PER_EPOCH = 10
_MOST_STEPS_PER_ROW = 50


@dataclass(frozen=True)
class TrainingOptions:
    """How to train, whatever the recipe.

    Attributes:
        seed: Seeds everything random.
        workers: Processes that load images, for each process that trains.
        channels_last: Memory format of the maps.
        compiled: Use ``torch.compile``.
        checkpoint_every: Steps between two checkpoints; None is ``checkpoint_seconds``.
        checkpoint_seconds: Seconds between two checkpoints.
    """

    seed: int = 0
    workers: int = 0
    channels_last: bool = False
    compiled: bool = False
    checkpoint_every: int | None = None
    checkpoint_seconds: float = 600.0

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of images and models."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


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


class Trainer(ABC):
    """Trains a model as the stages of a recipe say. A subclass knows the data, the loss and the evaluation.

    Attributes:
        position: Where the run is.
        seconds: How long the run took, interruptions left out.
    """

    unit: ClassVar[str] = "images"  # what batches are made of

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        processes: Processes,
        options: TrainingOptions,
        keeper: Keeper,
        progress: Progress | None = None,
        interruption: Interruption | None = None,
    ) -> None:
        self.model, self.recipe, self.processes, self.options = model, recipe, processes, options
        self.position = Position()
        self.seconds = 0.0
        self._keeper = keeper
        self._progress = progress or Progress()
        self._interruption = interruption or Interruption()
        self._interval = Interval()
        self._clock = self._written = time.monotonic()

    # --- what a subclass defines ---

    @abstractmethod
    def begin_stage(self, index: int) -> StageState:
        """Makes everything that a stage needs."""

    @abstractmethod
    def begin_epoch(self, state: StageState, epoch: int, first: int) -> Iterator[Any]:
        """Sets the training mode, and returns the micro-batches of an epoch of the stage from a step of it on."""

    @abstractmethod
    def losses(self, state: StageState, batch: Any) -> dict[str, Any]:
        """Returns the ``loss`` of a micro-batch, and those of its parts that are logged."""

    @abstractmethod
    def end_epoch(self, state: StageState) -> None:
        """Evaluates or saves the model and writes a checkpoint; raises Interrupted if the run is to stop here."""

    @abstractmethod
    def make_row(self, state: StageState, kind: Any, figures: dict[str, Any]) -> Any:
        """Returns a row of the log."""

    @abstractmethod
    def explain_loss(self, state: StageState, batch: Any) -> str:
        """Says where a loss that is not finite began."""

    def steps_per_epoch(self, state: StageState) -> int:
        """Returns the steps between two calls of :meth:`end_epoch`."""
        return state.order.steps_per_epoch

    def row_is_due(self, state: StageState, epoch_ends: bool) -> bool:
        """Returns whether the log gets a row after this step."""
        every = max(1, min(self.steps_per_epoch(state) // _ROWS_PER_EPOCH, _MOST_STEPS_PER_ROW))
        return epoch_ends or self.position.step % every == 0

    # --- the loop ---

    def run(self, saved: dict[str, Any] | None = None) -> nn.Module:
        """Trains to the end.

        Args:
            saved: A checkpoint to go on from.

        Returns:
            The trained model, with averaged weights if the last stage averages them.

        Raises:
            Interrupted: The run was asked to stop, and has written a checkpoint.
            DDFError: A loss is not finite, memory ran out, or data cannot be read.
        """
        if saved is not None:
            self.position = Position(**saved["position"])
        for index in range(self.position.stage, len(self.recipe.stages)):
            if index != self.position.stage:
                self.position = Position(index, 0, self.position.total, due=False)
            state = self.begin_stage(index)
            if saved is not None:
                self.load_state_dict(state, saved)
                saved = None
            try:
                self._run_stage(state)
            except RuntimeError as error:  # torch raises it wherever a worker's death is noticed
                if (explained := worker_death(error)) is not None:
                    raise explained from error
                raise
        return state.averaged(self.model)

    def _run_stage(self, state: StageState) -> None:
        self._clock = self._written = time.monotonic()
        with self._progress.counting(state.stage.name, state.steps, self.position.step):
            if self.position.due:
                self.end_epoch(state)
            while self.position.step < state.steps:
                self._run_epoch(state)
                self.position.due = True
                self.end_epoch(state)

    def _run_epoch(self, state: StageState) -> None:
        """Takes the steps that are left of an epoch, or of the stage if that ends first."""
        per_epoch = self.steps_per_epoch(state)
        epoch, first = divmod(self.position.step, per_epoch)
        end = min((epoch + 1) * per_epoch, state.steps)
        batches = self.begin_epoch(state, epoch, first)
        while self.position.step < end:
            stop, save = self._step(state, batches)
            epoch_ends = self.position.step == end
            if self.row_is_due(state, epoch_ends):
                self._log_interval(state)
            if not epoch_ends and (stop or save):
                self.write_checkpoint(state)
            if not epoch_ends and stop:
                raise Interrupted
        averaged = [] if state.ema is None else [state.ema.module]
        self.processes.share_batch_norms(self.model, *averaged)

    def _step(self, state: StageState, batches: Iterator[Any]) -> tuple[bool, bool]:
        """Takes a step. Returns whether to stop and whether to write a checkpoint, the same in all processes."""
        stage, device = state.stage, self.processes.device
        began = time.monotonic()
        state.optimizer.zero_grad(set_to_none=True)
        taken: list[tuple[Any, Tensor]] = []
        with memory_explained(stage.batch_size, stage.accumulate, amp=state.amp is not None):
            for turn in range(stage.accumulate):
                batch = next(batches)
                with state.no_sync(last=turn == stage.accumulate - 1), self.seeded_batch(state, turn):
                    losses = self.losses(state, batch)
                    state.scaler.scale(losses["loss"] / stage.accumulate).backward()
                parts = [losses.get(name) for name in ("loss", *LOSS_PARTS.values())]
                taken.append((batch, torch.stack([_to_float64(part, device) for part in parts])))
            norm = state.gradient_norm()
        # All that the processes agree on, and all that is read back from a GPU, at once.
        sums = torch.stack([figures for _, figures in taken]).sum(0) / stage.accumulate
        wishes = sums.new_tensor([self._interruption.requested, self._wants_checkpoint()])
        shared = self.processes.total(torch.cat([sums, wishes, (~sums[:1].isfinite()).double()]))
        *means, stop, save, lost, grad_norm = torch.cat([shared, norm.double().reshape(1)]).tolist()
        if lost:
            self._raise_not_finite(state, taken)
        self._check_gradients(state, grad_norm)
        state.step(self.model, self.position)
        self._count(state, means, grad_norm, time.monotonic() - began)
        return bool(stop), bool(save)

    def seeded_batch(self, state: StageState, turn: int) -> AbstractContextManager[None]:
        """Returns a context whose random numbers belong to a micro-batch, whichever process it went to."""
        number = self.processes.rank * state.stage.accumulate + turn
        return seeded(seed_for(self.options.seed, self.position.total, number, 0), self.processes.device)

    def _wants_checkpoint(self) -> bool:
        if self.options.checkpoint_every is not None:
            return (self.position.total + 1) % self.options.checkpoint_every == 0
        return self.processes.is_main and time.monotonic() - self._written > self.options.checkpoint_seconds

    def _raise_not_finite(self, state: StageState, taken: list[tuple[Any, Tensor]]) -> NoReturn:
        """Raises an error that says where a loss became infinite or NaN, in a process where it did."""
        for turn, (batch, figures) in enumerate(taken):
            if torch.isfinite(figures[0]):
                continue
            with self.seeded_batch(state, turn), torch.no_grad(), state.autocast(self.processes.device):
                where = self.explain_loss(state, batch)
            raise not_finite(state.stage, self.position.step + 1, f"the loss is {figures[0].item()}", where, state.lr)
        raise PeerFailedError("the loss of another process is not finite")

    def _check_gradients(self, state: StageState, norm: float) -> None:
        if math.isfinite(norm):
            return
        if state.scaler.is_enabled() and state.scaler.get_scale() >= _LEAST_SCALE:
            return  # the scaler skips such a step, and scales less from then on
        where = gradient_not_finite(self.model.named_parameters())
        raise not_finite(state.stage, self.position.step + 1, "a gradient is not finite", where, state.lr)

    # --- the log ---

    def _count(self, state: StageState, sums: list[float], grad_norm: float, seconds: float) -> None:
        interval = self._interval
        interval.steps += 1
        interval.images += state.order.images_per_step
        interval.seconds += seconds
        for name, value in zip(("loss", *LOSS_PARTS), sums, strict=True):
            setattr(interval, name, getattr(interval, name) + value / self.processes.world)
        interval.grad_norm += grad_norm if math.isfinite(grad_norm) else 0.0
        rate = interval.images / max(interval.seconds, 1e-9)
        self._progress.step(f"loss {interval.loss / interval.steps:.4g}  lr {state.lr:.2g}  {rate:.0f} {self.unit}/s")

    def _log_interval(self, state: StageState) -> None:
        """Logs the means over the interval, and begins another."""
        interval, losses = self._interval, state.stage.losses
        self.log(
            state,
            "train",
            loss=interval.loss / interval.steps,
            **{name: getattr(interval, name) / interval.steps for name in LOSS_PARTS if getattr(losses, name) > 0},
            lr=state.lr,
            grad_norm=interval.grad_norm / interval.steps,
            images=interval.images,
            images_per_s=interval.images / max(interval.seconds, 1e-9),
        )
        self._interval = Interval()

    def log(self, state: StageState, kind: str, **figures: Any) -> None:
        """Adds a row to the log."""
        self._count_seconds()
        if self.processes.is_main:
            self._keeper.log(self.make_row(state, kind, figures))

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now

    # --- checkpoints ---

    def write_checkpoint(self, state: StageState) -> None:
        """Writes a checkpoint of this position; every process takes part, and the first one writes."""
        self._count_seconds()
        self._written = self._clock
        saved = self.state_dict(state)
        if self.processes.is_main:
            self._keeper.write_checkpoint(saved, self.position.total)

    def state_dict(self, state: StageState) -> dict[str, Any]:
        """Returns the content of a checkpoint, with the batch-norm statistics of every process."""
        return {
            "position": asdict(self.position),
            "interval": asdict(self._interval),
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            **state.state_dict(),
            "statistics": self.processes.gathered(_flatten(self._running_statistics(state))),
        }

    def load_state_dict(self, state: StageState, saved: dict[str, Any]) -> None:
        """Restores all of a checkpoint but the position."""
        self.model.load_state_dict(saved["model"])
        state.load_state_dict(saved)
        if every := saved.get("statistics"):
            # The same number of processes: each goes on with its own. Another number: all with the mean.
            mine = every[self.processes.rank] if len(every) == self.processes.world else torch.stack(every).mean(0)
            _unflatten(mine, self._running_statistics(state))
        self._interval = Interval(**saved.get("interval", {}))
        self.seconds = saved["seconds"]

    def _running_statistics(self, state: StageState) -> list[Tensor]:
        """Returns the running statistics of batch norms, which differ between processes inside an epoch."""
        models = [self.model] if state.ema is None else [self.model, state.ema.module]
        return [
            buffer
            for model in models
            for name, buffer in model.named_buffers()
            if "running_mean" in name or "running_var" in name
        ]


def _to_float64(value: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device) if value is None else value.detach().double()


def _flatten(buffers: list[Tensor]) -> Tensor:
    return torch.cat([buffer.double().flatten() for buffer in buffers]) if buffers else torch.zeros(0)


def _unflatten(values: Tensor, buffers: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, part in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
