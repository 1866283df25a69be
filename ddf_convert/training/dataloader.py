"""Images as batches for a model: timm's transforms, and loaders whose batches depend on seed and place alone."""

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

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.recipes.schema import Augmentation
from ddf_convert.training.dataset import BrokenImage, Images
from ddf_convert.training.sampler import Place, TrainingOrder, evaluation_order, permutation, seed_for, seeded
from ddf_convert.utils.logging import warn_once

Batch: TypeAlias = tuple[Tensor, Tensor]
Transform: TypeAlias = Callable[[PIL.Image.Image], Tensor]
_SMALL = 100  # pixels: images of data sets of this size have no margin that a crop could leave out
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ImageSettings:
    """What images are made into for a model.

    Attributes:
        input_size: (C, H, W), where C is 1 or 3.
        mean: Of each channel, subtracted; values go from 0 to 1 before.
        std: Of each channel, divided by.
        interpolation: "bilinear", "bicubic" and others that timm knows.
        crop_pct: In evaluation, the side of the part of the image that is shown, as a fraction of the shorter side.
        crop_mode: In evaluation, "center", "squash" or "border".

    Raises:
        UsageError: A model that takes neither gray nor colored images.
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
            if len(values) != channels:  # of a model for colors that was made for grays, or the other way round
                values = (sum(values) / len(values),) * channels
            object.__setattr__(self, name, values)


def image_settings(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> ImageSettings:
    """What a model expects: what timm knows of it, or else ImageNet's mean and deviation.

    Args:
        model: From timm, converted or not, or any other.
        input_size: (C, H, W); None is what timm says, or (3, 224, 224), with one channel if the first convolution has
            one.

    Raises:
        UsageError: It takes neither 1 nor 3 channels.
    """
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    found = timm.data.resolve_data_config(pretrained_cfg=known, args={"input_size": input_size})
    size = tuple(found["input_size"])
    if input_size is None:
        first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
        if first is not None and first.in_channels == 1:  # timm does not say how many channels a model was made with
            size = (1, *size[1:])
    elif max(size[1:]) < _SMALL and size[1:] != tuple(known.get("input_size", ()))[1:]:
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
    """From a PIL image of mode RGB to a float32 tensor of shape ``settings.input_size``.

    Args:
        settings: Of the model.
        augmentation: How images are varied in training, but for mixup and CutMix, which are for batches; None shows
            them as in evaluation.

    Raises:
        UsageError: timm does not know such an augmentation.
    """
    create: Any = timm.data.create_transform  # whose annotations are narrower than what it takes
    common: dict[str, Any] = {"input_size": settings.input_size, "mean": settings.mean, "std": settings.std}
    gray = [transforms.Grayscale()] if settings.input_size[0] == 1 else []
    if augmentation is None:
        shown = create(
            **common,
            interpolation=settings.interpolation,
            crop_pct=settings.crop_pct,
            crop_mode=settings.crop_mode,
        )
        evaluated: Transform = transforms.Compose([*gray, shown])
        return evaluated
    try:
        varied = create(
            **common,
            is_training=True,
            scale=augmentation.scale,
            ratio=augmentation.ratio,
            hflip=augmentation.hflip,
            vflip=augmentation.vflip,
            color_jitter=augmentation.color_jitter or None,
            auto_augment=augmentation.auto_augment,
            interpolation="random",  # these two as in timm's own training
            re_mode="pixel",
            re_prob=augmentation.re_prob,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise UsageError(f"augmentation: timm cannot make it: {first_line(error)}") from error
    cropped, changed, finished = varied
    trained: Transform = transforms.Compose([cropped, changed, *gray, finished])  # the changes are made for colors
    return trained


class _Sample(NamedTuple):
    """What a worker makes of a place.

    Attributes:
        image: None if it could not be read.
        label: Its label.
        broken: Images that could not be read: names and reasons.
        fatal: An error that ends the run. It travels as text: what a worker raises comes with its traceback in it.
    """

    image: Tensor | None
    label: int = -1
    broken: tuple[tuple[str, str], ...] = ()
    fatal: str | None = None


class _Training(Dataset[_Sample]):
    def __init__(self, images: Images, transform: Transform, seed: int) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __getitem__(self, place: Place) -> _Sample:
        epoch, first = place
        order = permutation(len(self.images), self.seed, epoch)
        broken: list[tuple[str, str]] = []
        for offset in range(len(order)):
            index = int(order[(first + offset) % len(order)])
            try:
                with seeded(seed_for(self.seed, epoch, index)):
                    image, label = self.images[index]
                    return _Sample(self.transform(image), label, tuple(broken))
            except BrokenImage as error:
                if self.images.on_broken == "stop":
                    return _Sample(None, fatal=str(error))
                broken.append((error.name, error.reason))
            except UsageError as error:
                return _Sample(None, fatal=str(error))
        return _Sample(None, fatal=f"none of the {len(order)} images can be read, such as {': '.join(broken[0])}")


class _Evaluation(Dataset[_Sample]):
    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> _Sample:
        try:
            with seeded(seed_for(0, index)):  # in case that somebody's data set draws
                image, label = self.images[index]
                return _Sample(self.transform(image), label)
        except BrokenImage as error:
            if self.images.on_broken == "stop":
                return _Sample(None, fatal=str(error))
            return _Sample(None, broken=((error.name, error.reason),))
        except UsageError as error:
            return _Sample(None, fatal=str(error))


class ImageLoader(DataLoader[Any]):
    """Gives batches: float32 images of shape (B, C, H, W), and int64 labels of shape (B,), -1 where there are none.

    An image that cannot be read ends the iteration with ``UsageError``; or, if such images are skipped, it is told of
    once and left out, and a batch of nothing else does not come.

    Attributes:
        broken: Names of the images that were left out or replaced so far.
    """

    def __init__(self, dataset: Dataset[_Sample], workers: int, device: torch.device, **which: Any) -> None:
        super().__init__(
            dataset,
            num_workers=workers,
            collate_fn=_collated,
            pin_memory=device.type == "cuda",
            persistent_workers=workers > 0,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # the workers' seeds are not used, and torch's own generator stays as it is
            **which,
        )
        self.broken: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        fatal: str | None = None
        try:
            with _signals_blocked():
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
            # Ends the workers now. Left to the garbage collector, as a part of the error's traceback, torch's iterator
            # may find its queues closed, and waits for its workers in vain.
            del batches
            self._iterator = None
            raise UsageError(fatal)


def worker_death(error: Exception) -> DDFError | None:
    """What to say of an error that means that a worker died; None if it means something else.

    Loaders say it themselves. But a ``RuntimeError`` may come out of the blue, too: torch raises it wherever the run is
    when the signal of the death arrives.

    Args:
        error: From torch's loader, where a connection to the worker may break off, or from anywhere.
    """
    told = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
    if not (told or isinstance(error, (OSError, EOFError))) or "Caught" in str(error):  # in it, and sent by it
        return None
    return DDFError(
        f"a process that loads images died ({first_line(error)}); it may have run out of memory: lower --workers"
    )


def training_loader(
    images: Images,
    settings: ImageSettings,
    augmentation: Augmentation | None,
    order: TrainingOrder,
    workers: int = 0,
    device: torch.device = _CPU,
) -> ImageLoader:
    """Micro-batches of one process. ``order.start_at`` says where the next iteration begins.

    Args:
        images: To train with.
        settings: Of the model.
        augmentation: None shows images as in evaluation.
        order: Of as many images.
        workers: Processes that load; 0 loads in this one. The batches are the same.
        device: Where they will go.

    Raises:
        UsageError: timm does not know such an augmentation.
        ValueError: The order is one of another number of images.
    """
    if order.count != len(images):
        raise ValueError(f"an order of {order.count} images for {len(images)}")
    dataset = _Training(images, make_transform(settings, augmentation), order.seed)
    return ImageLoader(dataset, workers, device, batch_sampler=order)


def evaluation_loader(
    images: Images,
    settings: ImageSettings,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    device: torch.device = _CPU,
) -> ImageLoader:
    """The images of one process, each once, the last batch with what is left.

    Args:
        images: To evaluate.
        settings: Of the model.
        batch_size: At most.
        rank: Of this process.
        world: Number of processes.
        workers: Processes that load; 0 loads in this one.
        device: Where they will go.
    """
    dataset = _Evaluation(images, make_transform(settings))
    sampler = evaluation_order(len(images), rank, world)
    return ImageLoader(dataset, workers, device, batch_size=batch_size, sampler=sampler)


def _collated(samples: Sequence[_Sample]) -> tuple[Tensor, Tensor, list[tuple[str, str]], str | None]:
    readable = [sample for sample in samples if sample.image is not None]
    # default_collate puts the batch into shared memory at once when it runs in a worker
    images = default_collate([sample.image for sample in readable]) if readable else torch.empty(0)
    labels = torch.tensor([sample.label for sample in readable], dtype=torch.int64)
    broken = [one for sample in samples for one in sample.broken]
    return images, labels, broken, next((sample.fatal for sample in samples if sample.fatal is not None), None)


def _begin_worker(_: int) -> None:
    # Whoever stops a run may signal all its processes. The run then finishes its step, for which it needs its workers,
    # so they end when it says so. Who sent a signal a handler in Python is not told, but a thread that waits for it is.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_the_run_says_so, daemon=True).start()


def _end_if_the_run_says_so() -> None:
    run = multiprocessing.parent_process()
    while run is not None and signal.sigwaitinfo({signal.SIGTERM}).si_pid != run.pid:
        pass
    os._exit(0)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A context in which processes are started that get no SIGTERM in any of their threads, until they unblock it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
