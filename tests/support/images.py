"""Folders of small images for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image


def color(number: int) -> tuple[int, int, int]:
    """The color of the upper half of an image."""
    return (number * 37 % 256, number * 91 % 256, number * 53 % 256)


def write_images(folder: Path, count: int, first: int = 0, size: tuple[int, int] = (20, 18)) -> None:
    """Writes different PNG files; the lower half is noise, so that augmentations change them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.RandomState(number).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        pixels[: size[1] // 2] = color(number)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")


def write_classes(folder: Path) -> Path:
    """Writes 24 images of 3 classes."""
    for label, name in enumerate(("c1", "c2", "c10")):
        write_images(folder / name, 8, 8 * label)
    return folder


def truncate(file: Path) -> None:
    """Damages an image file."""
    file.write_bytes(file.read_bytes()[:-200])
