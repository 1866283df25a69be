"""Images with labels, from a folder, a data set that timm knows, or a callable of the user.

DATA is one of

- a folder with a subfolder of images for each class, or with such a folder for each split (``train``; ``val``,
  ``valid``, ``validation`` or ``test``); where no labels are needed, a folder with images anywhere below it;
- a name as in timm, ``torch/cifar10`` or ``hfds/mnist``, optionally followed by ``@`` and the folder that holds it, or
  that it is downloaded to: ``torch/cifar10@/data/cifar10``;
- ``package.module:callable``, which returns a torch Dataset of (image, label) pairs; its argument ``split``, if it has
  one, is "train" or "validation".
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import PIL.Image
import timm.data
import torch
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import natural_key
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS  # type: ignore[import-untyped]

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.training.sampler import seed_for
from ddf_convert.utils.images import decode, to_rgb
from ddf_convert.utils.imports import call, find_callable
from ddf_convert.utils.logging import warn_once

Split: TypeAlias = Literal["train", "validation"]
OnBroken: TypeAlias = Literal["stop", "skip"]
Sample: TypeAlias = tuple[str | None, int | None]  # file and label, as far as they are known without reading it

_Classes: TypeAlias = tuple[str, ...] | None  # their names, by label; None if they are unknown

NO_LABEL = -1
_SPLIT_FOLDERS: dict[str, tuple[str, ...]] = {"train": ("train",), "validation": ("val", "valid", "validation", "test")}
_TIMM_PREFIXES = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMS = ("hfids", "tfds", "wds")


class MissingSplitError(UsageError):
    """The data exist, but have no such split."""


class BrokenImageError(UsageError):
    """An image cannot be read; ``name`` is its file, or its number and data set."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} cannot be read ({reason}); fix or remove it, or leave such images out with --on-broken skip"
        )
        self.name, self.reason = name, reason


class _Source(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> tuple[Any, Any]:
        """An image in any form that ``to_rgb`` takes, and its label."""

    def samples(self) -> list[Sample] | None: ...


class ImageDataset(Dataset[tuple[PIL.Image.Image, int]]):
    """Images by index, in one fixed order, from :func:`open_images`.

    An item is an RGB image and a label, which is ``NO_LABEL`` where ``has_labels`` is False. An image that cannot be
    read raises ``BrokenImageError``, a label that is not a class number ``UsageError``.

    Args:
        source: What they are read from.
        classes: Names of the classes by label, if known.
        has_labels: Whether labels are read.
        on_broken: What loaders do with images that cannot be read.
        indices: Indices into the source; None is all.
        root: The folder that the data are in, if they are files.
    """

    def __init__(
        self,
        source: _Source,
        classes: tuple[str, ...] | None,
        has_labels: bool,
        on_broken: OnBroken = "stop",
        indices: Sequence[int] | None = None,
        root: Path | None = None,
    ) -> None:
        self.classes, self.has_labels, self.on_broken, self.root = classes, has_labels, on_broken, root
        self._source = source
        self._indices: Sequence[int] = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        number = self._indices[index]
        try:
            loaded, label = self._source.load(number)
            image = to_rgb(loaded)
        except (DDFError, MemoryError):
            raise
        except Exception as error:
            raise BrokenImageError(self._source.name(number), _reason(error)) from error
        return image, self._checked(label, number) if self.has_labels else NO_LABEL

    def _checked(self, label: Any, number: int) -> int:
        try:
            label = operator.index(label)
        except TypeError as error:
            raise UsageError(
                f"{self._source.name(number)}: its label is {type(label).__name__}, not a number"
            ) from error
        if label < 0 or (self.classes is not None and label >= len(self.classes)):
            limit = "" if self.classes is None else f" to {len(self.classes) - 1}"
            raise UsageError(f"{self._source.name(number)}: its label is {label}; labels go from 0{limit}")
        return int(label)

    def name(self, index: int) -> str:
        """Returns the file of an image, or its number and data set."""
        return self._source.name(self._indices[index])

    def samples(self) -> list[Sample] | None:
        """Returns file and label of every image as far as the data set lists them; None if it lists nothing."""
        samples = None
        with contextlib.suppress(Exception):  # attributes of a class of the user's
            samples = self._source.samples()
        return None if samples is None else [samples[index] for index in self._indices]

    def subset(self, indices: Sequence[int]) -> ImageDataset:
        """Returns some of the images, in the order given."""
        chosen = [self._indices[index] for index in indices]
        return ImageDataset(self._source, self.classes, self.has_labels, self.on_broken, chosen, self.root)


def open_images(
    data: str, split: Split, labeled: bool, on_broken: OnBroken = "stop", undivided: bool = False
) -> ImageDataset:
    """Opens a data set; reads no image but possibly the first.

    Args:
        data: See the module.
        split: Which split.
        labeled: Whether labels are needed; otherwise none are read.
        on_broken: What loaders do with images that cannot be read: "stop" with an error, or "skip" them.
        undivided: For validation, whether data without splits are taken as a whole instead of an error.

    Raises:
        MissingSplitError: The data have no such split; :func:`random_split` makes one.
        UsageError: There are no such data, or they are not what is needed.
        DDFError: A data set could not be downloaded.
    """
    prefix = data.partition("/")[0].lower() if "/" in data else ""
    if os.path.isdir(data):
        source, classes = _from_folder(Path(data), split, labeled, undivided)
    elif os.path.exists(data):
        raise UsageError(f"{data} is a file; give the folder that the images are in")
    else:
        with contextlib.redirect_stdout(sys.stderr):  # what data sets print must not mix with the output of a command
            if prefix in _TIMM_PREFIXES:
                source, classes = _from_timm(data, split, labeled)
            elif ":" in data:
                source, classes = _from_callable(data, split, labeled, undivided, check_first=on_broken == "stop")
            else:
                raise UsageError(
                    f"{data}: no such folder; give a folder, a timm data set such as torch/cifar10, or module:callable"
                )
    if not len(source):
        raise UsageError(f"{data} is empty: its {split} part has no images")
    root = Path(data) if os.path.isdir(data) else None
    return ImageDataset(source, classes if labeled else None, labeled, on_broken, root=root)


def random_split(images: ImageDataset, fraction: float = 0.1, seed: int = 0) -> tuple[ImageDataset, ImageDataset]:
    """Splits images at random into training and validation, which gets the fraction; the same way every time."""
    count = max(1, round(len(images) * fraction))
    if count >= len(images):
        raise UsageError(f"{len(images)} images are too few to hold {count} out for validation; give more")
    # seed_for without counters: no epoch has this seed
    drawn = np.random.RandomState(np.random.MT19937(seed_for(seed))).permutation(len(images))
    validation, training = sorted(drawn[:count].tolist()), sorted(drawn[count:].tolist())
    return images.subset(training), images.subset(validation)


class _Files:
    """Image files with known labels."""

    def __init__(self, files: list[str], labels: list[int]) -> None:
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def load(self, index: int) -> tuple[Any, Any]:
        return decode(self.files[index]), self.labels[index]

    def samples(self) -> list[Sample]:
        return [(file, None) for file in self.files]  # the folders' names are the labels


class _Items:
    """A torch Dataset whose items are pairs, or images alone where no labels are needed."""

    def __init__(self, dataset: Any, data: str, labeled: bool) -> None:
        self.dataset, self.data, self.labeled = dataset, data, labeled

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"image {index} of {self.data}"

    def load(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if isinstance(item, (tuple, list)) and item:
            if len(item) > 1 or not self.labeled:
                return item[0], item[1] if len(item) > 1 else None
        elif not self.labeled:
            return item, None
        raise UsageError(f"{self.name(index)} is {type(item).__name__}, not a pair of an image and a label")

    def samples(self) -> list[Sample] | None:
        return _samples(self.dataset)


class _Reader(_Items):
    """A reader of timm, which gives open files and labels."""

    def load(self, index: int) -> tuple[Any, Any]:
        file, label, *_ = self.dataset[index]
        with file:
            return decode(file), label


def _samples(dataset: Any) -> list[Sample] | None:
    """Reads the attributes in which data sets of torchvision and timm list their files and labels."""
    if isinstance(dataset, Subset):
        samples = _samples(dataset.dataset)
        return None if samples is None else [samples[index] for index in dataset.indices]
    dataset = getattr(dataset, "reader", dataset)
    for listed in (getattr(dataset, "samples", None), getattr(dataset, "imgs", None)):
        if isinstance(listed, (list, tuple)) and len(listed) == len(dataset) and all(map(_names_a_file, listed)):
            return [(os.fspath(file), _class_number(label)) for file, label, *_ in listed]
    for labels in (getattr(dataset, "targets", None), getattr(dataset, "labels", None)):
        if isinstance(labels, (list, tuple, np.ndarray, torch.Tensor)) and len(labels) == len(dataset):
            return [(None, _class_number(label)) for label in labels]
    return None


def _names_a_file(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) and len(sample) > 1 and isinstance(sample[0], (str, os.PathLike))


def _class_number(label: Any) -> int | None:
    try:
        return operator.index(label)
    except TypeError:
        return None


def _reason(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is no image, or of an unknown format"
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _from_folder(folder: Path, split: Split, labeled: bool, undivided: bool) -> tuple[_Source, _Classes]:
    splits = _split_folders(folder)
    own = next((splits[name] for name in _SPLIT_FOLDERS[split] if name in splits), None)
    if splits and own is None:
        names = " or ".join(f"{name}/" for name in _SPLIT_FOLDERS[split])
        raise MissingSplitError(f"{folder} has no {names} beside {', '.join(f'{name}/' for name in splits)}")
    if not splits and split == "validation" and not undivided:
        raise MissingSplitError(f"{folder} has no val/ to validate with")
    chosen = own or folder
    files = _image_files(chosen)
    if not files:
        raise UsageError(f"{chosen}: no images below it ({', '.join(IMG_EXTENSIONS)})")
    if not labeled:
        return _Files(files, [NO_LABEL] * len(files)), None
    # The classes of the training split number the labels of every split.
    train = splits.get("train", chosen)
    classes = _subfolders(train)
    if not classes:
        raise UsageError(
            f"{chosen} has images and no class subfolders, and labels are needed:"
            " sort the images as CLASS/IMAGE, or take a recipe without labels"
        )
    if len(classes) == 1:
        raise UsageError(f"{train} has one class only, {classes[0]}/; there is nothing to tell apart")
    return _labeled_files(chosen, files, classes), tuple(classes)


def _labeled_files(folder: Path, files: list[str], classes: list[str]) -> _Files:
    """Labels files by the folder of ``classes`` that they are in, at any depth."""
    numbers = {name: number for number, name in enumerate(classes)}
    subfolders = _subfolders(folder)
    unknown = [name for name in subfolders if name not in numbers]
    if unknown:
        raise UsageError(f"{folder / unknown[0]}: there is no such class among those to train with")
    paths = [Path(file).relative_to(folder).parts for file in files]
    empty = set(subfolders) - {path[0] for path in paths if len(path) > 1}
    if empty:
        name = min(empty, key=natural_key)
        raise UsageError(f"{folder / name}: no images of this class; add some, or remove the folder")
    unsorted = sum(len(path) == 1 for path in paths)
    if unsorted:
        warn_once(f"{folder}: images without a class, beside the class folders, are left out ({unsorted})")
    kept = [(file, numbers[path[0]]) for file, path in zip(files, paths, strict=True) if len(path) > 1]
    return _Files([file for file, _ in kept], [label for _, label in kept])


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of the splits; none if the subfolders are classes, even if one is called "train"."""
    known = {name for names in _SPLIT_FOLDERS.values() for name in names}
    own = set(_subfolders(folder))
    if own and (own <= known or ("train" in own and own & set(_SPLIT_FOLDERS["validation"]))):
        return {name: folder / name for name in sorted(own & known)}
    return {}


def _subfolders(folder: Path) -> list[str]:
    """Names, in timm's order."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def _image_files(folder: Path) -> list[str]:
    """All image files below a folder that are not hidden, in timm's order."""
    found, _ = find_images_and_targets(str(folder), types=IMG_EXTENSIONS)
    return [file for file, _ in found if not any(part.startswith(".") for part in Path(file).relative_to(folder).parts)]


def _from_timm(data: str, split: Split, labeled: bool) -> tuple[_Source, _Classes]:
    name, _, root = data.partition("@")
    prefix = name.partition("/")[0].lower()
    if prefix in _STREAMS:
        raise UsageError(
            f"{data} is a stream, and a run that can be resumed needs images by number; use hfds/, torch/ or a folder"
        )
    folder = root or (str(Path(torch.hub.get_dir(), "datasets")) if prefix == "torch" else None)
    if folder and prefix == "torch":
        os.makedirs(folder, exist_ok=True)
    dataset = None
    for part in ("train",) if split == "train" else ("validation", "test"):
        try:
            dataset = timm.data.create_dataset(name, root=folder, split=part, download=prefix == "torch")
            break
        except ImportError as error:
            raise UsageError(f"{data} needs a package: pip install {error.name or 'datasets'}") from error
        except Exception as error:
            if part == "validation" and "split" in str(error):
                continue
            if part == "test" and "split" in str(error):
                raise MissingSplitError(f"{data} has neither a validation nor a test part") from error
            kind = DDFError if isinstance(error, OSError) else UsageError
            raise kind(f"{data} cannot be opened: {first_line(error)}") from error
    # The data set around a reader would silently replace broken images by others.
    reader = getattr(dataset, "reader", None)
    source = _Items(dataset, data, labeled) if reader is None else _Reader(reader, data, labeled)
    return source, _class_names(source.dataset)


def _from_callable(
    data: str, split: Split, labeled: bool, undivided: bool, check_first: bool
) -> tuple[_Source, _Classes]:
    function = find_callable(data, "a torch Dataset")
    if isinstance(function, Dataset):
        raise UsageError(f"{data} is a data set, not a callable that returns one; write a function that makes it")
    try:
        has_splits = "split" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C do not name their arguments
        has_splits = False
    if not has_splits and split == "validation" and not undivided:
        raise MissingSplitError(f"{data} takes no argument split, so it has no validation part")
    dataset = call(data, function, **({"split": split} if has_splits else {}))
    if dataset is None and has_splits:
        raise MissingSplitError(f"{data}(split={split!r}) returned None: there is no such part")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UsageError(f"{data}() returned {type(dataset).__name__}, not a torch Dataset with a length and items")
    source = _Items(dataset, data, labeled)
    if len(source) and check_first:
        source.load(0)
    return source, _class_names(dataset)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    numbers = getattr(dataset, "class_to_idx", None)
    if isinstance(numbers, dict) and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(str(name) for name in sorted(numbers, key=numbers.__getitem__)) or None
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None
