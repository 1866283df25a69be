"""The scene: a photo and its disparity, cut into a left part to learn from and a right part to test on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from recipe_parts.sources import MOTORCYCLE
from torch import Tensor

from ddf_convert.depth.maps import Unit, read_photo

CELL = 16  # pixels, of the largest factor: parts are whole cells of it
LEFT = 0.6  # of the width
PIXELS = Unit("px")
STRIP = 96  # columns at the left part's end, on which settings of the networks were chosen


@dataclass(frozen=True)
class Part:
    """Some columns of the scene; a collection of one pair, to train with.

    Attributes:
        photo: (3, H, W) uint8.
        disparity: (1, H, W) float32, in pixels; holes 0.
    """

    photo: Tensor
    disparity: Tensor
    unit: Unit = PIXELS
    names: tuple[str, ...] = ("motorcycle",)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The photo and the disparity."""
        return self.photo, self.disparity

    def columns(self, first: int, last: int) -> Part:
        """Some of the columns, without the last one."""
        return Part(self.photo[..., first:last].contiguous(), self.disparity[..., first:last].contiguous())

    @property
    def whole_cells(self) -> Part:
        """Without the last rows and the first columns that are no whole cell."""
        height, width = (length // CELL * CELL for length in self.disparity.shape[-2:])
        return Part(self.photo[:, :height, -width:].contiguous(), self.disparity[:, :height, -width:].contiguous())


def scene() -> Part:
    """All of it.

    Raises:
        UsageError: It was not fetched.
    """
    photo = read_photo(MOTORCYCLE.get("motorcycle_left.png"))
    with np.load(MOTORCYCLE.get("motorcycle_disp.npz"), allow_pickle=False) as file:
        disparity = torch.from_numpy(file["arr_0"].astype(np.float32))[None]
    return Part(photo, torch.where(torch.isfinite(disparity), disparity, 0.0))


def parts(whole: Part, choosing: bool = False) -> tuple[Part, Part]:
    """To learn from, and to test on.

    Args:
        whole: The scene.
        choosing: Divide the left part alone: its last columns are then what is tested on.
    """
    width = whole.disparity.shape[-1]
    left = int(width * LEFT)
    if choosing:
        return whole.columns(0, left - STRIP), whole.columns(left - STRIP, left).whole_cells
    return whole.columns(0, left), whole.columns(left, width).whole_cells
