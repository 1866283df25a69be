"""Draws photo, small depth map, interpolation and network side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ddf_convert.depth.maps import Unit
from ddf_convert.utils.figures import new_figure

_DEPTH, _ERROR = "viridis", "magma"
_WIDTH = 4.0  # inches of a panel


def draw(
    photo: Tensor | None,
    panels: Sequence[tuple[str, Tensor]],
    truth: Tensor | None,
    unit: Unit,
    what: str = "depth",
    show_truth: bool = True,
) -> Any:
    """Draws the photo and depth maps in one range of colors, and their errors below if the truth is known.

    Args:
        photo: (3, H, W) uint8; None leaves it out.
        panels: Names and depth maps, (1, H, W) or smaller, the last one as large as the photo; holes 0, shown white.
        truth: (1, H, W), holes 0, or None.
        unit: Unit of the depth maps.
        what: Label of the color scale.
        show_truth: Draw the truth itself too.
    """
    shown = [*panels, *([("truth", truth)] if truth is not None and show_truth else [])]
    errors = [] if truth is None else [(name, _error(map, truth)) for name, map in panels]
    first = 0 if photo is None else 1  # column of the first depth map
    rows, columns = 2 if truth is not None else 1, first + len(shown)
    height, width = panels[-1][1].shape[-2:]
    figure = new_figure(_WIDTH * columns, rows * (_WIDTH * height / width + 0.5))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    if photo is not None:
        axes[0][0].imshow(photo.permute(1, 2, 0).numpy())
        axes[0][0].set_title("RGB")
    values = np.concatenate([map[map > 0].numpy() for _, map in shown])
    low, high = np.percentile(values, (0.5, 99.5))
    for axis, (name, map) in zip(axes[0][first:], shown, strict=True):
        picture = axis.imshow(
            np.ma.masked_less_equal(map[0].numpy(), 0), cmap=_DEPTH, vmin=low, vmax=high, interpolation="nearest"
        )
        axis.set_title(name)
    figure.colorbar(picture, ax=list(axes[0][first:]), label=f"{what}, {unit.name}", shrink=0.8)
    measured = [(place, name, error) for place, (name, error) in enumerate(errors, first) if error is not None]
    if measured:
        most = max(float(np.percentile(error.compressed(), 99)) for _, _, error in measured)
        for place, _, error in measured:
            picture = axes[1][place].imshow(error, cmap=_ERROR, vmin=0, vmax=max(most, 1e-12), interpolation="nearest")
            rmse = float(np.sqrt((error.compressed().astype(np.float64) ** 2).mean()))
            axes[1][place].set_title(f"error, RMSE {unit.show(rmse):.3g} {unit.shown}")
        figure.colorbar(picture, ax=list(axes[1][first:]), label=f"absolute error, {unit.name}", shrink=0.8)
    return figure


def _error(found: Tensor, truth: Tensor) -> Any:
    """Returns the absolute error, masked where the truth is unknown; None for a map of another size."""
    if found.shape != truth.shape:
        return None
    return np.ma.masked_where(truth[0].numpy() <= 0, (found - truth)[0].abs().numpy())
