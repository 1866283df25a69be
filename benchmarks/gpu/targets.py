"""The targets of the CUDA kernels, each with what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ddf_convert.bench.measure import LAYOUTS
from ddf_convert.bench.op import COMPILED, DENSE, DEPTHWISE, MODULE, OP, TF32
from gpu.run import Run

ALL = (7, 14, 28, 56, 112, 224)
LARGE = (56, 112, 224)
FORWARD, BOTH = "forward_ms", "forward_backward_ms"
PASSES = {FORWARD: "forward", BOTH: "forward + backward"}
HOST_US = 15.0


class Figure(NamedTuple):
    """A figure of the parts "op" and "compiled", at any size of the map."""

    dtype: str
    layout: str
    column: str
    key: str


class Target(NamedTuple):
    """A figure, or the ratio of two, that should be ``least`` or more at every size."""

    words: str
    where: str
    sizes: tuple[int, ...]
    figure: Figure
    under: Figure | None
    least: float


def targets(run: Run, record: dict[str, Any]) -> None:
    """Fills in the list; a target that holds at every size is met, and unknown if a size was not measured."""
    record["list"] = [_judge(target, run.parts) for target in _targets()]
    host = run.parts.get("op", {}).get("host") or {}
    beyond = host["ddf"] - host["empty_op"] if host.get("ddf") is not None else None
    record["list"].append(
        {
            "target": f"host time of a call at most {HOST_US:g} us beyond an empty operator",
            "where": "float32",
            "values": {"us": beyond},
            "met": None if beyond is None else beyond <= HOST_US,
        }
    )
    if run.dry:  # tiny maps on another device
        for judged in record["list"]:
            judged["met"] = None


def _targets() -> Iterator[Target]:
    for dtype in ("float32", "bfloat16"):
        for layout in LAYOUTS:

            def of(column: str, key: str, dtype: str = dtype, layout: str = layout) -> Figure:
                return Figure(dtype, layout, column, key)

            where = f"{dtype}, {layout}"
            share = of(OP, "forward_of_copy")
            yield Target("forward at 80 % of a copy's bandwidth or more", where, LARGE, share, None, 0.8)
            for key, passes in PASSES.items():
                words = f"no slower than the depthwise conv, {passes} (times faster)"
                yield Target(words, where, ALL, of(DEPTHWISE, key), of(OP, key), 1)
            words = "forward + backward 2 times faster than the compiled reference (times faster)"
            yield Target(words, where, ALL, of(COMPILED, BOTH), of(OP, BOTH), 2)
            for ending in ("", TF32) if dtype == "float32" else ("",):
                for key, passes in PASSES.items():
                    words = f"module no slower than the dense conv, {passes} (times faster)"
                    at = f"{where},{ending}" if ending else where
                    yield Target(words, at, ALL, of(DENSE + ending, key), of(MODULE + ending, key), 1)
    for dtype in ("bfloat16", "float16"):
        for layout in LAYOUTS:
            words = "half types 1.7 times faster than float32, forward (times faster)"
            full, half = (Figure(each, layout, OP, FORWARD) for each in ("float32", dtype))
            yield Target(words, f"{dtype}, {layout}", LARGE, full, half, 1.7)


def _judge(target: Target, parts: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, float | None] = {}
    for size in target.sizes:
        value = _look_up(parts, target.figure, size)
        if target.under is not None:
            under = _look_up(parts, target.under, size)
            value = value / under if value is not None and under else None
        values[str(size)] = value
    known = [value for value in values.values() if value is not None]
    met: bool | None = all(value >= target.least for value in known)
    if met and len(known) < len(values):
        met = None
    return {"target": target.words, "where": target.where, "values": values, "met": met}


def _look_up(parts: dict[str, Any], figure: Figure, size: int) -> float | None:
    for part in ("op", "compiled"):
        rows = parts.get(part, {}).get("tables", {}).get(figure.dtype, {}).get(figure.layout, {})
        value = rows.get(str(size), {}).get(figure.column, {}).get(figure.key)
        if value is not None:
            return float(value)
    return None
