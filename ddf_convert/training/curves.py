"""The course of a run as a picture. matplotlib is an extra: it is imported when something is drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddf_convert.training.logs import Row

_TRAIN, _VALIDATION = "#1f77b4", "#d62728"
_SHADE = "#f1f1f1"
_DPI = 150
_ACCURACIES = (("top1", "top-1 accuracy"), ("agreement", "agreement with the original"))
_SMOOTHED_FROM = 8  # points; fewer are seen better as they are


def draw(rows: Sequence[Row]) -> bytes:
    """Loss and, if there is any, accuracy over the epochs, the stages marked and named.

    Accuracy is top-1, or the agreement with the original where no row has top-1.

    Args:
        rows: Of one run, in their order; of none, the picture says so.

    Returns:
        The contents of a PNG file.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no state

    measured = next(
        ((name, title) for name, title in _ACCURACIES if any(getattr(row, name) is not None for row in rows)), None
    )
    panels = [("loss", "loss"), *([measured] if measured else [])]
    figure = Figure(figsize=(6 * len(panels) + 0.5, 4.2), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _mark_stages(axis, rows)
        _panel(axis, rows, name)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontweight="bold", pad=26 if len({row.stage for row in rows}) > 1 else None)
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=_DPI)
    return contents.getvalue()


def _panel(axis: Any, rows: Sequence[Row], name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    seen: list[NDArray[np.float64]] = []
    for kind, colour in (("train", _TRAIN), ("validation", _VALIDATION)):
        chosen = [row for row in rows if row.kind == kind and getattr(row, name) is not None]
        x = np.array([row.epoch for row in chosen], dtype=np.float64)
        y = np.array([getattr(row, name) for row in chosen], dtype=np.float64)
        if not np.isfinite(y).any():
            continue
        seen.append(y[np.isfinite(y)])
        if kind == "train" and len(x) >= _SMOOTHED_FROM:
            axis.plot(x, y, color=colour, lw=0.7, alpha=0.3)
            y = _smoothed(y)
            axis.plot(x, y, color=colour, lw=1.8, label=kind)
        else:
            axis.plot(x, y, color=colour, lw=1.8, marker="o", ms=4 if len(x) < 50 else 2, label=kind)
        last = np.flatnonzero(np.isfinite(y))
        if kind == "validation" and len(last):
            words = f"{y[last[-1]]:.3g}" if name == "loss" else f"{y[last[-1]]:.1%}"
            place = (x[last[-1]], y[last[-1]])
            axis.annotate(words, place, (6, 0), textcoords="offset points", va="center", color=colour, fontsize=9)
    values = np.concatenate(seen) if seen else np.empty(0)
    if not len(values):
        axis.text(0.5, 0.5, "nothing was measured", transform=axis.transAxes, ha="center", va="center", color="grey")
        axis.set(xticks=[], yticks=[])
    elif name == "loss":
        # A first step far above the rest would press the rest together; a loss is also what falls by factors.
        if values.min() > 0 and values.max() > 20 * np.median(values):
            axis.set_yscale("log")
        elif values.min() >= 0:
            axis.set_ylim(bottom=0)
    else:
        low = float(values.min())
        axis.set_ylim(0 if low < 0.5 else np.floor(low * 10 - 0.5) / 10, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if seen:
        axis.legend(frameon=False, loc="best")
    axis.grid(True, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_stages(axis: Any, rows: Sequence[Row]) -> None:
    """If there are several stages: shades every second one, and writes their names above the axes."""
    ends: dict[str, float] = {}
    for row in rows:
        ends[row.stage] = max(row.epoch, ends.get(row.stage, 0.0))
    begin = 0.0
    for number, (name, end) in enumerate(ends.items() if len(ends) > 1 else ()):
        if number % 2:
            axis.axvspan(begin, end, color=_SHADE, lw=0, zorder=0)
        place = (begin, 1.0)
        lift = (2, 3 + 10 * (number % 2))  # on two lines: a name may be longer than its stage
        where = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points"}
        axis.annotate(name, place, lift, **where, fontsize=8, color="dimgrey")
        axis.annotate(
            "", place, (0, lift[1] + 8), **where, arrowprops={"arrowstyle": "-", "color": "silver", "lw": 0.8}
        )
        begin = end
    if ends:
        axis.set_xlim(0, max(*ends.values(), 0.01) * 1.08)  # leaves room for the number at the end


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over about a fifteenth of the values, those around each weighing the most; NaN where a value is not one.

    It looks to both sides, so that the curve does not lag behind what it smooths.
    """
    reach = max(1, len(values) // 30)
    weights = np.hanning(2 * reach + 3)[1:-1]
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), weights, mode="same")
    mass = np.convolve(finite.astype(np.float64), weights, mode="same")
    return np.where(finite, total / np.where(mass > 0, mass, 1.0), np.nan)
