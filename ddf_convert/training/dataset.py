"""Images and their labels: from a folder, from a data set that timm knows, or from a function of the user's.

DATA is one of

- a folder with a subfolder of images for each class, or with such folders for its parts (``train``; ``val``, ``valid``,
  ``validation`` or ``test``); where no labels are needed, a folder with images anywhere below it;
- a name in timm's terms, ``torch/cifar10`` or ``hfds/mnist``, optionally with the folder that holds it, or that it is
  loaded into, after an ``@``: ``torch/cifar10@/data/cifar10``;
- ``package.module:callable``, which returns a torch Dataset of (image, label) pairs; an argument ``split``, if it has
  one, is "train" or "validation".
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import PIL.Image
import timm.data
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils import natural_key
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets.folder import IMG_EXTENSIONS  # type: ignore[import-untyped]

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.training.sampler import seed_for
from ddf_convert.utils.imports import call, find_callable
from ddf_convert.utils.logging import warn_once

_TO_BYTE = 257  # 65535 / 255


def as_rgb(image: Any) -> Image.Image:
    """Decodes an image and brings it to 8 bits and three colors.

    Grays become equal colors, 16 bits are scaled to 8, what is transparent is laid over white.

    Args:
        image: A PIL image of any mode; an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); or a tensor of
            shape (H, W), (1, H, W), (3, H, W) or (4, H, W). Arrays and tensors are of dtype uint8, or of a floating
            dtype with values from 0 to 1.

    Raises:
        ValueError: It is none of these.
        OSError: Its file is damaged.
    """
    if isinstance(image, torch.Tensor):
        if image.dim() not in (2, 3):
            raise ValueError(f"a tensor of shape {tuple(image.shape)}, not (C, H, W)")
        image = (image if image.dim() == 2 else image.movedim(0, -1)).detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(f"{type(image).__name__} is not an image: a PIL image, an array or a tensor is")
    image.load()  # decodes; here, so that its errors are those of the file
    picture: Image.Image = _from_deep(image) if image.mode == "F" or image.mode.startswith("I") else image
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """A photo as people see it: turned as its EXIF orientation says. EXIF that cannot be read turns nothing.

    Images to train with are not turned, for timm does not turn them either.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageOps.exif_transpose(image)
    except Exception:  # whatever stands in a damaged block of EXIF
        return image


def sideways(file: str | os.PathLike[str]) -> str:
    """What errors about the size of a photo add if :func:`upright` swaps its width and height; else nothing."""
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # as above
        return ""
    return "; the photo is turned as its EXIF orientation says, which swaps width and height" if turned else ""


def _from_array(array: NDArray[Any]) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise ValueError(f"an array of shape {array.shape}, not (H, W), (H, W, 3) or (H, W, 4)")
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # so that NaN is refused too
            raise ValueError(f"values from {low:.3g} to {high:.3g}; floating-point images go from 0 to 1")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ValueError(f"dtype {array.dtype}, not uint8 or floating")
    return Image.fromarray(np.ascontiguousarray(array))


def _from_deep(image: Image.Image) -> Image.Image:
    """Grays of 16 bits, whose convert() would cut off what is above 255; floats, from 0 to 1 or to 255."""
    values = np.asarray(image).astype(np.float64)
    scale = 1 / _TO_BYTE if image.mode != "F" else 255 if values.max() <= 1 else 1
    return Image.fromarray(np.round(np.nan_to_num(values * scale).clip(0, 255)).astype(np.uint8))


Split: TypeAlias = Literal["train", "validation"]
OnBroken: TypeAlias = Literal["stop", "skip"]

UNLABELLED = -1
_PARTS: dict[str, tuple[str, ...]] = {"train": ("train",), "validation": ("val", "valid", "validation", "test")}
_TIMM = ("torch", "hfds", "hfids", "tfds", "wds")
_STREAMS = ("hfids", "tfds", "wds")


Listed: TypeAlias = list[tuple[str | None, int | None]]


class NoSuchSplit(UsageError):  # noqa: N818 -- the name says that it is one
    """The data are there, and have no such part."""


class BrokenImage(UsageError):  # noqa: N818
    """An image cannot be read.

    Attributes:
        name: Of its file, or its number and data set.
        reason: Why.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"{name} cannot be read ({reason}); mend or remove it, or leave such images out with --on-broken skip"
        )
        self.name, self.reason = name, reason


class _Source(Protocol):
    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> tuple[Any, Any]:
        """An image in whatever form, and its label."""

    def listed(self) -> Listed | None:
        """File and label of every image, as far as they are known without reading it; None if nothing is."""


class Images(Dataset[tuple[PIL.Image.Image, int]]):
    """Images that can be had by number, in one fixed order. Made by :func:`open_images`.

    An item is a PIL image of mode RGB and a label, which is ``UNLABELLED`` where :attr:`has_labels` is False. An image
    that cannot be read raises ``BrokenImage``, a label that is not a number from 0 ``UsageError``.

    Args:
        source: What they are read from.
        classes: Names of the classes, if known.
        has_labels: Whether labels are read.
        on_broken: What loaders do with images that cannot be read.
        indices: Which of the source's; None is all.
        root: The folder that the data are in, if they are one.

    Attributes:
        classes: Names of the classes, by label; None if unknown.
        has_labels: Whether there are labels.
        on_broken: "stop" or "skip".
        root: The folder that the data are in, if they are one.
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
            image = as_rgb(loaded)
        except (DDFError, MemoryError):
            raise
        except Exception as error:
            raise BrokenImage(self._source.name(number), _why(error)) from error
        if not self.has_labels:
            return image, UNLABELLED
        try:
            label = operator.index(label)
        except TypeError as error:
            raise UsageError(
                f"{self._source.name(number)}: its label is {type(label).__name__}, not a number"
            ) from error
        if label < 0 or (self.classes is not None and label >= len(self.classes)):
            limit = "" if self.classes is None else f" to {len(self.classes) - 1}"
            raise UsageError(f"{self._source.name(number)}: its label is {label}; labels go from 0{limit}")
        return image, label

    def name(self, index: int) -> str:
        """What to call an image: its file, or its number and data set."""
        return self._source.name(self._indices[index])

    def listed(self) -> Listed | None:
        """File and label of every image, as far as they are known without reading it; None if nothing is."""
        listed = None
        with contextlib.suppress(Exception):  # attributes of a class of the user's
            listed = self._source.listed()
        return None if listed is None else [listed[index] for index in self._indices]

    def subset(self, indices: Sequence[int]) -> Images:
        """Some of the images, in the order given."""
        chosen = [self._indices[index] for index in indices]
        return Images(self._source, self.classes, self.has_labels, self.on_broken, chosen, self.root)


def open_images(data: str, split: Split, labelled: bool, on_broken: OnBroken = "stop", whole: bool = False) -> Images:
    """Finds images; reads none but the first.

    Args:
        data: See the module.
        split: Which part.
        labelled: Whether labels are needed; without, none are read.
        on_broken: What loaders do with images that cannot be read: "stop" with an error, or "skip" them.
        whole: For validation, where the data are not divided into parts: all of them, in place of an error.

    Raises:
        NoSuchSplit: The data have no such part; :func:`held_out` makes one.
        UsageError: There are no such data, or they are not what is needed.
        DDFError: A data set could not be downloaded.
    """
    prefix = data.partition("/")[0].lower() if "/" in data else ""
    if os.path.isdir(data):
        images = _from_folder(Path(data), split, labelled, on_broken, whole)
    elif os.path.exists(data):
        raise UsageError(f"{data} is a file; give the folder that the images are in")
    else:
        with contextlib.redirect_stdout(sys.stderr):  # what others print must not get into the output of a command
            if prefix in _TIMM:
                images = _from_timm(data, split, labelled, on_broken)
            elif ":" in data:
                images = _from_callable(data, split, labelled, on_broken, whole)
            else:
                raise UsageError(
                    f"{data}: no such folder; give a folder, a timm data set such as torch/cifar10, or module:callable"
                )
    if not len(images):
        raise UsageError(f"{data} is empty: its {split} part has no images")
    return images


def held_out(images: Images, fraction: float = 0.1, at_most: int | None = None, seed: int = 0) -> tuple[Images, Images]:
    """Divides images at random, the same way every time: those to train with, and those to validate with.

    Args:
        images: What to divide.
        fraction: Of them, for validation; at least one image.
        at_most: Images for validation; None is no limit.
        seed: Of the choice.

    Raises:
        UsageError: Nothing would be left to train with.
    """
    count = max(1, round(len(images) * fraction))
    count = count if at_most is None else min(count, at_most)
    if count >= len(images):
        raise UsageError(f"{len(images)} images are too few to hold {count} out for validation; give more")
    # seed_for without counters: no epoch has it
    drawn = np.random.RandomState(np.random.MT19937(seed_for(seed))).permutation(len(images))
    chosen, rest = sorted(drawn[:count].tolist()), sorted(drawn[count:].tolist())
    return images.subset(rest), images.subset(chosen)


class _Files:
    def __init__(self, files: list[str], labels: list[int]) -> None:
        self.files, self.labels = files, labels

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def load(self, index: int) -> tuple[Any, Any]:
        return _decoded(self.files[index]), self.labels[index]

    def listed(self) -> Listed | None:
        return [(file, None) for file in self.files]  # whose folders are the labels


class _Reader:
    """One of timm's readers, which give open files and labels."""

    def __init__(self, reader: Any, data: str) -> None:
        self.reader, self.data = reader, data

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return f"image {index} of {self.data}"

    def load(self, index: int) -> tuple[Any, Any]:
        file, label, *_ = self.reader[index]
        with file:
            return _decoded(file), label

    def listed(self) -> Listed | None:
        return _listed(self.reader)


class _Items:
    """A torch Dataset."""

    def __init__(self, dataset: Any, data: str, labelled: bool) -> None:
        self.dataset, self.data, self.labelled = dataset, data, labelled

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"image {index} of {self.data}"

    def load(self, index: int) -> tuple[Any, Any]:
        item = self.dataset[index]
        if isinstance(item, (tuple, list)) and item:
            if len(item) > 1 or not self.labelled:
                return item[0], item[1] if len(item) > 1 else None
        elif not self.labelled:
            return item, None
        raise UsageError(f"{self.name(index)} is {type(item).__name__}, not a pair of an image and a label")

    def listed(self) -> Listed | None:
        return _listed(self.dataset)


def _listed(dataset: Any) -> Listed | None:
    """What a data set lists of its images, in the attributes that those of torchvision and timm have."""
    if isinstance(dataset, Subset):
        whole = _listed(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    dataset = getattr(dataset, "reader", dataset)
    for samples in (getattr(dataset, "samples", None), getattr(dataset, "imgs", None)):
        if isinstance(samples, (list, tuple)) and len(samples) == len(dataset) and all(map(_is_file, samples)):
            return [(os.fspath(file), _number(label)) for file, label, *_ in samples]
    for labels in (getattr(dataset, "targets", None), getattr(dataset, "labels", None)):
        if isinstance(labels, (list, tuple, np.ndarray, torch.Tensor)) and len(labels) == len(dataset):
            return [(None, _number(label)) for label in labels]
    return None


def _is_file(sample: Any) -> bool:
    return isinstance(sample, (list, tuple)) and len(sample) > 1 and isinstance(sample[0], (str, os.PathLike))


def _number(label: Any) -> int | None:
    try:
        return operator.index(label)
    except TypeError:
        return None


def _decoded(file: Any) -> PIL.Image.Image:
    with PIL.Image.open(file) as image:
        image.load()
        return image


def _why(error: Exception) -> str:
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is no image, or of an unknown format"
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _from_folder(folder: Path, split: Split, labelled: bool, on_broken: OnBroken, whole: bool) -> Images:
    parts = _parts(folder)
    part = next((parts[name] for name in _PARTS[split] if name in parts), None)
    if parts and part is None:
        names = " or ".join(f"{name}/" for name in _PARTS[split])
        raise NoSuchSplit(f"{folder} has no {names} beside {', '.join(f'{name}/' for name in parts)}")
    if not parts and split == "validation" and not whole:
        raise NoSuchSplit(f"{folder} has no val/ to validate with")
    chosen = part or folder
    files = _image_files(chosen)
    if not files:
        raise UsageError(f"{chosen}: no images below it ({', '.join(IMG_EXTENSIONS)})")
    if not labelled:
        return Images(_Files(files, [UNLABELLED] * len(files)), None, False, on_broken, root=folder)
    # A label means the same in every part.
    classes = _subfolders(parts.get("train", chosen))
    if not classes:
        raise UsageError(
            f"{chosen} has images and no class subfolders, and labels are needed:"
            " sort the images as CLASS/IMAGE, or take a recipe without labels"
        )
    if len(classes) == 1:
        raise UsageError(
            f"{parts.get('train', chosen)} has one class only, {classes[0]}/; there is nothing to tell apart"
        )
    return Images(_labelled(chosen, files, classes), tuple(classes), True, on_broken, root=folder)


def _labelled(folder: Path, files: list[str], classes: list[str]) -> _Files:
    numbers = {name: number for number, name in enumerate(classes)}
    own = _subfolders(folder)
    strange = [name for name in own if name not in numbers]
    if strange:
        raise UsageError(f"{folder / strange[0]}: there is no such class among those to train with")
    tops = [Path(file).relative_to(folder).parts for file in files]
    empty = set(own) - {top[0] for top in tops if len(top) > 1}
    if empty:
        name = min(empty, key=natural_key)
        raise UsageError(f"{folder / name}: no images of this class; add some, or remove the folder")
    beside = sum(len(top) == 1 for top in tops)
    if beside:
        warn_once(f"{folder}: images without a class, beside the class folders, are left out ({beside})")
    kept = [(file, numbers[top[0]]) for file, top in zip(files, tops, strict=True) if len(top) > 1]
    return _Files([file for file, _ in kept], [label for _, label in kept])


def _parts(folder: Path) -> dict[str, Path]:
    """The parts that a folder is divided into; none if its subfolders are classes, even if one is called "train"."""
    known = {name for names in _PARTS.values() for name in names}
    own = set(_subfolders(folder))
    if own and (own <= known or ("train" in own and own & set(_PARTS["validation"]))):
        return {name: folder / name for name in sorted(own & known)}
    return {}


def _subfolders(folder: Path) -> list[str]:
    """Names, in timm's order."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def _image_files(folder: Path) -> list[str]:
    """All image files below a folder but hidden ones, in timm's order."""
    found, _ = find_images_and_targets(str(folder), types=IMG_EXTENSIONS)
    return [file for file, _ in found if not any(part.startswith(".") for part in Path(file).relative_to(folder).parts)]


def _from_timm(data: str, split: Split, labelled: bool, on_broken: OnBroken) -> Images:
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
                raise NoSuchSplit(f"{data} has neither a validation nor a test part") from error
            kind = DDFError if isinstance(error, OSError) else UsageError
            raise kind(f"{data} cannot be opened: {first_line(error)}") from error
    reader = getattr(dataset, "reader", None)
    source: _Source = _Items(dataset, data, labelled) if reader is None else _Reader(reader, data)
    return Images(
        source, _class_names(dataset if reader is None else reader) if labelled else None, labelled, on_broken
    )


def _from_callable(data: str, split: Split, labelled: bool, on_broken: OnBroken, whole: bool) -> Images:
    function = find_callable(data, "a torch Dataset")
    if isinstance(function, Dataset):
        raise UsageError(f"{data} is a data set, not a callable that returns one; write a function that makes it")
    try:
        divided = "split" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C say nothing of their arguments
        divided = False
    if not divided and split == "validation" and not whole:
        raise NoSuchSplit(f"{data} takes no argument split, so it has no validation part")
    dataset = call(data, function, **({"split": split} if divided else {}))
    if dataset is None and divided:
        raise NoSuchSplit(f"{data}(split={split!r}) returned None: there is no such part")
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise UsageError(f"{data}() returned {type(dataset).__name__}, not a torch Dataset with a length and items")
    source = _Items(dataset, data, labelled)
    if len(source):
        with contextlib.suppress(Exception) if on_broken == "skip" else contextlib.nullcontext():
            source.load(0)
    return Images(source, _class_names(dataset) if labelled else None, labelled, on_broken)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    numbers = getattr(dataset, "class_to_idx", None)
    if isinstance(numbers, dict) and sorted(numbers.values()) == list(range(len(numbers))):
        return tuple(str(name) for name in sorted(numbers, key=numbers.__getitem__)) or None
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None
