"""Batches of images for a model: timm's transforms, and loaders whose batches depend on seed and position alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import PIL.Image
import timm.data
import torch
from timm.data.constants import DEFAULT_CROP_PCT, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms  # type: ignore[import-untyped]

from ddf_convert.errors import UsageError, first_line
from ddf_convert.recipes.schema import Augmentation
from ddf_convert.training.dataset import BrokenImageError, ImageDataset
from ddf_convert.training.diagnostics import worker_death
from ddf_convert.training.sampler import (
    EpochPosition,
    TrainingSampler,
    evaluation_indices,
    permutation,
    seed_for,
    seeded,
)
from ddf_convert.utils.logging import warn_once

Batch: TypeAlias = tuple[Tensor, Tensor]
Transform: TypeAlias = Callable[[PIL.Image.Image], Tensor]
_SMALL = 100  # pixels: images of small data sets have no margin that a crop could leave out
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ImageSettings:
    """How images are transformed for a model; the names are those of timm's data config.

    Attributes:
        input_size: (C, H, W), where C is 1 or 3.
        mean: Of each channel, for values from 0 to 1.
        std: Of each channel.
        interpolation: "bilinear", "bicubic" and others that timm knows.
        crop_pct: In evaluation, the side of the crop as a fraction of the image's shorter side.
        crop_mode: In evaluation, "center", "squash" or "border".

    Raises:
        UsageError: The model takes neither gray nor color images.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = DEFAULT_CROP_PCT
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        channels, height, width = self.input_size
        if channels not in (1, 3) or min(height, width) < 1:
            raise UsageError(f"input size {self.input_size}: images have 1 or 3 channels, and a height and a width")
        for name in ("mean", "std"):
            values: tuple[float, ...] = tuple(getattr(self, name))
            if len(values) != channels:  # a model for color images that was built for gray ones, or the other way round
                values = (sum(values) / len(values),) * channels
            object.__setattr__(self, name, values)


def image_settings(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> ImageSettings:
    """Returns how images are transformed for a model, by timm's ``resolve_data_config``.

    Models that timm does not know get ImageNet's mean and deviation, and (3, 224, 224), or one channel if their first
    convolution has one.
    """
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    found = timm.data.resolve_data_config(pretrained_cfg=config, args={"input_size": input_size})
    size = tuple(found["input_size"])
    if input_size is None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None and first.in_channels == 1:  # timm does not say how many channels a model was made with
            size = (1, *size[1:])
    elif max(size[1:]) < _SMALL and size[1:] != tuple(config.get("input_size", ()))[1:]:
        found["crop_pct"] = 1.0
    return ImageSettings(
        input_size=size,
        mean=tuple(found["mean"]),
        std=tuple(found["std"]),
        interpolation=found["interpolation"],
        crop_pct=found["crop_pct"],
        crop_mode=found["crop_mode"],
    )


def make_transform(settings: ImageSettings, augmentation: Augmentation | None = None) -> Transform:
    """Returns timm's transform, from an RGB image to a float32 tensor of shape ``settings.input_size``.

    With an augmentation it is for training, without mixup and CutMix, which are for batches; None is for evaluation.
    """
    create: Any = timm.data.create_transform  # accepts more than its annotations say
    common: dict[str, Any] = {"input_size": settings.input_size, "mean": settings.mean, "std": settings.std}
    gray = [transforms.Grayscale()] if settings.input_size[0] == 1 else []
    if augmentation is None:
        transform = create(
            **common,
            interpolation=settings.interpolation,
            crop_pct=settings.crop_pct,
            crop_mode=settings.crop_mode,
        )
        evaluation: Transform = transforms.Compose([*gray, transform])
        return evaluation
    try:
        crop, augment, to_tensor = create(
            **common,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            interpolation="random",  # this and re_mode are as in timm's training script
            re_mode="pixel",
            re_prob=augmentation.re_prob,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"augmentation: timm cannot make it: {first_line(error)}") from error
    training: Transform = transforms.Compose([crop, augment, *gray, to_tensor])  # augmentations are for color images
    return training


class _Loaded(NamedTuple):
    """An image as a worker returns it, with errors as text: what a worker raises has its traceback in the message."""

    image: Tensor | None  # None if it could not be read
    label: int = -1
    broken: tuple[tuple[str, str], ...] = ()  # names and reasons of images that could not be read
    fatal: str | None = None  # an error that ends the run


class _TrainingImages(Dataset[_Loaded]):
    """The image at a position of an epoch; the next one that can be read replaces a broken one."""

    def __init__(self, images: ImageDataset, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, position: EpochPosition) -> _Loaded:
        epoch, first = position
        order = permutation(len(self.images), self.seed, epoch)
        broken: list[tuple[str, str]] = []
        for offset in range(len(order)):
            index = int(order[(first + offset) % len(order)])
            loaded = _load(self.images, self.transform, index, seed_for(self.seed, epoch, index))
            if not loaded.broken:
                return loaded._replace(broken=tuple(broken))
            broken.extend(loaded.broken)
        return _Loaded(None, fatal=f"none of the {len(order)} images can be read, such as {': '.join(broken[0])}")


class _EvaluationImages(Dataset[_Loaded]):
    def __init__(self, images: ImageDataset, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> _Loaded:
        return _load(self.images, self.transform, index, seed_for(0, index))


def _load(images: ImageDataset, transform: Transform, index: int, seed: int) -> _Loaded:
    """Loads an image with random numbers of its own: transforms, and possibly the user's data set, draw some."""
    try:
        with seeded(seed):
            image, label = images[index]
            return _Loaded(transform(image), label)
    except BrokenImageError as error:
        if images.on_broken == "stop":
            return _Loaded(None, fatal=str(error))
        return _Loaded(None, broken=((error.name, error.reason),))
    except UsageError as error:
        return _Loaded(None, fatal=str(error))


class ImageLoader(DataLoader[Any]):
    """Yields batches of float32 images (B, C, H, W) and int64 labels (B,), which are -1 where there are none.

    An image that cannot be read ends the iteration with ``UsageError``. If such images are skipped, they are left out
    with one warning each, and so are batches that would be empty.

    Attributes:
        broken: Names of the images that were left out or replaced so far.
    """

    def __init__(self, dataset: Dataset[_Loaded], workers: int, device: torch.device, **sampling: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_init_worker,
            generator=torch.Generator(),  # keeps the loader from drawing from torch's global one
            **sampling,
        )
        self.broken: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        fatal: str | None = None
        try:
            with _sigterm_blocked():
                batches = super().__iter__()
            for images, labels, broken, fatal in batches:
                if fatal is not None:
                    break
                for name, reason in broken:
                    self.broken.add(name)
                    warn_once(f"{name} cannot be read ({reason}) and is left out")
                if len(labels):
                    yield images, labels
        except (RuntimeError, OSError, EOFError) as error:
            explained = worker_death(error) if self.num_workers else None
            if explained is None:
                raise
            raise explained from error
        if fatal is not None:
            # End the workers now: the error's traceback would keep torch's iterator alive until its queues are closed,
            # and then it waits for its workers in vain.
            del batches
            self._iterator = None
            raise UsageError(fatal)


def training_loader(
    images: ImageDataset,
    settings: ImageSettings,
    augmentation: Augmentation | None,
    sampler: TrainingSampler,
    workers: int = 0,
    device: torch.device = _CPU,
) -> ImageLoader:
    """Returns a loader of the micro-batches of one process, whatever the number of workers.

    An iteration begins at the step of ``sampler.start_at``. The device says where batches will be moved to.
    """
    if sampler.count != len(images):
        raise ValueError(f"a sampler of {sampler.count} images for {len(images)}")
    dataset = _TrainingImages(images, make_transform(settings, augmentation), sampler.seed)
    return ImageLoader(dataset, workers, device, batch_sampler=sampler)


def evaluation_loader(
    images: ImageDataset,
    settings: ImageSettings,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device = _CPU,
) -> ImageLoader:
    """Returns a loader of the images that one of ``world`` processes evaluates, each image once."""
    dataset = _EvaluationImages(images, make_transform(settings))
    sampler = evaluation_indices(len(images), rank, world)
    return ImageLoader(dataset, workers, device, batch_size=batch_size, sampler=sampler)


def _collate(samples: Sequence[_Loaded]) -> tuple[Tensor, Tensor, list[tuple[str, str]], str | None]:
    readable = [sample for sample in samples if sample.image is not None]
    # default_collate stacks into shared memory when it runs in a worker
    images = default_collate([sample.image for sample in readable]) if readable else torch.empty(0)
    labels = torch.tensor([sample.label for sample in readable], dtype=torch.int64)
    broken = [each for sample in samples for each in sample.broken]
    return images, labels, broken, next((sample.fatal for sample in samples if sample.fatal is not None), None)


def _init_worker(_: int) -> None:
    # A signal may go to all processes of a run. The run then finishes its step, for which it needs its workers: they
    # ignore Ctrl-C, and end by SIGTERM only if it comes from the run. Only a thread that waits for a signal learns who
    # sent it. torch's own handler knows too, but ends the worker whoever sent it; and were SIGTERM ignored, torch could
    # not end a worker that hangs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_of_the_run, daemon=True).start()


def _exit_on_sigterm_of_the_run() -> None:
    run = multiprocessing.parent_process()
    while run is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(0)


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """A context whose child processes start with SIGTERM blocked, until :func:`_init_worker` handles it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
