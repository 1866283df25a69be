"""The report of ``gpu_check.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.markdown import table

from ddf_convert.bench.op import OP
from ddf_convert.bench.tables import percent
from ddf_convert.report.units import figure
from gpu.run import problems

MET = {True: "yes", False: "**no**", None: "not measured"}


def page(report: dict[str, Any]) -> str:
    """Returns everything that has been measured so far."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    parts = report["parts"]
    machine = parts.get("machine", {})
    yield f"# gpu_check: {report['device']}"
    yield ""
    if report["dry_run"]:
        yield "A dry run on the CPU with tiny sizes: it shows that the script works, and no figure means anything."
        yield ""
    if machine.get("kernels_in_use") is False:
        yield "**The CUDA kernels are not in use: CUDA tensors take the PyTorch reference.**"
        yield ""
    described = machine.get("machine", {})
    yield ", ".join(f"{name} {value}" for name, value in described.items())
    yield ""
    yield from table(
        ("part", "outcome", "seconds", "left out"),
        [(name, _outcome(part), f"{part['seconds']:.0f}", _left_out(part)) for name, part in parts.items()],
    )
    for name, part in parts.items():
        for failure in problems(part):
            yield f"- {name}: {failure}"
    yield ""
    if "targets" in parts:
        yield from _targets(parts["targets"])
    if "op" in parts:
        yield from _op(parts)
    if "up" in parts:
        yield from _up(parts["up"])
    if "model" in parts:
        yield from _model(parts["model"])
    if "correctness" in parts:
        yield from _correctness(parts["correctness"])
    for name in ("determinism", "large", "sanitizer"):
        if checks := parts.get(name, {}).get("checks"):
            yield f"## {name}"
            yield ""
            yield from table(
                ("check", "right"), [(what, "yes" if right else "**no**") for what, right in checks.items()]
            )


def _outcome(part: dict[str, Any]) -> str:
    return part["status"] if part["status"] != "failed" else f"**failed** ({part.get('failed', 1)})"


def _left_out(part: dict[str, Any]) -> str:
    dropped = [f"no time left: {part['dropped']}"] if "dropped" in part else []
    return "; ".join(dropped + part.get("skipped", []))


def _targets(part: dict[str, Any]) -> Iterator[str]:
    yield "## Targets"
    yield ""
    rows = []
    for target in part.get("list", []):
        share = "bandwidth" in target["target"]
        values = [f"{at}: {percent(value) if share else figure(value)}" for at, value in target["values"].items()]
        rows.append((target["target"], target["where"], ", ".join(values), MET[target["met"]]))
    yield from table(("target", "where", "measured", "met"), rows)


def _op(parts: dict[str, Any]) -> Iterator[str]:
    part = parts["op"]
    yield "## Operator"
    yield ""
    if "copy_gb_per_s" in part:
        host = ", ".join(f"{name} {figure(value)}" for name, value in part["host"].items())
        yield f"A copy reaches {part['copy_gb_per_s']:.0f} GB/s. Host time of one call, us: {host}."
        yield "Times are medians in ms; memory is the peak of forward + backward. The last row of times is the bytes"
        yield "that the operator must move, over its time, as a share of the copy."
        yield ""
    for dtype, layouts in part.get("tables", {}).items():
        for layout, rows in layouts.items():
            more = parts.get("compiled", {}).get("tables", {}).get(dtype, {}).get(layout, {})
            merged = {size: {**rows[size], **more.get(size, {})} for size in sorted(rows, key=int)}
            yield from _tables_by_size(f"{dtype}, {layout}", merged, shares=True)


def _up(part: dict[str, Any]) -> Iterator[str]:
    yield "## DDF-Up, 2x"
    yield ""
    for dtype, layouts in part.get("tables", {}).items():
        for layout, rows in layouts.items():
            yield from _tables_by_size(
                f"{dtype}, {layout}", {size: rows[size] for size in sorted(rows, key=int)}, shares=False
            )


def _tables_by_size(heading: str, rows: dict[str, dict[str, Any]], shares: bool) -> Iterator[str]:
    """Yields tables of times and memory, a column for each size; ``shares`` adds the operator's share of a copy."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    for title, key in (
        ("forward, ms", "forward_ms"),
        ("forward + backward, ms", "forward_backward_ms"),
        ("peak memory, MiB", "peak_mib"),
    ):
        yield f"### {heading}: {title}"
        yield ""
        body = [(name, *(_cell(row.get(name, {}), key) for row in rows.values())) for name in names]
        if shares and key != "peak_mib":
            share = key.replace("_ms", "_of_copy")
            body.append((f"{OP}, share of the copy", *(percent(row.get(OP, {}).get(share)) for row in rows.values())))
        yield from table(("", *rows), body)


def _cell(found: dict[str, Any], key: str) -> str:
    return found["error"] if "error" in found else figure(found.get(key))


def _model(part: dict[str, Any]) -> Iterator[str]:
    yield "## Models, channels_last"
    yield ""
    keys = ("inference_images_per_s", "training_images_per_s", "training_mib")
    rows = [
        (name, precision, str(row["batch"]), *(figure(row[key]) for key in keys))
        for precision, models in part.get("results", {}).items()
        for name, row in models.items()
    ]
    yield from table(("model", "dtype", "images", "inference, images/s", "training, images/s", "training, MiB"), rows)


def _correctness(part: dict[str, Any]) -> Iterator[str]:
    yield "## Largest errors against float64"
    yield ""
    yield "Over the sum of the absolute values of an element's terms; of DDF2d, over the largest value of the tensor."
    yield '"Before rounding" leaves out what rounding the result to its half type accounts for.'
    yield ""
    for name, tolerances in part.get("tolerances", {}).items():
        yield f"Tolerated, {name}: {', '.join(f'{dtype} {value:.1e}' for dtype, value in tolerances.items())}."
        yield ""
    worst = part.get("worst", {})
    kernels, kinds = (list(dict.fromkeys(key.split(": ")[place] for key in worst)) for place in (0, 1))
    rows = [
        (kernel, *(f"{entry['error']:.1e}" if (entry := worst.get(f"{kernel}: {kind}")) else "-" for kind in kinds))
        for kernel in kernels
    ]
    yield from table(("", *kinds), rows)
    yield f"{sum(entry['cases'] for entry in worst.values())} comparisons."
    yield ""
