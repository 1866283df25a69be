"""What DDF-Up-Net is compared with: interpolation, and two filters of OpenCV whose parameters are chosen on a pair."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert.depth.metrics import errors
from ddf_convert.errors import UsageError
from ddf_convert.models.depth_holes import fill_holes

PACKAGE = "opencv-contrib-python-headless==5.0.0.93"
_LEAST = 1e-6  # of a weight that is divided by


@dataclass(frozen=True)
class Peer:
    """A way to upsample that learns nothing.

    Attributes:
        name: In words.
        run: Makes (1, s*h, s*w) of a photo (3, s*h, s*w) from 0 to 1, a small depth map (1, h, w), the factor and
            parameters.
        grid: The values that each parameter is tried with.
    """

    name: str
    run: Callable[..., Tensor]
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def choices(self) -> Iterator[dict[str, Any]]:
        """All combinations of the parameters."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def choose(self, photo: Tensor, small: Tensor, truth: Tensor, factor: int) -> dict[str, Any]:
        """The parameters of the least RMSE on one pair."""
        return min(self.choices(), key=lambda chosen: errors(self.run(photo, small, factor, **chosen), truth).rmse)


def interpolated(photo: Tensor, small: Tensor, factor: int, mode: str) -> Tensor:
    """Interpolation that knows where the pixels were taken: at ``(factor - 1) // 2`` of each cell, not in its middle.

    With the ordinary one, which takes them for the middles, every map is off by half a pixel, and worse.
    """
    filled, _ = fill_holes(small[None])
    lines = []
    for length in small.shape[-2:]:
        places = (torch.arange(length * factor) - (factor - 1) // 2) / factor  # in pixels of the small map
        lines.append((2 * places + 1) / length - 1)
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    grid = torch.stack((columns, rows), -1)[None]
    return F.grid_sample(filled, grid, mode=mode, padding_mode="border", align_corners=False)[0]


def guided(photo: Tensor, small: Tensor, factor: int, radius: float, eps: float) -> Tensor:
    """OpenCV's guided filter of the map that bilinear interpolation makes; the radius is in pixels of the small map.

    Source: He, Sun, Tang, "Guided Image Filtering", ECCV 2010.
    """
    large = interpolated(photo, small, factor, "bilinear")[0].numpy()
    found = opencv().ximgproc.guidedFilter(_rows_first(photo), large, max(1, round(radius * factor)), eps)
    return torch.from_numpy(found)[None]


def joint_bilateral(photo: Tensor, small: Tensor, factor: int, space: float, color: float, of: str) -> Tensor:
    """OpenCV's joint bilateral filter; deviations are in pixels of the small map, and of colors from 0 to 1.

    It filters the map that bilinear interpolation makes ("interpolated"), or the measurements where they were taken and
    nothing in between ("measurements"), which is joint bilateral upsampling; where no measurement is near enough in
    color, interpolation remains.

    Source: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007.
    """
    large = interpolated(photo, small, factor, "bilinear")[0]
    joint = _rows_first(photo)

    def filtered(image: Tensor) -> Tensor:
        three = np.ascontiguousarray(np.repeat(image.numpy()[..., None], 3, 2))  # as many channels as the photo
        found = opencv().ximgproc.jointBilateralFilter(joint, three, -1, color, space * factor)
        return torch.from_numpy(np.ascontiguousarray(found[..., 0]))

    if of == "interpolated":
        return filtered(large)[None]
    known, values = torch.zeros_like(large), torch.zeros_like(large)
    center = (factor - 1) // 2
    known[center::factor, center::factor] = (small[0] > 0).float()
    values[center::factor, center::factor] = small[0]
    weights = filtered(known)
    return torch.where(weights > _LEAST, filtered(values) / weights.clamp_min(_LEAST), large)[None]


def opencv() -> Any:
    """The module ``cv2``, with its extra modules.

    Raises:
        UsageError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise UsageError(f"the peers need OpenCV: pip install '{PACKAGE}'") from error
    if not hasattr(cv2, "ximgproc"):
        raise UsageError(f"OpenCV is there without its extra modules: pip install '{PACKAGE}'")
    return cv2


def _rows_first(photo: Tensor) -> Any:
    return np.ascontiguousarray(photo.permute(1, 2, 0).numpy())


_NEAR = (0.25, 0.5, 1.0)
PEERS = (
    Peer("nearest", interpolated, {"mode": ("nearest",)}),
    Peer("bilinear", interpolated, {"mode": ("bilinear",)}),
    Peer("bicubic", interpolated, {"mode": ("bicubic",)}),
    Peer("guided filter", guided, {"radius": (0.125, 0.25, 0.5, 1.0, 2.0), "eps": (1e-4, 1e-3, 1e-2, 1e-1)}),
    Peer(
        "joint bilateral",
        joint_bilateral,
        {"space": _NEAR, "color": (0.02, 0.04, 0.08, 0.16), "of": ("interpolated", "measurements")},
    ),
)
