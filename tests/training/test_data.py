"""Images, their order, and the batches made of them."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from torch import nn

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.recipes.schema import Augmentation
from ddf_convert.training import dataset as dataset_module
from ddf_convert.training.dataloader import (
    ImageSettings,
    evaluation_loader,
    image_settings,
    make_transform,
    training_loader,
)
from ddf_convert.training.dataset import (
    NO_LABEL,
    BrokenImageError,
    ImageDataset,
    MissingSplitError,
    open_images,
    random_split,
)
from ddf_convert.training.diagnostics import worker_death
from ddf_convert.training.sampler import TrainingSampler, evaluation_indices, permutation, seed_for, seeded
from ddf_convert.utils import logging
from ddf_convert.utils.images import to_rgb
from ddf_convert.utils.imports import call, find_callable

SMALL = ImageSettings((3, 16, 16), crop_pct=1.0)
GRAY = ImageSettings((1, 12, 20), crop_pct=1.0)
FORK = multiprocessing.get_context("fork")
SEEDS = [7896617691693857887, 4334430513956379144, 3717377837946358015, 637987770806161565, 1127598636391001540]
PERMUTATION = [0, 5, 2, 3, 4, 1]
STRONG = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, vflip=0.5)


@pytest.fixture(autouse=True)
def fresh_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_told", set())


def color(number: int) -> tuple[int, int, int]:
    return (number * 37 % 256, number * 91 % 256, number * 53 % 256)


def write_images(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (20, 18)) -> None:
    """PNG files, each of its own, with something in it that an augmentation changes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        noise = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        noise[: size[1] // 2] = color(number)
        PIL.Image.fromarray(noise).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 3 classes."""
    folder = tmp_path_factory.mktemp("classes")
    for label, name in enumerate(("c1", "c2", "c10")):
        write_images(folder / name, 8, 8 * label)
    return folder


def contents(loader: Any) -> list[tuple[bytes, list[int]]]:
    return [(images.numpy().tobytes(), labels.tolist()) for images, labels in loader]


# Randomness


def test_seeds_are_those_that_they_were():
    # Written down: a run that was begun with another version goes on as it began.
    assert [seed_for(0), seed_for(0, 0), seed_for(1), seed_for(1, 2), seed_for(2**40, 3, 4)] == SEEDS
    assert permutation(6, 3, 1).tolist() == PERMUTATION


def test_seeds_of_different_counters_differ():
    counters = [(), (0,), (0, 0), (0, 1), (1,), (1, 0), (1, 1), (2**32 - 1,), (0, 0, 0)]
    seeds = [seed_for(seed, *counter) for seed in (0, 1) for counter in counters]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("numbers", [(-1,), (0, -1), (0, 2**32)])
def test_seeds_of_what_is_no_counter(numbers):
    with pytest.raises(ValueError, match=r"counters|negative|non-negative"):
        seed_for(*numbers)


def test_seeded_draws_the_same_and_leaves_no_trace():
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


# Folders


def test_a_folder_of_classes(classes):
    images = open_images(str(classes), "train", labeled=True)
    assert images.classes == ("c1", "c2", "c10")  # in timm's order
    assert images.has_labels
    assert [images[index][1] for index in range(24)] == [0] * 8 + [1] * 8 + [2] * 8
    assert images[9][0].getpixel((0, 0)) == color(9)
    assert images.name(9).endswith("9.png")
    assert len(open_images(str(classes), "validation", labeled=True, undivided=True)) == 24
    with pytest.raises(MissingSplitError, match="no val/"):
        open_images(str(classes), "validation", labeled=True)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_folder_with_parts(tmp_path, name):
    for part, names in (("train", "abc"), (name, "bc")):
        for label in names:
            write_images(tmp_path / part / label, 2, ord(label))
    (tmp_path / "readme.txt").write_text("not an image")
    images = open_images(str(tmp_path), "validation", labeled=True)
    assert images.classes == ("a", "b", "c")  # those of train/, though one has no images here
    assert [images[index][1] for index in range(len(images))] == [1, 1, 2, 2]
    assert len(open_images(str(tmp_path), "train", labeled=False)) == 6


def test_a_folder_without_labels(classes, tmp_path):
    write_images(tmp_path / "2021" / "may", 3)
    write_images(tmp_path, 1, 10)
    write_images(tmp_path / ".thumbnails", 1)
    (tmp_path / "._10.png").write_bytes(b"of a Macintosh")
    for folder, count in ((tmp_path, 4), (classes, 24)):
        images = open_images(str(folder), "train", labeled=False)
        assert len(images) == count
        assert images.classes is None
        assert not images.has_labels
        assert images[0][1] == NO_LABEL


def _one_class(folder: Path) -> None:
    write_images(folder / "cat", 2)


def _empty_class(folder: Path) -> None:
    write_images(folder / "cat", 2)
    (folder / "dog").mkdir()
    write_images(folder / "eel", 2)


def _flat(folder: Path) -> None:
    write_images(folder, 2)


def _only_validation(folder: Path) -> None:
    write_images(folder / "val" / "cat", 2)


def _strange_class(folder: Path) -> None:
    for part, names in (("train", ("cat", "dog")), ("val", ("cat", "owl"))):
        for name in names:
            write_images(folder / part / name, 1)


def _no_images(folder: Path) -> None:
    (folder / "notes.txt").write_text("none")


MISTAKES: list[tuple[Callable[[Path], None], str, str, bool]] = [
    (_one_class, "train", "one class only, cat", True),
    (_empty_class, "train", "dog: no images of this class", True),
    (_flat, "train", "no class subfolders, and labels are needed", True),
    (_only_validation, "train", "has no train/ beside val/", False),
    (_strange_class, "validation", "owl: there is no such class", True),
    (_no_images, "train", "no images below it", False),
    (lambda folder: folder.rmdir(), "train", "no such folder", False),
    (lambda folder: (folder.rmdir(), folder.write_text("")), "train", "is a file", False),
]


@pytest.mark.parametrize(("make", "split", "words", "labelled"), MISTAKES)
def test_folders_with_mistakes(tmp_path, make, split, words, labelled):
    folder = tmp_path / "data"
    folder.mkdir()
    make(folder)
    with pytest.raises(UsageError, match=words) as caught:
        open_images(str(folder), split, labelled)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_images_beside_the_classes_are_told_of(classes, tmp_path, caplog):
    for name in ("a", "b"):
        write_images(tmp_path / name, 2)
    write_images(tmp_path, 3)
    assert len(open_images(str(tmp_path), "train", labeled=True)) == 4
    assert "left out (3)" in caplog.text


def test_random_split(classes):
    images = open_images(str(classes), "train", labeled=True)
    for options, count in (
        ({}, 2),
        ({"fraction": 0.5}, 12),
        ({"fraction": 0.5, "at_most": 5}, 5),
        ({"fraction": 0}, 1),
    ):
        train, validation = random_split(images, **options)
        names = [[part.name(index) for index in range(len(part))] for part in (train, validation)]
        assert len(validation) == count
        assert sorted(names[0] + names[1]) == sorted(images.name(index) for index in range(24))
        again = random_split(images, **options)[1]
        assert [again.name(index) for index in range(count)] == names[1]
    assert validation.classes == images.classes
    other = random_split(images, fraction=0.5, seed=1)[1]
    assert [other.name(index) for index in range(12)] != [
        random_split(images, 0.5)[1].name(index) for index in range(12)
    ]
    with pytest.raises(UsageError, match="too few"):
        random_split(images.subset([3]))


# Pixels


def _encoded(image: PIL.Image.Image, form: str, **options: Any) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, form, **options)
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def _palette() -> PIL.Image.Image:
    image = PIL.Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    return image


def _see_through() -> PIL.Image.Image:
    image = _palette()
    image.info["transparency"] = 1
    return image


RAMP = np.array([[0, 25700], [40000, 65535]], dtype=np.uint16)
PIXELS: list[tuple[str, Callable[[], Any], Any]] = [
    ("RGB", lambda: PIL.Image.new("RGB", (2, 2), (10, 20, 30)), (10, 20, 30)),
    ("gray", lambda: PIL.Image.new("L", (2, 2), 77), (77, 77, 77)),
    ("bilevel", lambda: PIL.Image.new("1", (2, 2), 1), (255, 255, 255)),
    ("opaque", lambda: PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 255)), (10, 20, 30)),
    ("transparent", lambda: PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0)), (255, 255, 255)),
    ("gray, transparent", lambda: PIL.Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
    ("palette", _palette, (10, 20, 30)),
    ("palette, transparent", _see_through, (255, 255, 255)),
    ("palette, GIF", lambda: _encoded(_palette(), "GIF"), (10, 20, 30)),
    ("CMYK", lambda: PIL.Image.new("CMYK", (2, 2), (255, 0, 0, 0)), (0, 255, 255)),
    ("CMYK, TIFF", lambda: _encoded(PIL.Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF"), (0, 255, 255)),
    ("YCbCr", lambda: PIL.Image.new("YCbCr", (2, 2), (77, 128, 128)), (77, 77, 77)),
    ("16 bits", lambda: _encoded(PIL.Image.fromarray(RAMP), "PNG"), [[0, 100], [156, 255]]),
    ("16 bits, TIFF", lambda: _encoded(PIL.Image.fromarray(RAMP), "TIFF"), [[0, 100], [156, 255]]),
    ("32 bits", lambda: PIL.Image.fromarray(RAMP.astype(np.int32)), [[0, 100], [156, 255]]),
    ("float to 1", lambda: PIL.Image.fromarray(np.float32([[0, 0.4], [0.6, 1]])), [[0, 102], [153, 255]]),
    ("float to 255", lambda: PIL.Image.fromarray(np.float32([[0, 40], [300, np.nan]])), [[0, 40], [255, 0]]),
    ("array", lambda: np.full((2, 2), 77, np.uint8), (77, 77, 77)),
    ("array, one channel", lambda: np.full((2, 2, 1), 77, np.uint8), (77, 77, 77)),
    ("array, colors", lambda: np.full((2, 2, 3), (10, 20, 30), np.uint8), (10, 20, 30)),
    ("array, float", lambda: np.full((2, 2, 3), (0.2, 0.4, 1.0)), (51, 102, 255)),
    ("tensor", lambda: torch.full((2, 2), 77, dtype=torch.uint8), (77, 77, 77)),
    ("tensor, one channel", lambda: torch.full((1, 2, 2), 0.2), (51, 51, 51)),
    ("tensor, half", lambda: torch.full((1, 2, 2), 1.0, dtype=torch.bfloat16), (255, 255, 255)),
    ("tensor, colors", lambda: torch.tensor([51, 102, 255]).div(255).view(3, 1, 1).expand(3, 2, 2), (51, 102, 255)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in PIXELS], ids=[case[0] for case in PIXELS])
def test_every_kind_of_image_becomes_rgb(make, expected):
    image = to_rgb(make())
    assert image.mode == "RGB"
    wanted = np.asarray(expected)
    wanted = np.broadcast_to(wanted[:, :, None] if wanted.ndim == 2 else wanted, (2, 2, 3))
    assert np.asarray(image).tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(2, 5, 5), "shape"),
        (torch.zeros(1, 3, 5, 5), "shape"),
        (torch.full((3, 2, 2), -0.5), "from 0 to 1"),
        (torch.full((3, 2, 2), np.nan), "from 0 to 1"),
        (np.zeros((2, 2), np.int64), "int64"),
        (np.zeros((0, 2), np.uint8), "shape"),
        ("photo.png", "str is not an image"),
    ],
)
def test_what_is_no_image(image, words):
    with pytest.raises(ValueError, match=words):
        to_rgb(image)


# Callables and timm's data sets

DATA = """
import numpy, torch, random
class Squares(torch.utils.data.Dataset):
    classes = ["dark", "light"]
    def __init__(self, count=10, label=int): self.count, self.label = count, label
    def __len__(self): return self.count
    def __getitem__(self, index):
        if index == 5 and self.label is numpy.int64: raise RuntimeError("lost\\nlines")
        return numpy.full((8, 8), index * 20, numpy.uint8), self.label(index % 2)
class Bare(Squares):
    def __getitem__(self, index): return torch.full((3, 8, 8), index / 10)
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter([])
def plain(): return Squares()
def parts(split): print("talks"); return {"train": Squares(10), "validation": Squares(4, torch.tensor)}[split]
def no_validation(split): return Squares() if split == "train" else None
def lossy(): return Squares(10, numpy.int64)
def words(): return Squares(10, str)
def beyond(): return Squares(10, lambda label: label * 7)
def below(): return Squares(10, lambda label: label - 1)
def bare(): return Bare()
def stream(): return Stream()
def nothing(): return Squares(0)
def number(): return 3
def fails(): raise OSError("no disk")
def noisy():
    class Noisy(Squares):
        def __getitem__(self, index): return torch.rand(3, 8, 8), index
    Noisy.classes = None
    return Noisy(8)
instance = Squares()
"""


@pytest.fixture
def data_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    sys.modules.pop("own_data", None)


def test_a_callable(data_module, capsys):
    images = open_images("own_data:plain", "train", labeled=True)
    assert (len(images), images.classes, images[3][1]) == (10, ("dark", "light"), 1)
    assert images[3][0].getpixel((0, 0)) == (60, 60, 60)
    assert images.name(3) == "image 3 of own_data:plain"
    assert len(open_images("own_data:plain", "validation", labeled=True, undivided=True)) == 10
    validation = open_images("own_data:parts", "validation", labeled=True)
    assert (len(validation), validation[1][1]) == (4, 1)
    assert capsys.readouterr().out == ""
    for name in ("bare", "plain"):
        images = open_images(f"own_data:{name}", "train", labeled=False)
        assert (images[2][1], images.has_labels, images.classes) == (NO_LABEL, False, None)


@pytest.mark.parametrize(
    ("name", "split", "error", "words"),
    [
        ("own_data:plain", "validation", MissingSplitError, "takes no argument split"),
        ("own_data:no_validation", "validation", MissingSplitError, "returned None"),
        ("own_data:bare", "train", UsageError, "image 0 .* is Tensor, not a pair"),
        ("own_data:stream", "train", UsageError, "Stream, not a torch Dataset"),
        ("own_data:number", "train", UsageError, "int, not a torch Dataset"),
        ("own_data:nothing", "train", UsageError, "is empty"),
        ("own_data:fails", "train", UsageError, "failed: OSError: no disk"),
        ("own_data:instance", "train", UsageError, "Squares, not a callable that returns a torch Dataset"),
        ("own_data:plian", "train", UsageError, "has no plian; did you mean plain"),
        ("no_such_module:x", "train", UsageError, "cannot import no_such_module"),
        ("own_data:", "train", UsageError, "write package.module:callable"),
        ("torch/no_such", "train", UsageError, "cannot be opened: Unknown torchvision dataset no_such"),
        ("wds/shards", "train", UsageError, "is a stream"),
        ("nowhere", "train", UsageError, "no such folder"),
    ],
)
def test_data_with_mistakes(data_module, monkeypatch, tmp_path, name, split, error, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(error, match=words) as caught:
        open_images(name, split, labeled=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [("words", 0, "its label is str"), ("beyond", 1, "is 7; labels go from 0 to 1"), ("below", 0, "its label is -1")],
)
def test_labels_with_mistakes(data_module, name, index, words):
    images = open_images(f"own_data:{name}", "train", labeled=True)
    with pytest.raises(UsageError, match=words):
        images[index]
    with pytest.raises(UsageError, match=words):  # and not as an image to be left out
        list(evaluation_loader(ImageDataset(images._source, images.classes, True, "skip", [index]), SMALL, 2))


def test_callables_are_called_with_what_they_take(data_module):
    function = find_callable("own_data:Squares.__len__", "a number")
    assert call("own_data:Squares.__len__", function, self=find_callable("own_data:plain", "data")()) == 10
    with pytest.raises(UsageError, match=r"failed: TypeError"):
        call("own_data:plain", find_callable("own_data:plain", "data"), wrong=1)


def test_a_data_set_of_torchvision(tmp_path, monkeypatch):
    """Fashion-MNIST as it lies on a disk, with 5 images."""
    raw = tmp_path / "here" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        pixels = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
        for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + shape + array.tobytes())
    data = f"torch/fashion_mnist@{tmp_path / 'here'}"
    for split, count in (("train", 5), ("validation", 3)):
        images = open_images(data, split, labeled=True)
        assert (len(images), images[2][1]) == (count, 2)
        assert np.asarray(images[1][0])[0, :3, 1].tolist() == [16, 17, 18]
        assert images.classes is not None
        assert images.classes[2] == "Pullover"
    batch, labels = next(iter(evaluation_loader(images, GRAY, 8)))
    assert batch.shape == (3, 1, 12, 20)
    assert labels.tolist() == [0, 1, 2]


def test_readers_of_timm(tmp_path, monkeypatch, classes):
    """What gives open files, as the readers of Hugging Face's data sets do; that package is not needed for it."""
    made: list[tuple[str, str]] = []

    def create(name: str, root: Any, split: str, download: bool) -> Any:
        made.append((name, split))
        if split == "validation":
            raise ValueError('Unknown split "validation". Should be one of [...]')
        return timm.data.ImageDataset(str(classes))

    monkeypatch.setattr(dataset_module.timm.data, "create_dataset", create)
    images = open_images("hfds/digits", "validation", labeled=True)
    assert made == [("hfds/digits", "validation"), ("hfds/digits", "test")]
    assert (len(images), images.classes, images[20][1]) == (24, ("c1", "c2", "c10"), 2)
    assert images.name(20) == "image 20 of hfds/digits"


# Images that cannot be read

BROKEN: list[tuple[str, Callable[[Path], Any], str]] = [
    ("empty", lambda file: file.write_bytes(b""), "no image, or of an unknown format"),
    ("text", lambda file: file.write_text("hello"), "no image, or of an unknown format"),
    ("truncated", lambda file: file.write_bytes(file.read_bytes()[:-200]), "truncated"),
    ("gone", lambda file: file.unlink(), "No such file"),
]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """12 images of two classes; number 4, of the first class, is truncated, and number 9 is no image."""
    write_images(tmp_path / "a", 6)
    write_images(tmp_path / "b", 6, 6)
    BROKEN[2][1](tmp_path / "a" / "4.png")
    BROKEN[1][1](tmp_path / "b" / "9.png")
    return tmp_path


@pytest.mark.parametrize(("damage", "words"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_a_broken_image_is_named(tmp_path, damage, words):
    write_images(tmp_path, 2)
    images = open_images(str(tmp_path), "train", labeled=False)
    damage(tmp_path / "1.png")
    with pytest.raises(BrokenImageError, match=words) as caught:
        images[1]
    assert str(tmp_path / "1.png") in str(caught.value)
    assert "--on-broken skip" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops(broken, workers):
    images = open_images(str(broken), "train", labeled=True)
    order = TrainingSampler(12, 0, 4)
    for loader in (
        evaluation_loader(images, SMALL, 4, workers=workers),
        training_loader(images, SMALL, None, order, workers=workers),
    ):
        with pytest.raises(UsageError, match=r"[49]\.png cannot be read") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_skipped(broken, workers, caplog):
    images = open_images(str(broken), "train", labeled=True, on_broken="skip")
    whole = [number for number in range(12) if number not in (4, 9)]
    loader = evaluation_loader(images, SMALL, 2, workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert sum(len(labels) for _, labels in batches) == 10
        assert [label for _, labels in batches for label in labels.tolist()] == [number // 6 for number in whole]
    assert loader.broken == {str(broken / "a" / "4.png"), str(broken / "b" / "9.png")}

    order = TrainingSampler(12, 7, 4)
    training = training_loader(images, SMALL, None, order, workers=workers)
    drawn = permutation(12, 7, 0).tolist()
    expected = [next(one for one in drawn[place:] + drawn[:place] if one in whole) for place in range(12)]
    evaluation = training.dataset.transform
    seen = torch.cat([batch for batch, _ in training])
    assert torch.equal(seen, torch.stack([evaluation(images[index][0]) for index in expected]))
    assert len(caplog.messages) == 2  # once for each file, whoever met it
    assert all("left out" in message for message in caplog.messages)


def test_batches_of_broken_images_alone(broken):
    images = open_images(str(broken), "train", labeled=True, on_broken="skip")
    only = images.subset([4, 9, 0])
    assert [labels.tolist() for _, labels in evaluation_loader(only, SMALL, 2)] == [[0]]
    with pytest.raises(UsageError, match="none of the 2 images can be read"):
        list(training_loader(images.subset([4, 9]), SMALL, None, TrainingSampler(2, 0, 2)))


def test_a_callable_that_loses_an_image(data_module, caplog):
    with pytest.raises(UsageError, match=r"image 5 of own_data:lossy cannot be read \(lost\)"):
        list(evaluation_loader(open_images("own_data:lossy", "train", labeled=True), SMALL, 4))
    skipping = open_images("own_data:lossy", "train", labeled=True, on_broken="skip")
    assert sum(len(labels) for _, labels in evaluation_loader(skipping, SMALL, 4)) == 9


# The order


def batches_of(order: TrainingSampler, epoch: int = 0, step: int = 0) -> list[list[int]]:
    order.start_at(epoch, step)
    drawn = permutation(order.count, order.seed, epoch)
    batches = [[int(drawn[place]) for at, place in batch if at == epoch] for batch in order]
    assert len(batches) == len(order)
    return batches


def test_an_epoch_sees_every_image_once():
    order = TrainingSampler(13, 5, 3)
    for epoch in (0, 1):
        batches = batches_of(order, epoch)
        seen = [index for batch in batches for index in batch]
        assert (order.steps_per_epoch, len(batches), {len(batch) for batch in batches}) == (4, 4, {3})
        assert len(set(seen)) == 12
    assert batches_of(order, 0) != batches_of(order, 1)
    assert batches_of(TrainingSampler(13, 6, 3)) != batches_of(order)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (4, 1)])
def test_processes_share_what_one_accumulates(world, accumulate):
    alone = batches_of(TrainingSampler(50, 5, 3, accumulate=4), 2)
    ranks = [batches_of(TrainingSampler(50, 5, 3, accumulate, rank, world), 2) for rank in range(world)]
    steps = [
        [batch for rank in ranks for batch in rank[step * accumulate : (step + 1) * accumulate]] for step in range(4)
    ]
    assert [batch for step in steps for batch in step] == alone


@pytest.mark.parametrize("step", [0, 1, 3])
def test_an_order_begins_anywhere(step):
    order = TrainingSampler(31, 5, 3, accumulate=2, rank=1, world=2)
    assert order.steps_per_epoch == 2
    order = TrainingSampler(40, 5, 3, accumulate=2, rank=1, world=2)
    assert batches_of(order, 4, step) == batches_of(order, 4)[step * 2 :]
    with pytest.raises(ValueError, match="step 4 of an epoch of 3"):
        order.start_at(0, 4)


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


@pytest.mark.parametrize(("count", "world"), [(10, 1), (10, 3), (2, 4)])
def test_evaluation_sees_every_image_once(count, world):
    shares = [list(evaluation_indices(count, rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Batches


def test_settings():
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


@pytest.mark.parametrize("settings", [SMALL, GRAY, ImageSettings((3, 40, 24))], ids=["RGB", "gray", "oblong"])
@pytest.mark.parametrize("size", [(28, 28), (5, 90), (90, 5), (1, 1)])
@pytest.mark.parametrize("augmentation", [None, Augmentation(), STRONG, Augmentation(color_jitter=0.4, hflip=0)])
def test_transforms(settings, size, augmentation):
    image = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size, 3), dtype=np.uint8))
    transform = make_transform(settings, augmentation)
    for seed in range(4):
        with seeded(seed):
            made = transform(image)
        assert made.shape == settings.input_size
        assert made.dtype == torch.float32


def test_evaluation_shows_the_values(tmp_path):
    PIL.Image.new("RGB", (30, 20), (51, 102, 255)).save(tmp_path / "0.png")
    images = open_images(str(tmp_path), "train", labeled=False)
    batch, labels = next(iter(evaluation_loader(images, SMALL, 4)))
    expected = (torch.tensor([0.2, 0.4, 1.0]) - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    torch.testing.assert_close(batch, expected.view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [-1]


def test_augmentations_that_timm_does_not_know():
    with pytest.raises(UsageError, match="augmentation: timm cannot make it"):
        make_transform(SMALL, Augmentation(auto_augment="magic-m9"))


def test_batches_depend_on_the_place_alone(classes):
    """Not on the number of workers, of processes, on what was drawn before, or on where the run was resumed."""
    images = open_images(str(classes), "train", labeled=True)

    def loaded(workers: int = 0, epoch: int = 2, step: int = 0, seed: int = 3, rank: int = 0, world: int = 1) -> Any:
        order = TrainingSampler(24, seed, 3, 2 // world, rank, world)
        loader = training_loader(images, SMALL, STRONG, order, workers)
        if workers:  # an epoch before, given up: the workers stay and must not mix them
            order.start_at(0)
            next(iter(loader))
        order.start_at(epoch, step)
        torch.rand(workers + 1), random.random()
        return contents(loader)

    state = torch.get_rng_state()
    expected = loaded()
    assert len(expected) == 8
    assert loaded(workers=2) == expected
    assert loaded(step=3) == expected[6:]
    assert [
        batch for pair in zip(loaded(rank=0, world=2), loaded(rank=1, world=2), strict=True) for batch in pair
    ] == expected
    assert loaded(epoch=1) != expected
    assert loaded(seed=4) != expected
    torch.set_rng_state(state)
    before = torch.get_rng_state()
    contents(training_loader(images, SMALL, STRONG, TrainingSampler(24, 0, 8)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_varied_anew_in_every_epoch(classes):
    images = open_images(str(classes), "train", labeled=True).subset([0])
    order = TrainingSampler(1, 0, 1)
    loader = training_loader(images, SMALL, STRONG, order)
    seen = set()
    for epoch in range(4):
        order.start_at(epoch)
        seen.add(next(iter(loader))[0].numpy().tobytes())
    assert len(seen) == 4


def test_data_that_draw_at_random_are_repeatable(data_module):
    images = open_images("own_data:noisy", "train", labeled=True)
    order = TrainingSampler(8, 0, 4)
    assert contents(training_loader(images, SMALL, None, order)) == contents(
        training_loader(images, SMALL, None, order)
    )
    assert contents(evaluation_loader(images, SMALL, 3)) == contents(evaluation_loader(images, SMALL, 3))


def test_an_order_of_other_images(classes):
    images = open_images(str(classes), "train", labeled=True)
    with pytest.raises(ValueError, match="a sampler of 23 images for 24"):
        training_loader(images, SMALL, None, TrainingSampler(23, 0, 2))


def test_workers_outlive_a_signal_to_all(classes):
    loader = evaluation_loader(open_images(str(classes), "train", labeled=True), SMALL, 2, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    assert sum(len(labels) for _, labels in batches) == 22
    assert sum(len(labels) for _, labels in loader) == 24
    assert worker.is_alive()


def _lose_a_worker(folder: Path, results: Any) -> None:
    loader = evaluation_loader(open_images(str(folder), "train", labeled=True), SMALL, 2, workers=1)
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


def test_the_death_of_a_worker_is_explained(classes):
    # In a process of its own: torch reports a dead worker again whenever another child ends.
    results = FORK.SimpleQueue()
    run = FORK.Process(target=_lose_a_worker, args=(classes, results))
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
    batches = iter(evaluation_loader(open_images(str(folder), "train", labeled=True), SMALL, 2, workers=2))
    next(batches)
    kept: list[Any] = [batches]
    kept.append(kept)  # a cycle, so that they end with the process and not before
    sys.exit(3)


def test_workers_end_with_a_run_that_fails(classes):
    run = FORK.Process(target=_fail_with_workers, args=(classes,))
    run.start()
    run.join(30)
    assert run.exitcode == 3
