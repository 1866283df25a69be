"""Seeds and the order of images: functions of the run's seed and counters."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch

from ddf_convert.errors import UsageError
from ddf_convert.training.sampler import TrainingSampler, evaluation_indices, permutation, seed_for, seeded

SEEDS = [7896617691693857887, 4334430513956379144, 3717377837946358015, 637987770806161565, 1127598636391001540]


def test_seeds_and_permutations_never_change():
    # Written down: a run that was begun with another version goes on as it began.
    assert [seed_for(0), seed_for(0, 0), seed_for(1), seed_for(1, 2), seed_for(2**40, 3, 4)] == SEEDS
    assert permutation(6, 3, 1).tolist() == [0, 5, 2, 3, 4, 1]


def test_seeds_of_different_counters_differ():
    counters = [(), (0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1), (2**32 - 1,), (0, 0, 0)]
    seeds = [seed_for(seed, *counter) for seed in (0, 1) for counter in counters]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("numbers", [(-1,), (0, -1), (0, 2**32)])
def test_counters_have_32_bits(numbers):
    with pytest.raises(ValueError, match=r"counters|negative|non-negative"):
        seed_for(*numbers)


def test_seeded_draws_the_same_and_restores_the_states():
    def drawn() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = drawn(), drawn()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = drawn()
    with seeded(seed_for(5)):
        inside = drawn()
    assert (first, drawn()) == expected
    with contextlib.suppress(KeyError), seeded(seed_for(5)):
        repeated = drawn()
        raise KeyError
    assert repeated == inside
    assert drawn() != inside
    with seeded(seed_for(6)):
        assert all(other != own for other, own in zip(drawn(), inside, strict=True))


def batches_of(sampler: TrainingSampler, epoch: int = 0, step: int = 0) -> list[list[int]]:
    sampler.start_at(epoch, step)
    order = permutation(sampler.count, sampler.seed, epoch)
    batches = [[int(order[position]) for at, position in batch if at == epoch] for batch in sampler]
    assert len(batches) == len(sampler)
    return batches


def test_an_epoch_sees_every_image_once():
    sampler = TrainingSampler(13, 5, 3)
    for epoch in (0, 1):
        batches = batches_of(sampler, epoch)
        seen = [index for batch in batches for index in batch]
        assert (sampler.steps_per_epoch, len(batches), {len(batch) for batch in batches}) == (4, 4, {3})
        assert len(set(seen)) == 12
    assert batches_of(sampler, 0) != batches_of(sampler, 1)
    assert batches_of(TrainingSampler(13, 6, 3)) != batches_of(sampler)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_processes_share_what_one_accumulates(world, accumulate):
    alone = batches_of(TrainingSampler(50, 5, 3, accumulate=4), 2)
    ranks = [batches_of(TrainingSampler(50, 5, 3, accumulate, rank, world), 2) for rank in range(world)]
    steps = [
        [batch for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]] for step in range(4)
    ]
    assert [batch for step in steps for batch in step] == alone


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_epoch_can_be_resumed_at_any_step(step):
    sampler = TrainingSampler(40, 5, 3, accumulate=2, rank=1, world=2)
    assert sampler.steps_per_epoch == 3
    assert batches_of(sampler, 4, step) == batches_of(sampler, 4)[step * 2 :]
    with pytest.raises(ValueError, match="step 4 of an epoch of 3"):
        sampler.start_at(0, 4)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((5, 0, 6), r"^5 training images, and a step needs 6: 6 \(--batch-size\); lower --batch-size$"),
        ((5, 0, 2, 3), r"needs 6: 2 \(--batch-size\) x 3 \(--accumulate\); lower --batch-size or --accumulate$"),
        ((5, 0, 1, 2, 0, 3), r"2 \(--accumulate\) x 3 \(the number of processes\); lower"),
        ((0, 0, 1), "no training images"),
    ],
)
def test_too_few_images_for_a_step(numbers, words):
    with pytest.raises(UsageError, match=words):
        TrainingSampler(*numbers)


@pytest.mark.parametrize(("count", "world"), [(10, 3), (2, 4)])
def test_evaluation_sees_every_image_once(count, world):
    shares = [list(evaluation_indices(count, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
