"""The results of a benchmark as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddf_convert.bench.op import COMPILED, DENSE, DEPTHWISE, MODULE, OP, SLICES, TF32, UNFOLD
from ddf_convert.bench.up import BILINEAR, SEPARATE, TRANSPOSED, UP
from ddf_convert.errors import UsageError
from ddf_convert.utils.device import describe_short
from ddf_convert.utils.figures import encode_figure, new_figure, require_matplotlib

# Ours in warm colors, what they are compared with in cool ones; the same column looks the same in every plot.
_COLORS = {
    OP: "#d62728",
    MODULE: "#ff7f0e",
    DENSE: "#1f77b4",
    DEPTHWISE: "#17becf",
    UNFOLD: "#7f7f7f",
    SLICES: "#9467bd",
    COMPILED: "#c5b0d5",
    UP: "#d62728",
    SEPARATE: "#ff7f0e",
    BILINEAR: "#17becf",
    TRANSPOSED: "#1f77b4",
}
_BEFORE, _AFTER = "#1f77b4", "#d62728"
_DPI = 150


def check_plot(file: Path) -> None:
    """Checks that a plot can be drawn.

    Raises:
        UsageError: matplotlib is missing, or the name is not that of a PNG.
    """
    if file.suffix.lower() != ".png":
        raise UsageError(f"--plot {file}: plots are PNG; give a name that ends in .png")
    require_matplotlib("--plot")


def png(document: dict[str, Any]) -> bytes:
    """Returns the result of a ``run`` of this package as the content of a PNG file."""
    draw = {"op": _op, "layer": _layer, "model": _model, "up": _op}[document["bench"]]
    return encode_figure(draw(document), dpi=_DPI)


def _op(document: dict[str, Any]) -> Any:
    """Times by size, a row of axes for each layout; both scales are logarithmic."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    results = document["results"]
    titles = (("forward", "forward_ms"), ("forward + backward", "forward_backward_ms"))
    figure = new_figure(11, 1 + 4 * len(results))
    axes = figure.subplots(len(results), 2, squeeze=False, sharex=True)
    for row, (layout, rows) in zip(axes, results.items(), strict=True):
        for axis, (title, key) in zip(row, titles, strict=True):
            for name in dict.fromkeys(name for columns in rows.values() for name in columns):
                points = [(int(size), columns.get(name, {}).get(key)) for size, columns in rows.items()]
                points = sorted((size, value) for size, value in points if value is not None)
                style = "--" if name.endswith(TF32) else "-"
                width = 2.5 if name in (OP, UP) else 1.3
                color = _COLORS[name.removesuffix(TF32)]
                if points:
                    axis.plot(*zip(*points, strict=True), style, marker="o", ms=4, lw=width, color=color, label=name)
            axis.set(xscale="log", yscale="log", title=f"{layout}: {title}")
            sizes = [int(size) for size in rows]
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.grid(True, alpha=0.3)
        row[0].set_ylabel("milliseconds")
    for axis in axes[-1]:
        axis.set_xlabel("rows and columns of the map")
    axes[0][1].legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    kernel = document["kernel_size"]
    _add_heading(figure, document, f"{document['dtype']}, {document['channels']} channels, {kernel}x{kernel}")
    return figure


def _layer(document: dict[str, Any]) -> Any:
    settings, results = document["settings"], document["results"]
    names = list(results)
    panels = [("forward, ms", "forward_ms"), ("forward + backward, ms", "forward_backward_ms")]
    if all(row["peak_mib"] is not None for row in results.values()):
        panels.append(("peak memory, MiB", "peak_mib"))
    figure = new_figure(3.4 * len(panels), 4)
    for axis, (title, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        colors = [_BEFORE, *[_AFTER] * (len(names) - 1)]
        _bars(axis, title, names, [results[name][key] for name in names], colors)
    size, kernel = settings["size"], settings["kernel_size"]
    words = f"{settings['channels']} channels, {size}x{size}, {kernel}x{kernel}, {settings['batch']} images"
    _add_heading(figure, document, f"{words}, {settings['dtype']}, {settings['layout']}")
    return figure


def _model(document: dict[str, Any]) -> Any:
    settings, results = document["settings"], document["results"]
    figure = new_figure(7, 4)
    panels = (("inference, images/s", "inference_images_per_s"), ("training, images/s", "training_images_per_s"))
    for axis, (title, key) in zip(figure.subplots(1, 2), panels, strict=True):
        _bars(axis, title, list(results), [row[key] for row in results.values()], [_BEFORE, _AFTER])
    _add_heading(
        figure, document, f"{document['model']}, {settings['batch']} images, {settings['dtype']}, {settings['layout']}"
    )
    return figure


def _bars(axis: Any, title: str, names: list[str], values: list[float], colors: list[str]) -> None:
    bars = axis.bar(names, values, color=colors, width=0.6)
    axis.bar_label(bars, fmt="%.3g", padding=2)
    axis.margins(y=0.12)
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)


def _add_heading(figure: Any, document: dict[str, Any], words: str) -> None:
    figure.suptitle(f"{words}\n{describe_short(document['machine'])}", fontsize=10)
