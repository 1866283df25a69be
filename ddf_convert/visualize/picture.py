"""Draws filters with matplotlib, which is an extra: it is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddf_convert.utils.figures import encode_figure, new_figure
from ddf_convert.visualize.layer_filters import Components, LayerFilters, change, components, strength

_DPI = 120
_PANEL = 2.7  # inches
_MAX_LABELED_BARS = 40
_MAX_CHANNEL_FILTERS = 36
_PIXELS_PER_TAP = 8  # of channel filters, so that gaps can be narrower than a tap
_GAP_COLOR = "#c4c4c4"
_DRAWN_BAR, _OTHER_BAR = "#d62728", "#c9c9c9"
_SIGNED, _CHANGE, _STRENGTH = "RdBu_r", "inferno", "viridis"  # color maps
_HEATMAP_ALPHA = 0.72  # over the photo
_COMPONENT_COLORS = ("#c62828", "#2e7d32", "#1565c0")

Tap = tuple[int, int]


def spread(layers: Sequence[LayerFilters], most: int = 6) -> list[LayerFilters]:
    """Returns up to ``most`` layers, evenly spread from the first to the last."""
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
    """Draws the photo and how dynamic every layer is and, below, a row for each chosen layer.

    A row shows the principal components of the spatial filters as colors, the change from the mean filter, the
    strength, the K x K maps of the taps, and some of the channel filters. ``docs/visualize.md`` says how to read them.

    Args:
        layers: All layers of the model, from :func:`~ddf_convert.visualize.filters`.
        photo: (H, W, 3), from 0 to 1, the model's input; None leaves it out.
        chosen: Layers to draw; None is six of them, evenly spread.
        image: Index in the batch.
        head: Index of the head of each layer.
        branch: Index of the branch of DDF-Up layers whose taps are drawn: branch ``dy * s + dx`` makes the output's
            pixels (s * y + dy, s * x + dx).
        taps: (row, column) of taps to draw large, instead of all; from 0.
        heading: Title of the figure.

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
    height, width = photo.shape[:2] if photo is not None else drawn[0].size if drawn else (1, 1)
    aspect = height / width
    row, top = _PANEL * min(max(aspect, 0.6), 1.6) + 0.65, 3.3
    panels = 4 + max(1, len(taps))
    size = (_PANEL * panels * 1.16 + 0.9, top + row * len(drawn))
    figure = new_figure(*size, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.05))
    if heading:
        figure.suptitle(heading, fontsize=13, fontweight="bold")
    subfigures = figure.subfigures(1 + len(drawn), 1, height_ratios=[top, *[row] * len(drawn)], squeeze=False)[:, 0]
    _draw_overview(subfigures[0], layers, drawn, photo)
    for subfigure, layer in zip(subfigures[1:], drawn, strict=True):
        _draw_layer(subfigure, layer, photo, image, head, branch, taps, aspect)
    return figure


def encoded(figure: Any, kind: str = "png") -> bytes:
    """Returns a figure as the content of a file: "png", "pdf" or "svg"."""
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


def _draw_overview(
    subfigure: Any, layers: Sequence[LayerFilters], drawn: Sequence[LayerFilters], photo: Tensor | None
) -> None:
    photo_axis, axis = subfigure.subplots(1, 2, width_ratios=[1, 3.6], squeeze=False)[0]
    photo_axis.set_axis_off()
    if photo is not None:
        photo_axis.imshow(photo.numpy())
        photo_axis.set_title("what the model sees", fontsize=10)
    values = [100 * layer.dynamics.total for layer in layers]
    is_drawn = [any(layer is each for each in drawn) for layer in layers]
    axis.bar(range(len(layers)), values, color=[_DRAWN_BAR if each else _OTHER_BAR for each in is_drawn])
    labeled = [at for at in range(len(layers)) if len(layers) <= _MAX_LABELED_BARS or is_drawn[at]]
    axis.set_xticks(labeled, [layers[at].title for at in labeled])
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


def _draw_layer(
    subfigure: Any,
    layer: LayerFilters,
    photo: Tensor | None,
    image: int,
    head: int,
    branch: int,
    taps: Sequence[Tap],
    aspect: float,
) -> None:
    step, size = layer.scale_factor, layer.kernel_size
    subfigure.suptitle(_layer_title(layer, head), x=0.008, ha="left", fontsize=11, fontweight="bold")
    columns = 3 + max(1, len(taps))  # beside the principal components and their filters
    grid = subfigure.add_gridspec(3, 2 + columns, width_ratios=[1.12, 0.2, *[1.2] * columns])
    axes = [subfigure.add_subplot(grid[:, column]) for column in (0, *range(2, 2 + columns))]
    pca = components(layer, image, head)
    _draw_components(axes[0], [subfigure.add_subplot(grid[row, 1]) for row in range(3)], pca, aspect, step)
    of_branch = f", branch {branch}" if step > 1 else ""
    titles = ["change from the mean filter, %", "strength (1: the mean)"]
    titles += [f"spatial filter, tap {y},{x}{of_branch}" for y, x in taps]
    if not taps:
        titles.append(f"spatial filters, {size}x{size} taps{of_branch}")
    if pca.changes:
        gray = None if photo is None else (photo @ torch.tensor([0.299, 0.587, 0.114])).numpy()
        change_rms = _cell_means(change(layer, image, head).square(), step).sqrt()
        _draw_heatmap(subfigure, axes[1], titles[0], 100 * change_rms, gray, _CHANGE)
        _draw_heatmap(subfigure, axes[2], titles[1], _cell_means(strength(layer, image, head), step), gray, _STRENGTH)
        maps = layer.spatial[image, head, ..., branch // step :: step, branch % step :: step].numpy()
        low, high = _color_range(maps)
        drawn = [maps[y, x] for y, x in taps] or [_mosaic(maps.reshape(-1, *maps.shape[2:]), size)]
        for axis, title, map in zip(axes[3:], titles[2:], drawn, strict=False):
            shown = axis.imshow(map, cmap=_SIGNED, vmin=low, vmax=high, interpolation="nearest")
            axis.set_aspect(aspect * maps.shape[-1] / maps.shape[-2])
            _finish(subfigure, axis, shown, title)
    else:
        for axis, title in zip(axes[1:], titles, strict=False):
            axis.set_title(title, fontsize=10)
            _draw_constant(axis, aspect)
    _draw_channel_filters(subfigure, axes[-1], layer, image, head)


def _cell_means(map: Tensor, step: int) -> Tensor:
    """The mean over each cell of s x s pixels, one for each branch of a DDF-Up layer."""
    return torch.nn.functional.avg_pool2d(map[None, None], step)[0, 0]


def _layer_title(layer: LayerFilters, head: int) -> str:
    dynamics, size = layer.dynamics, layer.kernel_size
    kind = f"{layer.kind}, {layer.channels} channels, {size}x{size}, {layer.size[0]}x{layer.size[1]} pixels"
    heads = f", head {head} of {layer.heads}" if layer.heads > 1 else ""
    return f"{layer.title}   ({kind}{heads})   dynamic: {percent(dynamics.total)}"


def percent(value: float) -> str:
    """Formats a share: ``0.0312 -> "3.1 %"``."""
    if value == 0:
        return "0 %"
    return f"{100 * value:.1f} %" if value >= 0.0005 else "under 0.1 %"


def _draw_components(axis: Any, icons: Sequence[Any], pca: Components, aspect: float, step: int) -> None:
    """Principal components as colors, and their filters as icons; the branches of DDF-Up side by side."""
    axis.set_title(f"shape of the filter, {step}x{step} branches" if step > 1 else "shape of the filter", fontsize=10)
    if not pca.changes:
        _draw_constant(axis, aspect)
        for icon in icons:
            icon.set_axis_off()
        return
    colors = pca.colors().numpy()
    tiles = np.stack([colors[dy::step, dx::step] for dy in range(step) for dx in range(step)])
    axis.imshow(np.nan_to_num(_mosaic(tiles, step), nan=1.0), interpolation="nearest")
    axis.set_aspect(aspect * tiles.shape[2] / tiles.shape[1])
    axis.set(xticks=[], yticks=[])
    _hide_spines(axis)
    for icon, filter, share, color in zip(icons, pca.filters, pca.shares, _COMPONENT_COLORS, strict=True):
        most = float(filter.abs().max())
        icon.imshow(filter.numpy(), cmap=_SIGNED, vmin=-most, vmax=most, interpolation="nearest")
        icon.set(xticks=[], yticks=[])
        icon.set_title(f"{100 * share:.0f} %", fontsize=8, color=color, pad=2)
        for spine in icon.spines.values():
            spine.set(color=color, linewidth=2)


def _draw_heatmap(
    subfigure: Any, axis: Any, title: str, values: Tensor, gray: NDArray[Any] | None, color_map: str
) -> None:
    """Values over the photo in gray, if there is one."""
    height, width = gray.shape if gray is not None else values.shape
    extent = (0, width, height, 0)
    if gray is not None:
        axis.imshow(gray, cmap="gray", vmin=0, vmax=1, extent=extent)
    low, high = np.percentile(values.numpy(), (1, 99))
    shown = axis.imshow(
        values.numpy(),
        cmap=color_map,
        vmin=low,
        vmax=max(high, low + 1e-12),
        alpha=_HEATMAP_ALPHA if gray is not None else 1.0,
        extent=extent,
        interpolation="nearest",
    )
    _finish(subfigure, axis, shown, title)


def _draw_channel_filters(subfigure: Any, axis: Any, layer: LayerFilters, image: int, head: int) -> None:
    """Filters of some channels of a head; those of the branches of DDF-Up side by side in one cell."""
    filters = layer.channel[image].unflatten(1, (layer.heads, -1))[:, head]  # (N, C / G, K, K)
    step, count = layer.scale_factor, filters.shape[1]
    number = min(count, max(4, _MAX_CHANNEL_FILTERS // step**2))
    channels = torch.linspace(0, count - 1, number).round().long()
    chosen = filters[:, channels].transpose(0, 1).numpy()  # (n, N, K, K)
    most = max(float(np.percentile(np.abs(chosen), 99)), 1e-12)
    enlarged = chosen.repeat(_PIXELS_PER_TAP, -1).repeat(_PIXELS_PER_TAP, -2)
    cells = np.stack([_mosaic(cell, step, gap=1) for cell in enlarged])
    axis.set_facecolor(_GAP_COLOR)
    mosaic = _mosaic(cells, int(np.ceil(number**0.5)), gap=3)
    shown = axis.imshow(mosaic, cmap=_SIGNED, vmin=-most, vmax=most, interpolation="nearest")
    of_all = f"{number} of {count} channels" if number < count else f"{count} channels"
    _finish(subfigure, axis, shown, f"channel filters, {of_all}")


def _finish(subfigure: Any, axis: Any, shown: Any, title: str) -> None:
    """Adds the title and the scale of colors."""
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=10)
    _hide_spines(axis)
    bar = subfigure.colorbar(shown, ax=axis, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if shown.get_alpha() is not None:
        bar.solids.set_alpha(1)


def _draw_constant(axis: Any, aspect: float) -> None:
    """Says that there is nothing to draw, in place of a map."""
    axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(0, 1))
    axis.set_aspect(aspect)
    axis.set_facecolor("#f2f2f2")
    _hide_spines(axis)
    axis.text(0.5, 0.5, "the same\neverywhere", ha="center", va="center", color="dimgray", fontsize=10)


def _hide_spines(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)


def _color_range(values: NDArray[Any]) -> tuple[float, float]:
    """Limits of a signed color map: around 0, or around the mean of values of one sign."""
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    center = 0.0 if low < 0 < high else float(values.mean())
    reach = max(high - center, center - low, 1e-6 * abs(center), 1e-12)
    return center - reach, center + reach


def _mosaic(tiles: NDArray[Any], columns: int, gap: int | None = None) -> NDArray[Any]:
    """Tiles (n, h, w, ...) in rows, with NaN in the gaps."""
    count, height, width = tiles.shape[:3]
    gap = max(1, round(max(height, width) * 0.04)) if gap is None else gap
    rows = -(-count // columns)
    size = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    mosaic = np.full((*size, *tiles.shape[3:]), np.nan)
    for index, tile in enumerate(tiles):
        y, x = (index // columns) * (height + gap), (index % columns) * (width + gap)
        mosaic[y : y + height, x : x + width] = tile
    return mosaic
