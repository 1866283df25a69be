"""Filters as a picture. matplotlib is an extra: it is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddf_convert.utils.figures import encode_figure, new_figure
from ddf_convert.visualize.capture import LayerFilters
from ddf_convert.visualize.components import Components, components
from ddf_convert.visualize.maps import change, strength

_DPI = 120
_PANEL = 2.7  # inches
_MOST_BARS_NAMED = 40
_GAP = "#c4c4c4"
_FINE = 8
_CHANNELS = 36  # filters that are shown of the channels
_DRAWN, _OTHER = "#d62728", "#c9c9c9"
_SIGNED, _CHANGE, _STRENGTH = "RdBu_r", "inferno", "viridis"
_OPAQUE = 0.72  # of heat over the photo
_TINTS = (("red", "#c62828"), ("green", "#2e7d32"), ("blue", "#1565c0"))

Tap = tuple[int, int]


def spread(layers: Sequence[LayerFilters], most: int = 6) -> list[LayerFilters]:
    """So many layers, from the first to the last, evenly in between."""
    if len(layers) <= most:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / max(1, most - 1))] for place in range(most)]


def picture(
    layers: Sequence[LayerFilters],
    photo: Tensor | None = None,
    chosen: Sequence[LayerFilters] | None = None,
    *,
    image: int = 0,
    head: int = 0,
    branch: int = 0,
    taps: Sequence[Tap] = (),
    heading: str = "",
) -> Any:
    """A figure: the photo and how dynamic every layer is; below, a row for each chosen layer.

    A row shows where filters differ and how (principal components as colors), how much they differ from the mean
    filter, how strong they are, the K x K maps of the taps, and some of the channel filters. ``docs/visualize.md`` says
    how to read them.

    Args:
        layers: All of the model, from :func:`~ddf_convert.visualize.filters`.
        photo: (H, W, 3), from 0 to 1, what the model was shown; None leaves it out.
        chosen: Those to draw; None is six of them, evenly spread.
        image: Which of the batch.
        head: Which of each layer's, from 0.
        branch: Of DDF-Up layers, which branch's taps to draw, from 0: number ``dy * s + dx`` makes the output's pixels
            (s * y + dy, s * x + dx).
        taps: (row, column) of taps to draw large, in the place of all; from 0.
        heading: Stands above all.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: A chosen layer has no such head, branch, tap or image.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = spread(layers) if chosen is None else list(chosen)
    for layer in drawn:
        _check(layer, image, head, branch, taps)
    proportion = _proportion(photo, drawn)
    row, top = _PANEL * min(max(proportion, 0.6), 1.6) + 0.65, 3.3
    panels = 4 + max(1, len(taps))
    width, height = _PANEL * panels * 1.16 + 0.9, top + row * len(drawn)
    figure = new_figure(width, height, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05))
    if heading:
        figure.suptitle(heading, fontsize=13, fontweight="bold")
    parts = figure.subfigures(1 + len(drawn), 1, height_ratios=[top, *[row] * len(drawn)], squeeze=False)[:, 0]
    _overview(parts[0], layers, drawn, photo)
    for part, layer in zip(parts[1:], drawn, strict=True):
        _row(part, layer, photo, image, (head, branch), taps, proportion)
    return figure


def encoded(figure: Any, kind: str = "png") -> bytes:
    """The content of a file: "png", "pdf" or "svg"."""
    return encode_figure(figure, kind, dpi=_DPI)


def _check(layer: LayerFilters, image: int, head: int, branch: int, taps: Sequence[Tap]) -> None:
    if not 0 <= head < layer.heads:
        raise ValueError(f"{layer.title} has {layer.heads} heads, counted from 0: there is no head {head}")
    if not 0 <= image < len(layer.spatial):
        raise ValueError(f"{layer.title} has filters of {len(layer.spatial)} images: there is no image {image}")
    if layer.scale_factor > 1 and not 0 <= branch < layer.scale_factor**2:
        raise ValueError(f"{layer.title} has {layer.scale_factor**2} branches, counted from 0: there is no {branch}")
    for tap in taps:
        if not all(0 <= place < layer.kernel_size for place in tap):
            size = layer.kernel_size
            raise ValueError(f"{layer.title} has {size}x{size} taps, counted from 0: there is no tap {tap}")


def _proportion(photo: Tensor | None, drawn: Sequence[LayerFilters]) -> float:
    """Height over width of what is looked at."""
    height, width = photo.shape[:2] if photo is not None else drawn[0].size if drawn else (1, 1)
    return height / width


def _overview(part: Any, layers: Sequence[LayerFilters], drawn: Sequence[LayerFilters], photo: Tensor | None) -> None:
    shown = part.subplots(1, 2, width_ratios=[1, 3.6], squeeze=False)[0]
    shown[0].set_axis_off()
    if photo is not None:
        shown[0].imshow(photo.numpy())
        shown[0].set_title("what the model sees", fontsize=10)
    axis = shown[1]
    values = [100 * layer.dynamics.total for layer in layers]
    strong = {id(layer) for layer in drawn}
    axis.bar(range(len(layers)), values, color=[_DRAWN if id(layer) in strong else _OTHER for layer in layers])
    named = [at for at, layer in enumerate(layers) if len(layers) <= _MOST_BARS_NAMED or id(layer) in strong]
    axis.set_xticks(named, [layers[at].title for at in named])
    if len(layers) > 8:
        axis.tick_params(axis="x", rotation=40)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axis.tick_params(axis="x", labelsize=8, length=2)
    axis.tick_params(axis="y", labelsize=9)
    axis.set_xlim(-0.8, max(len(layers), 8) - 0.2)
    if max(values, default=0.0) == 0:
        axis.set_ylim(0, 1)
        words = "every filter is fixed: nothing dynamic was learned yet"
        axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center", color="dimgray")
    axis.set_ylabel("%")
    axis.set_title(
        "how dynamic: what of a layer's filters no fixed depthwise filter could do (red: drawn below)", fontsize=10
    )
    axis.grid(True, axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _row(
    part: Any,
    layer: LayerFilters,
    photo: Tensor | None,
    image: int,
    which: tuple[int, int],
    taps: Sequence[Tap],
    proportion: float,
) -> None:
    (head, branch), step = which, layer.scale_factor
    part.suptitle(_words(layer, head), x=0.008, ha="left", fontsize=11, fontweight="bold")
    columns = 3 + max(1, len(taps))  # beside the colors and what they stand for
    grid = part.add_gridspec(3, 2 + columns, width_ratios=[1.12, 0.2, *[1.2] * columns])
    axes = [part.add_subplot(grid[:, column]) for column in (0, *range(2, 2 + columns))]
    found = components(layer, image, head)
    _shape(axes[0], [part.add_subplot(grid[place, 1]) for place in range(3)], found, proportion, step)
    gray = None if photo is None else (photo @ torch.tensor([0.299, 0.587, 0.114])).numpy()
    maps = layer.spatial[image, head, ..., branch // step :: step, branch % step :: step].numpy()
    of = f", branch {branch}" if step > 1 else ""
    titles = ["change from the mean filter, %", "strength (1: the mean)"]
    titles += [f"spatial filter, tap {y},{x}{of}" for y, x in taps]
    if not taps:
        titles.append(f"spatial filters, {layer.kernel_size}x{layer.kernel_size} taps{of}")
    if found.changes:
        changed, strong = change(layer, image, head).square(), strength(layer, image, head)
        _heat(part, axes[1], titles[0], 100 * _cells(changed, step).sqrt(), gray, _CHANGE)
        _heat(part, axes[2], titles[1], _cells(strong, step), gray, _STRENGTH)
        drawn = [maps[y, x] for y, x in taps] or [_mosaic(maps.reshape(-1, *maps.shape[2:]), layer.kernel_size)]
        for axis, title, map in zip(axes[3:], titles[2:], drawn, strict=False):
            low, high = _range(maps)
            shown = axis.imshow(map, cmap=_SIGNED, vmin=low, vmax=high, interpolation="nearest")
            axis.set_aspect(proportion * maps.shape[-1] / maps.shape[-2])
            _finish(part, axis, shown, title)
    else:
        for axis, title in zip(axes[1:], titles, strict=False):
            axis.set_title(title, fontsize=10)
            _same(axis, proportion)
    _channels(part, axes[-1], layer, image, head)


def _cells(map: Tensor, step: int) -> Tensor:
    """The mean over each cell of s x s pixels: those of a DDF-Up layer's branches."""
    return torch.nn.functional.avg_pool2d(map[None, None], step)[0, 0]


def _words(layer: LayerFilters, head: int) -> str:
    dynamics, size = layer.dynamics, layer.kernel_size
    kind = f"{layer.kind}, {layer.channels} channels, {size}x{size}, {layer.size[0]}x{layer.size[1]} pixels"
    heads = f", head {head} of {layer.heads}" if layer.heads > 1 else ""
    return f"{layer.title}   ({kind}{heads})   dynamic: {percent(dynamics.total)}"


def percent(value: float) -> str:
    """A share: ``0.0312 -> "3.1 %"``."""
    if value == 0:
        return "0 %"
    return f"{100 * value:.1f} %" if value >= 0.0005 else "under 0.1 %"


def _shape(axis: Any, icons: Sequence[Any], found: Components, proportion: float, step: int) -> None:
    """Principal components as colors, and what the colors stand for; the branches of DDF-Up side by side."""
    axis.set_title(f"shape of the filter, {step}x{step} branches" if step > 1 else "shape of the filter", fontsize=10)
    if not found.changes:
        _same(axis, proportion)
        for icon in icons:
            icon.set_axis_off()
        return
    whole = found.colors().numpy()
    tiles = np.stack([whole[dy::step, dx::step] for dy in range(step) for dx in range(step)])
    axis.imshow(np.nan_to_num(_mosaic(tiles, step), nan=1.0), interpolation="nearest")
    axis.set_aspect(proportion * tiles.shape[2] / tiles.shape[1])
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)
    for icon, filter, share, (_, tint) in zip(icons, found.filters, found.shares, _TINTS, strict=True):
        most = float(filter.abs().max())
        icon.imshow(filter.numpy(), cmap=_SIGNED, vmin=-most, vmax=most, interpolation="nearest")
        icon.set(xticks=[], yticks=[])
        icon.set_title(f"{100 * share:.0f} %", fontsize=8, color=tint, pad=2)
        for spine in icon.spines.values():
            spine.set(color=tint, linewidth=2)


def _heat(part: Any, axis: Any, title: str, values: Tensor, gray: NDArray[Any] | None, colors: str) -> None:
    height, width = gray.shape if gray is not None else values.shape
    extent = (0, width, height, 0)
    if gray is not None:
        axis.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=extent)
    low, high = np.percentile(values.numpy(), (1, 99))
    drawn = axis.imshow(
        values.numpy(),
        cmap=colors,
        vmin=low,
        vmax=max(high, low + 1e-12),
        alpha=_OPAQUE if gray is not None else 1.0,
        extent=extent,
        interpolation="nearest",
    )
    _finish(part, axis, drawn, title)


def _channels(part: Any, axis: Any, layer: LayerFilters, image: int, head: int) -> None:
    """Filters of some channels of a head; of a DDF-Up layer, those of the s x s branches side by side in one cell."""
    filters = layer.channel[image].unflatten(1, (layer.heads, -1))[:, head]  # (N, C / G, K, K)
    step, count = layer.scale_factor, filters.shape[1]
    number = min(count, max(4, _CHANNELS // step**2))
    places = torch.linspace(0, count - 1, number).round().long()
    chosen = filters[:, places].transpose(0, 1).numpy()  # (n, N, K, K)
    most = max(float(np.percentile(np.abs(chosen), 99)), 1e-12)
    fine = chosen.repeat(_FINE, -1).repeat(_FINE, -2)  # so that what is in between is narrower than a tap
    cells = np.stack([_mosaic(cell, step, gap=1) for cell in fine])
    axis.set_facecolor(_GAP)
    whole = _mosaic(cells, int(np.ceil(number**0.5)), gap=3)
    drawn = axis.imshow(whole, cmap=_SIGNED, vmin=-most, vmax=most, interpolation="nearest")
    shown = f"{number} of {count} channels" if number < count else f"{count} channels"
    _finish(part, axis, drawn, f"channel filters, {shown}")


def _finish(part: Any, axis: Any, drawn: Any, title: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
    for spine in axis.spines.values():
        spine.set_visible(False)
    bar = part.colorbar(drawn, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if drawn.get_alpha() is not None:
        bar.solids.set_alpha(1)


def _same(axis: Any, proportion: float) -> None:
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    axis.set_aspect(proportion)
    axis.set_facecolor("#f2f2f2")
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.text(0.5, 0.5, "the same\neverywhere", ha="center", va="center", color="dimgray", fontsize=10)


def _range(values: NDArray[Any]) -> tuple[float, float]:
    """Of a signed scale of colors: around 0, or around the mean of values that are all of one sign."""
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    center = 0.0 if low < 0 < high else float(values.mean())
    reach = max(high - center, center - low, 1e-6 * abs(center), 1e-12)
    return center - reach, center + reach


def _mosaic(tiles: NDArray[Any], columns: int, gap: int | None = None) -> NDArray[Any]:
    """Tiles (n, h, w, ...) in rows, with nothing in between."""
    count, height, width = tiles.shape[:3]
    between = max(1, round(max(height, width) * 0.04)) if gap is None else gap
    rows = -(-count // columns)
    size = (rows * (height + between) - between, columns * (width + between) - between)
    whole = np.full((*size, *tiles.shape[3:]), np.nan)
    for number, tile in enumerate(tiles):
        y, x = (number // columns) * (height + between), (number % columns) * (width + between)
        whole[y : y + height, x : x + width] = tile
    return whole
