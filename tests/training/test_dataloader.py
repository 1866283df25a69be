"""Batches: transforms, broken images, workers, and that a batch depends on its position alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from support.images import truncate, write_classes, write_images
from torch import nn
from torch.utils.data import Dataset

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.recipes.schema import Augmentation
from ddf_convert.training.dataloader import (
    ImageLoader,
    ImageSettings,
    evaluation_loader,
    image_settings,
    make_transform,
    training_loader,
)
from ddf_convert.training.dataset import ImageDataset, open_images
from ddf_convert.training.diagnostics import worker_death
from ddf_convert.training.sampler import TrainingSampler, permutation, seeded
from ddf_convert.utils import logging

RGB = ImageSettings((3, 16, 16), crop_pct=1.0)
GRAY = ImageSettings((1, 12, 20), crop_pct=1.0)
STRONG = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, vflip=0.5, color_jitter=0.4)
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_warned", set())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture
def images(folder: Path) -> ImageDataset:
    return open_images(str(folder), "train", labeled=True)


def contents(loader: ImageLoader) -> list[tuple[bytes, list[int]]]:
    return [(images.numpy().tobytes(), labels.tolist()) for images, labels in loader]


# --- transforms ---


def test_settings_follow_timm_and_the_input_size():
    known = timm.create_model("mobilenetv2_100")
    assert image_settings(known) == ImageSettings((3, 224, 224))
    assert image_settings(known, (3, 96, 64)) == ImageSettings((3, 96, 64), crop_pct=1.0)
    other = image_settings(timm.create_model("test_vit"))
    assert (other.input_size, other.mean, other.crop_pct) == ((3, 160, 160), (0.5, 0.5, 0.5), 0.95)
    gray = image_settings(timm.create_model("resnet18", in_chans=1))
    assert gray.input_size == (1, 224, 224)
    assert gray.mean == pytest.approx((0.449,), abs=1e-3)
    unknown = nn.Sequential(nn.Conv2d(1, 4, 3))
    assert image_settings(unknown).input_size == (1, 224, 224)
    assert image_settings(unknown, (1, 28, 28)).crop_pct == 1.0
    with pytest.raises(UsageError, match="1 or 3 channels"):
        image_settings(unknown, (4, 28, 28))


@pytest.mark.parametrize("settings", [RGB, GRAY, ImageSettings((3, 40, 24))], ids=["RGB", "gray", "oblong"])
@pytest.mark.parametrize("augmentation", [None, STRONG], ids=["evaluation", "training"])
def test_transforms_give_the_input_size_for_any_image(settings, augmentation):
    transform = make_transform(settings, augmentation)
    for size in ((28, 28), (5, 90), (90, 5), (1, 1)):
        image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size, 3), dtype=np.uint8))
        for seed in range(4):
            with seeded(seed):
                transformed = transform(image)
            assert transformed.shape == settings.input_size
            assert transformed.dtype == torch.float32


def test_evaluation_normalizes_the_pixels(tmp_path):
    PIL.Image.new("RGB", (30, 20), (51, 102, 255)).save(tmp_path / "0.png")
    images = open_images(str(tmp_path), "train", labeled=False)
    batch, labels = next(iter(evaluation_loader(images, RGB, 4)))
    expected = (torch.tensor([0.2, 0.4, 1.0]) - torch.tensor(RGB.mean)) / torch.tensor(RGB.std)
    torch.testing.assert_close(batch, expected.view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [-1]


def test_an_augmentation_that_timm_does_not_know_is_an_error():
    with pytest.raises(UsageError, match="augmentation: timm cannot make it"):
        make_transform(RGB, Augmentation(auto_augment="magic-m9"))


# --- broken images ---


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """12 images of two classes; number 4, of the first class, is truncated, and number 9 is no image."""
    write_images(tmp_path / "a", 6)
    write_images(tmp_path / "b", 6, 6)
    truncate(tmp_path / "a" / "4.png")
    (tmp_path / "b" / "9.png").write_text("hello")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_the_loader(broken, workers):
    images = open_images(str(broken), "train", labeled=True)
    for loader in (
        evaluation_loader(images, RGB, 4, workers=workers),
        training_loader(images, RGB, None, TrainingSampler(12, 0, 4), workers=workers),
    ):
        with pytest.raises(UsageError, match=r"[49]\.png cannot be read") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_left_out_or_replaced_by_the_next(broken, workers, caplog):
    images = open_images(str(broken), "train", labeled=True, on_broken="skip")
    readable = [number for number in range(12) if number not in (4, 9)]
    loader = evaluation_loader(images, RGB, 2, workers=workers)
    for _ in range(2):
        labels = [label for _, labels in loader for label in labels.tolist()]
        assert labels == [number // 6 for number in readable]
    assert loader.broken == {str(broken / "a" / "4.png"), str(broken / "b" / "9.png")}

    training = training_loader(images, RGB, None, TrainingSampler(12, 7, 4), workers=workers)
    order = permutation(12, 7, 0).tolist()
    expected = [next(each for each in order[place:] + order[:place] if each in readable) for place in range(12)]
    transform = make_transform(RGB)
    seen = torch.cat([batch for batch, _ in training])
    assert torch.equal(seen, torch.stack([transform(images[index][0]) for index in expected]))
    assert len(caplog.messages) == 2  # one for each file, in both loaders together
    assert all("left out" in message for message in caplog.messages)


def test_batches_of_broken_images_alone(broken):
    images = open_images(str(broken), "train", labeled=True, on_broken="skip")
    assert [labels.tolist() for _, labels in evaluation_loader(images.subset([4, 9, 0]), RGB, 2)] == [[0]]
    with pytest.raises(UsageError, match="none of the 2 images can be read"):
        list(training_loader(images.subset([4, 9]), RGB, None, TrainingSampler(2, 0, 2)))


# --- repeatable batches ---


def test_batches_depend_on_their_position_alone(images):
    """Not on the number of workers, of processes, on what was drawn before, or on where the run was resumed."""

    def loaded(workers: int = 0, epoch: int = 2, step: int = 0, seed: int = 3, rank: int = 0, world: int = 1) -> Any:
        sampler = TrainingSampler(24, seed, 3, 2 // world, rank, world)
        loader = training_loader(images, RGB, STRONG, sampler, workers)
        if workers:  # an epoch is given up first: the workers stay and must not mix the two
            sampler.start_at(0)
            next(iter(loader))
        sampler.start_at(epoch, step)
        torch.rand(workers + 1), random.random()
        return contents(loader)

    expected = loaded()
    assert len(expected) == 8
    assert loaded(workers=2) == expected
    assert loaded(step=3) == expected[6:]
    ranks = zip(loaded(rank=0, world=2), loaded(rank=1, world=2), strict=True)
    assert [batch for pair in ranks for batch in pair] == expected
    assert loaded(epoch=1) != expected
    assert loaded(seed=4) != expected
    before = torch.get_rng_state()
    contents(training_loader(images, RGB, STRONG, TrainingSampler(24, 0, 8)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_augmented_differently_in_every_epoch(images):
    sampler = TrainingSampler(1, 0, 1)
    loader = training_loader(images.subset([0]), RGB, STRONG, sampler)
    seen = set()
    for epoch in range(4):
        sampler.start_at(epoch)
        seen.add(next(iter(loader))[0].numpy().tobytes())
    assert len(seen) == 4


class Noise(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.rand(3, 8, 8), index


def test_data_sets_that_draw_at_random_are_repeatable(monkeypatch):
    monkeypatch.setattr("ddf_convert.training.dataset.find_callable", lambda *_: Noise)
    images = open_images("own:noise", "train", labeled=True)
    for loaders in (
        [training_loader(images, RGB, None, TrainingSampler(8, 0, 4)) for _ in range(2)],
        [evaluation_loader(images, RGB, 3) for _ in range(2)],
    ):
        assert contents(loaders[0]) == contents(loaders[1])


def test_a_sampler_of_other_images_is_refused(images):
    with pytest.raises(ValueError, match="a sampler of 23 images for 24"):
        training_loader(images, RGB, None, TrainingSampler(23, 0, 2))


# --- workers ---


def test_workers_survive_a_signal_to_all_processes(images):
    loader = evaluation_loader(images, RGB, 2, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert sum(len(labels) for _, labels in batches) == 22
    assert sum(len(labels) for _, labels in loader) == 24
    assert worker.is_alive()


def _lose_a_worker(folder: Path, results: Any) -> None:
    loader = evaluation_loader(open_images(str(folder), "train", labeled=True), RGB, 2, workers=1)
    batches = iter(loader)
    next(batches)
    # torch also raises from a signal handler, at any line: here while the first error is being reported.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    try:
        os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
        list(batches)
    except DDFError as error:
        results.put(str(error))
    os._exit(3)


def test_the_death_of_a_worker_is_explained(folder):
    # In a process of its own: torch reports a dead worker again whenever another child ends.
    results = FORK.SimpleQueue()
    run = FORK.Process(target=_lose_a_worker, args=(folder, results))
    run.start()
    run.join(30)
    assert run.exitcode == 3
    assert not results.empty()
    assert "--workers 1" in results.get()
    by_signal = worker_death(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "))
    assert "--workers 1" in str(by_signal)
    assert worker_death(RuntimeError("Caught KeyError in DataLoader worker process 0.")) is None
    assert worker_death(RuntimeError("shapes differ")) is None


def _fail_with_workers(folder: Path) -> None:
    batches = iter(evaluation_loader(open_images(str(folder), "train", labeled=True), RGB, 2, workers=2))
    next(batches)
    kept: list[Any] = [batches]
    kept.append(kept)  # a cycle: the workers end with the process and not before
    sys.exit(3)


def test_workers_end_with_a_run_that_fails(folder):
    run = FORK.Process(target=_fail_with_workers, args=(folder,))
    run.start()
    run.join(30)
    assert run.exitcode == 3
