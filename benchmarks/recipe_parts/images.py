"""The fetched images as tensors."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from recipe_parts.sources import DIGITS, IMAGENET, LABELLED, SKIMAGE, SKLEARN


def photo(file: Path) -> Image.Image:
    """In color."""
    with Image.open(file) as opened:
        return opened.convert("RGB")


def labelled() -> tuple[list[Path], Tensor]:
    """The ImageNet photos and their classes."""
    files = [IMAGENET.get(name) for name in LABELLED]
    return files, torch.tensor([label_of(file.name) for file in files])


def label_of(name: str) -> int:
    """The class in the name of a labelled photo, e.g. 243 of imagenet_00_243.jpg."""
    found = re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", name)
    if found is None:
        raise ValueError(f"{name} has no class in its name")
    return int(found[1])


def fit_and_test() -> tuple[list[Path], list[Path]]:
    """Photos to fit on, whose labels nobody looks at, and others to test on.

    Every second ImageNet photo is tested on; the others, and all photos from elsewhere, are fitted on.
    """
    imagenet, _ = labelled()
    elsewhere = [source.get(name) for source in (SKIMAGE, SKLEARN) for names in source.files.values() for name in names]
    return [*elsewhere, *imagenet[::2]], imagenet[1::2]


def pixels(image: Image.Image) -> Tensor:
    """(3, H, W), from 0 to 255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def center(image: Image.Image, size: int) -> Tensor:
    """The middle square, resized: (3, size, size)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))


def random_crops(images: Sequence[Image.Image], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random squares of random photos, half of them mirrored: (count, 3, size, size).

    A crop's side is between ``size`` pixels, as they are, and the whole of the photo's shorter side.
    """
    made = []
    for _ in range(count):
        which, side_share, x, y, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        image = images[int(which * len(images))]
        shorter = min(image.size)
        side = shorter if shorter <= size else size + side_share * (shorter - size)
        left, top = x * (image.width - side), y * (image.height - side)
        crop = pixels(image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)))
        made.append(crop.flip(-1) if mirror < 0.5 else crop)
    return torch.stack(made)


def digits() -> tuple[Tensor, Tensor]:
    """(5000, 1, 28, 28) digits, scaled to mean 0 and deviation 1 (of MNIST), and their labels; in the file's order."""
    with gzip.open(DIGITS.get(), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))
    images = table[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    return (images - 0.1307) / 0.3081, table[:, -1]


def split(labels: Tensor, test: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices to train and to test on; every class has the same share of the test."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    shuffled = [torch.nonzero(labels == each)[:, 0] for each in range(classes)]
    shuffled = [own[torch.randperm(len(own), generator=generator)] for own in shuffled]
    kept = [round(test * len(own) / len(labels)) for own in shuffled]
    train = torch.cat([own[count:] for own, count in zip(shuffled, kept, strict=True)])
    return train, torch.cat([own[:count] for own, count in zip(shuffled, kept, strict=True)])
