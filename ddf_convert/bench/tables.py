"""The results of benchmarks and of doctor as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from ddf_convert.bench.doctor import Check, State
from ddf_convert.bench.measure import Figures
from ddf_convert.bench.op import DENSE, DEPTHWISE, MODULE, OP
from ddf_convert.bench.up import SEPARATE, UNFOLDED, UP
from ddf_convert.report import units
from ddf_convert.report.tables import new_table, numeric_column, table_heading
from ddf_convert.report.units import figure
from ddf_convert.utils.device import describe_short

_TIMES = (("forward, ms", "forward_ms"), ("forward + backward, ms", "forward_backward_ms"))


def tables(document: dict[str, Any]) -> RenderableType:
    """Returns the result of a ``run`` of this package as tables."""
    render = {"op": _op, "layer": _layer, "model": _model, "up": _up}[document["bench"]]
    return Group(Text(describe_short(document["machine"]), style="bold"), *render(document))


def percent(value: float | None) -> str:
    """Returns a share as text: ``0.83 -> "83 %"``."""
    return "-" if value is None else f"{100 * value:.0f} %"


def _op(document: dict[str, Any]) -> list[RenderableType]:
    kernel, images = document["kernel_size"], sorted(set(document["batches"].values()), reverse=True)
    parts: list[RenderableType] = [
        Text(
            f"{document['dtype']}, {document['channels']} channels, {kernel}x{kernel}, {_images(*images)};"
            f" a copy reaches {document['copy_gb_per_s']:.0f} GB/s"
        )
    ]
    for layout, rows in document["results"].items():
        for title, key in _TIMES:
            share = key.replace("_ms", "_of_copy")
            ratios = ((OP, DEPTHWISE), (MODULE, DENSE))
            parts += _by_size(f"{layout}: {title}", rows, key, document["batches"], share, ratios)
        parts += _by_size(f"{layout}: peak memory of forward + backward, MiB", rows, "peak_mib", document["batches"])
        if document["machine"]["device"] == "cuda":
            parts += _by_size(f"{layout}: the host's time of a forward call, us", rows, "host_us", {})
        parts += _gaps(layout, rows)
    share = "Share of the copy: the bytes that the operator must move, over its time, against the bandwidth of a copy."
    parts.append(Text(f"\n{share}", style="dim"))
    return parts


def _up(document: dict[str, Any]) -> list[RenderableType]:
    factor, kernel, images = document["scale_factor"], document["kernel_size"], set(document["batches"].values())
    words = f"{document['dtype']}, {document['channels']} channels, {factor}x larger, {kernel}x{kernel}"
    parts: list[RenderableType] = [Text(f"{words}, {_images(*images)}")]
    for layout, rows in document["results"].items():
        for title, key in (*_TIMES, ("peak memory of forward + backward, MiB", "peak_mib")):
            parts += _by_size(
                f"{layout}: {title}", rows, key, {}, ratios=[(UP, other) for other in (SEPARATE, UNFOLDED)]
            )
        parts += _gaps(layout, rows)
    apart = f"{SEPARATE}: the same layer with a call of the operator for each branch, then pixel shuffle."
    parts.append(Text(f"\n{apart}\n{UNFOLDED}: content-aware filters (CARAFE) on unfolded windows.", style="dim"))
    return parts


def _by_size(
    title: str,
    rows: dict[str, dict[str, Figures]],
    key: str,
    batches: dict[str, int],
    share: str | None = None,
    ratios: Sequence[tuple[str, str]] = (),
) -> list[RenderableType]:
    """A row for each implementation, a column for each size: there are fewer sizes."""
    table = new_table(Column("", no_wrap=True), *(numeric_column(f"{size}x{size}") for size in rows))
    if len(set(batches.values())) > 1:
        table.add_row("images", *(str(batches[size]) for size in rows), style="dim")
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for name in names:
        style = "bold" if name in (OP, UP) else ""
        table.add_row(name, *(figure(row.get(name, {}).get(key)) for row in rows.values()), style=style)
    table.add_section()
    for over, under in ratios:
        table.add_row(f"{over} / {under}", *(_ratio(row, over, under, key) for row in rows.values()))
    if share is not None:
        table.add_row("share of the copy", *(percent(row.get(OP, {}).get(share)) for row in rows.values()))
    return [table_heading(title), table]


def _ratio(row: dict[str, Figures], over: str, under: str, key: str) -> str:
    one, other = row.get(over, {}).get(key), row.get(under, {}).get(key)
    return f"{one / other:.2f}" if one and other else "-"


def _gaps(layout: str, rows: dict[str, dict[str, Figures]]) -> list[RenderableType]:
    """The reasons of missing figures."""
    return [
        Text(f"{name}, {layout}, {size}x{size}: {found['error']}", style="yellow")
        for size, row in rows.items()
        for name, found in row.items()
        if "error" in found
    ]


def _layer(document: dict[str, Any]) -> list[RenderableType]:
    settings, results = document["settings"], document["results"]
    size, kernel = settings["size"], settings["kernel_size"]
    more = [f"{name} {settings[name]}" for name in ("stride", "dilation", "heads") if settings[name] != 1]
    words = [
        f"{settings['channels']} channels, {size}x{size}, {kernel}x{kernel}",
        *more,
        _images(settings["batch"]),
        _precision(settings),
    ]
    table = new_table(Column("", no_wrap=True), *(numeric_column(name) for name in results))
    for title, key in _TIMES:
        table.add_row(title, *(figure(row[key]) for row in results.values()))
    table.add_row("peak memory, MiB", *(figure(row["peak_mib"]) for row in results.values()))
    if document["machine"]["device"] == "cuda":
        table.add_row("host, us", *(figure(row["host_us"]) for row in results.values()))
    table.add_row("parameters", *(units.short(row["parameters"]) for row in results.values()))
    table.add_row("MACs", *(units.short(row["macs"]) for row in results.values()))
    return [Text(", ".join(words)), table]


def _model(document: dict[str, Any]) -> list[RenderableType]:
    settings, results = document["settings"], document["results"]
    before, after = results.values()
    size = "x".join(map(str, settings["input_size"]))
    heading = Text(f"{document['model']}, {_images(settings['batch'])} of {size}, {_precision(settings)}")
    table = new_table(Column("", no_wrap=True), *map(numeric_column, results), numeric_column("after / before"))
    for title, key in (
        ("inference, images/s", "inference_images_per_s"),
        ("training, images/s", "training_images_per_s"),
        ("memory of inference, MiB", "inference_mib"),
        ("memory of training, MiB", "training_mib"),
    ):
        table.add_row(title, figure(before[key]), figure(after[key]), _ratio(results, "after", "before", key))
    for title, key in (("parameters", "parameters"), ("MACs of an image", "macs")):
        table.add_row(
            title,
            units.count(before[key]),
            units.count(after[key], before[key]),
            _ratio(results, "after", "before", key),
        )
    return [heading, table]


def _precision(settings: dict[str, Any]) -> str:
    tf32 = " (TF32 products)" if settings["tf32"] and settings["dtype"] == "float32" else ""
    return f"{settings['dtype']}{tf32}, {settings['layout']}"


def _images(most: int, *fewer: int) -> str:
    if fewer:
        return f"{fewer[-1]} to {most} images"
    return "1 image" if most == 1 else f"{most} images"


def checks_table(checks: Iterable[Check]) -> Table:
    """Returns the checks of doctor as a table."""
    table = new_table(Column("", no_wrap=True), Column("", style="bold", no_wrap=True), Column("", overflow="fold"))
    table.show_header = False
    signs = {State.OK: ("ok", "green"), State.NOTE: ("note", "yellow"), State.PROBLEM: ("PROBLEM", "bold red")}
    for check in checks:
        table.add_row(Text(*signs[check.state]), check.name, Text(check.detail))
    return table
