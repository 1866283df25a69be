"""Randomness that is a function of the seed and of counters (epoch, step, image), never of what ran before.

That is what makes a resumed run equal to one that was not interrupted, and several processes equal to one.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_for(seed: int, *counters: int) -> int:
    """The seed for one purpose, the same on every platform and in every version of numpy.

    Args:
        seed: Of the run, >= 0.
        *counters: What it is for, such as an epoch and the number of an image; each from 0 to 2**32 - 1. Counters that
            differ in number or value give seeds that have nothing to do with each other.

    Returns:
        An int from 0 to 2**63 - 1.

    Raises:
        ValueError: A number is negative, or a counter too large.
    """
    if any(not 0 <= counter < 2**32 for counter in counters):
        raise ValueError(f"counters of 32 bits are needed, not {counters}")
    return int(np.random.SeedSequence(seed, spawn_key=counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """A context in which torch, numpy and random draw what the seed says; at its end they are as they were.

    Args:
        seed: From 0 to 2**63 - 1, such as :func:`seed_for` gives.
        device: If this is a CUDA device its generator is seeded too; otherwise that of the CPU alone is.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_state = None if cuda is None else torch.cuda.get_rng_state(cuda)
    try:
        torch.default_generator.manual_seed(seed)
        np.random.seed((seed & 0xFFFFFFFF, seed >> 32))
        random.seed(seed)
        if cuda is not None:
            with torch.cuda.device(cuda):
                torch.cuda.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        if cuda is not None and cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, cuda)
