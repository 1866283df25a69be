"""Images of every kind become RGB with 8 bits."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from ddf_convert.utils.images import to_rgb


def _png(image: PIL.Image.Image) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, "PNG")
    return PIL.Image.open(io.BytesIO(file.getvalue()))


def _palette(**info: Any) -> PIL.Image.Image:
    image = PIL.Image.new("P", (2, 2), 1)
    image.putpalette([255, 0, 0, 10, 20, 30])
    image.info.update(info)
    return image


WHITE = (255, 255, 255)
RAMP = np.array([[0, 25700], [40000, 65535]], dtype=np.uint16)
IMAGES: dict[str, tuple[Callable[[], Any], Any]] = {
    "gray": (lambda: PIL.Image.new("L", (2, 2), 77), (77, 77, 77)),
    "transparent": (lambda: PIL.Image.new("RGBA", (2, 2), (10, 20, 30, 0)), WHITE),
    "gray, transparent": (lambda: PIL.Image.new("LA", (2, 2), (0, 0)), WHITE),
    "palette": (_palette, (10, 20, 30)),
    "palette, transparent": (lambda: _palette(transparency=1), WHITE),
    "CMYK": (lambda: PIL.Image.new("CMYK", (2, 2), (255, 0, 0, 0)), (0, 255, 255)),
    "16 bits": (lambda: _png(PIL.Image.fromarray(RAMP)), [[0, 100], [156, 255]]),
    "32 bits": (lambda: PIL.Image.fromarray(RAMP.astype(np.int32)), [[0, 100], [156, 255]]),
    "float to 1": (lambda: PIL.Image.fromarray(np.float32([[0, 0.4], [0.6, 1]])), [[0, 102], [153, 255]]),
    "float to 255": (lambda: PIL.Image.fromarray(np.float32([[0, 40], [300, np.nan]])), [[0, 40], [255, 0]]),
    "array": (lambda: np.full((2, 2), 77, np.uint8), (77, 77, 77)),
    "array, one channel": (lambda: np.full((2, 2, 1), 77, np.uint8), (77, 77, 77)),
    "array, float": (lambda: np.full((2, 2, 3), (0.2, 0.4, 1.0)), (51, 102, 255)),
    "tensor": (lambda: torch.full((2, 2), 77, dtype=torch.uint8), (77, 77, 77)),
    "tensor, half": (lambda: torch.full((1, 2, 2), 1.0, dtype=torch.bfloat16), WHITE),
    "tensor, RGB": (lambda: torch.tensor([0.2, 0.4, 1.0]).view(3, 1, 1).expand(3, 2, 2), (51, 102, 255)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_every_kind_of_image_becomes_rgb(name):
    make, expected = IMAGES[name]
    image = to_rgb(make())
    assert image.mode == "RGB"
    pixels = np.asarray(expected)
    pixels = np.broadcast_to(pixels[:, :, None] if pixels.ndim == 2 else pixels, (2, 2, 3))
    assert np.asarray(image).tolist() == pixels.tolist()


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
def test_what_is_no_image_is_refused(image, words):
    with pytest.raises(ValueError, match=words):
        to_rgb(image)
