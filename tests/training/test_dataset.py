"""Data sets from folders, callables and timm, and images that cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from support.images import color, truncate, write_classes, write_images

from ddf_convert.errors import UsageError
from ddf_convert.training import dataset
from ddf_convert.training.dataloader import ImageSettings, evaluation_loader
from ddf_convert.training.dataset import (
    NO_LABEL,
    BrokenImageError,
    ImageDataset,
    MissingSplitError,
    open_images,
    random_split,
)
from ddf_convert.utils import logging
from ddf_convert.utils.imports import call, find_callable

SETTINGS = ImageSettings((3, 16, 16), crop_pct=1.0)


@pytest.fixture(autouse=True)
def _fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "_warned", set())


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classes(tmp_path_factory.mktemp("classes"))


# --- folders ---


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
def test_a_folder_with_splits(tmp_path, name):
    for split, labels in (("train", "abc"), (name, "bc")):
        for label in labels:
            write_images(tmp_path / split / label, 2, ord(label))
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


MISTAKES = {
    "one class": (["cat/0.png"], "train", True, "one class only, cat"),
    "an empty class": (["cat/0.png", "dog/", "eel/0.png"], "train", True, "dog: no images of this class"),
    "no classes": (["0.png"], "train", True, "no class subfolders, and labels are needed"),
    "no train": (["val/cat/0.png"], "train", False, "has no train/ beside val/"),
    "an unknown class": (
        ["train/cat/0.png", "train/dog/0.png", "val/cat/0.png", "val/owl/0.png"],
        "validation",
        True,
        "owl: there is no such class",
    ),
    "no images": (["notes.txt"], "train", False, "no images below it"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_folders(tmp_path, case):
    files, split, labeled, words = MISTAKES[case]
    for name in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.touch()
    with pytest.raises(UsageError, match=words) as caught:
        open_images(str(tmp_path), split, labeled)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for name, words in (("file", "is a file"), ("nothing", "no such folder")):
        with pytest.raises(UsageError, match=words):
            open_images(str(tmp_path / name), "train", False)


def test_images_beside_the_classes_are_left_out_with_a_warning(tmp_path, caplog):
    for name in ("a", "b"):
        write_images(tmp_path / name, 2)
    write_images(tmp_path, 3)
    assert len(open_images(str(tmp_path), "train", labeled=True)) == 4
    assert "left out (3)" in caplog.text


def test_a_random_split_is_the_same_every_time(classes):
    images = open_images(str(classes), "train", labeled=True)
    for fraction, count in ((0.1, 2), (0.5, 12), (0, 1)):
        train, validation = random_split(images, fraction)
        names = [[part.name(index) for index in range(len(part))] for part in (train, validation)]
        assert len(validation) == count
        assert sorted(names[0] + names[1]) == sorted(images.name(index) for index in range(24))
        again = random_split(images, fraction)[1]
        assert [again.name(index) for index in range(count)] == names[1]
    assert validation.classes == images.classes
    first, other = (random_split(images, fraction=0.5, seed=seed)[1] for seed in (0, 1))
    assert [other.name(index) for index in range(12)] != [first.name(index) for index in range(12)]
    with pytest.raises(UsageError, match="too few"):
        random_split(images.subset([3]))


# --- callables and timm's data sets ---

DATA = """
import numpy, torch
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
instance = Squares()
"""


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "own_data.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    sys.modules.pop("own_data", None)


def test_a_callable(own_data, capsys):
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
    ],
)
def test_mistakes_in_names_and_callables(own_data, monkeypatch, tmp_path, name, split, error, words):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(error, match=words) as caught:
        open_images(name, split, labeled=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [("words", 0, "its label is str"), ("beyond", 1, "is 7; labels go from 0 to 1"), ("below", 0, "its label is -1")],
)
def test_a_label_that_is_no_class_is_an_error(own_data, name, index, words):
    images = open_images(f"own_data:{name}", "train", labeled=True)
    with pytest.raises(UsageError, match=words):
        images[index]
    skipping = ImageDataset(images._source, images.classes, True, "skip", [index])
    with pytest.raises(UsageError, match=words):  # the image is not broken, and not left out
        list(evaluation_loader(skipping, SETTINGS, 2))


def test_callables_are_called_with_what_they_take(own_data):
    function = find_callable("own_data:Squares.__len__", "a number")
    assert call("own_data:Squares.__len__", function, self=find_callable("own_data:plain", "data")()) == 10
    with pytest.raises(UsageError, match=r"failed: TypeError"):
        call("own_data:plain", find_callable("own_data:plain", "data"), wrong=1)


def test_a_data_set_of_torchvision(tmp_path):
    """Fashion-MNIST as it is on a disk, with 5 images."""
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
    batch, labels = next(iter(evaluation_loader(images, ImageSettings((1, 12, 20)), 8)))
    assert batch.shape == (3, 1, 12, 20)
    assert labels.tolist() == [0, 1, 2]


def test_readers_of_timm(monkeypatch, classes):
    """They give open files, as those of Hugging Face's data sets do; that package is not needed for the test."""
    created: list[tuple[str, str]] = []

    def create(name: str, root: Any, split: str, download: bool) -> Any:
        created.append((name, split))
        if split == "validation":
            raise ValueError('Unknown split "validation". Should be one of [...]')
        return timm.data.ImageDataset(str(classes))

    monkeypatch.setattr(dataset.timm.data, "create_dataset", create)
    images = open_images("hfds/digits", "validation", labeled=True)
    assert created == [("hfds/digits", "validation"), ("hfds/digits", "test")]
    assert (len(images), images.classes, images[20][1]) == (24, ("c1", "c2", "c10"), 2)
    assert images.name(20) == "image 20 of hfds/digits"


# --- images that cannot be read ---

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text": (lambda file: file.write_text("hello"), "no image, or of an unknown format"),
    "truncated": (truncate, "truncated"),
    "gone": (lambda file: file.unlink(), "No such file"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_broken_image_is_named(tmp_path, case):
    damage, words = DAMAGES[case]
    write_images(tmp_path, 2)
    images = open_images(str(tmp_path), "train", labeled=False)
    damage(tmp_path / "1.png")
    with pytest.raises(BrokenImageError, match=words) as caught:
        images[1]
    assert str(tmp_path / "1.png") in str(caught.value)
    assert "--on-broken skip" in str(caught.value)


def test_an_item_that_a_callable_fails_to_load_is_a_broken_image(own_data):
    with pytest.raises(UsageError, match=r"image 5 of own_data:lossy cannot be read \(lost\)"):
        list(evaluation_loader(open_images("own_data:lossy", "train", labeled=True), SETTINGS, 4))
    skipping = open_images("own_data:lossy", "train", labeled=True, on_broken="skip")
    assert sum(len(labels) for _, labels in evaluation_loader(skipping, SETTINGS, 4)) == 9
