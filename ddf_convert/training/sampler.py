"""Seeds and the order of the images, as functions of the run's seed and counters: epoch, step, image, process.

A step takes the next ``batch_size * accumulate * world`` images of the epoch's permutation. Cut into micro-batches of
``batch_size``, they go to the processes in turn, ``accumulate`` to each. So two processes see exactly the micro-batches
that one process with twice the accumulation sees.
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from ddf_convert.errors import UsageError


def seed_for(seed: int, *counters: int) -> int:
    """Derives a seed, from 0 to 2**63 - 1, that is the same on every platform and in every version of numpy.

    Args:
        seed: Of the run, >= 0.
        *counters: What the seed is for, such as an epoch and the number of an image; each from 0 to 2**32 - 1. Counters
            that differ in number or value give independent seeds.
    """
    if any(not 0 <= counter < 2**32 for counter in counters):
        raise ValueError(f"counters of 32 bits are needed, not {counters}")
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """A context in which torch (a CUDA device's generator too), numpy and random are seeded; then they are restored."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    cuda = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        try:
            torch.default_generator.manual_seed(seed)
            np.random.seed((seed & 0xFFFFFFFF, seed >> 32))
            random.seed(seed)
            for each in cuda:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


EpochPosition: TypeAlias = tuple[int, int]  # an epoch, and an index into its permutation


@functools.lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the images of an epoch in the order in which they are seen: int64 of shape (count,), read-only."""
    # RandomState, whose numbers numpy promises never to change
    drawn = np.random.RandomState(np.random.MT19937(seed_for(seed, epoch))).permutation(count).astype(np.int64)
    drawn.flags.writeable = False  # it is cached
    return drawn


class TrainingSampler(Sampler[list[EpochPosition]]):
    """The micro-batches of one process, as a ``batch_sampler`` of a DataLoader, from any step of any epoch on.

    It yields positions in epochs and not images, so that a worker knows the epoch, and which image comes next if one
    cannot be read. Images that are left over after the last whole step of an epoch are not seen in it.

    Args:
        count: Number of images.
        seed: Of the run.
        batch_size: Images of a micro-batch.
        accumulate: Micro-batches of one process in a step.
        rank: Of this process.
        world: Number of processes.

    Attributes:
        images_per_step: Number of images of a step, in all processes.
        steps_per_epoch: Number of whole steps, at least 1.

    Raises:
        UsageError: There are fewer images than one step needs.
    """

    def __init__(
        self, count: int, seed: int, batch_size: int, accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        self.count, self.seed, self.batch_size, self.accumulate = count, seed, batch_size, accumulate
        self.rank, self.world = rank, world
        self.images_per_step = batch_size * accumulate * world
        self.steps_per_epoch = count // self.images_per_step
        if not self.steps_per_epoch:
            factors = [(batch_size, "--batch-size"), (accumulate, "--accumulate"), (world, "the number of processes")]
            terms = " x ".join(f"{factor} ({name})" for factor, name in factors if factor > 1)
            names = " or ".join(name for factor, name in factors if factor > 1)
            raise UsageError(
                f"{count} training images, and a step needs {self.images_per_step}: {terms}; lower {names}"
                if count
                else "there are no training images"
            )
        self.epoch, self.step = 0, 0

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Makes the next iteration yield this epoch without its first ``step`` steps."""
        if not 0 <= step <= self.steps_per_epoch:
            raise ValueError(f"step {step} of an epoch of {self.steps_per_epoch}")
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Iterator[list[EpochPosition]]:
        epoch = self.epoch  # start_at may be called while this iteration runs
        for step in range(self.step, self.steps_per_epoch):
            for turn in range(self.accumulate):
                batch = (step * self.world + self.rank) * self.accumulate + turn
                yield [(epoch, position) for position in range(batch * self.batch_size, (batch + 1) * self.batch_size)]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.step) * self.accumulate


def evaluation_indices(count: int, rank: int = 0, world: int = 1) -> range:
    """Returns the images that one process evaluates: every ``world``-th. Some processes may have one less."""
    return range(rank, count, world)
