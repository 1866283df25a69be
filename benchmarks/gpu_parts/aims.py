"""The aims of the issue, each with what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ddf_convert.bench.op import COMPILED, DENSE, DEPTHWISE, MODULE, OP, TF32
from gpu_parts.run import Run

ALL = (7, 14, 28, 56, 112, 224)
LARGE = (56, 112, 224)
LAYOUTS = ("contiguous", "channels_last")
FORWARD, BOTH = "forward_ms", "forward_backward_ms"
IN_WORDS = {FORWARD: "forward", BOTH: "forward + backward"}
HOST_US = 15.0

Value = Callable[[int], float | None]


def aims(run: Run, record: dict[str, Any], parts: dict[str, Any]) -> None:
    """Fills in the list; an aim is met where it holds at every size, and unknown where a size was not measured."""
    found = _Found(parts)
    record["list"] = [_judged(*aim) for aim in _aims(found)]
    host = parts.get("op", {}).get("host") or {}
    beyond = host["ddf"] - host["empty_op"] if host.get("ddf") is not None else None
    record["list"].append(
        {
            "aim": f"host time of a call at most {HOST_US:g} us beyond an empty operator",
            "where": "float32",
            "values": {"us": beyond},
            "met": None if beyond is None else beyond <= HOST_US,
        }
    )
    if run.dry:  # tiny maps on another device
        for aim in record["list"]:
            aim["met"] = None


class _Found:
    """Figures by dtype, layout, size and column, None where there is none."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self._tables = [parts.get(name, {}).get("tables", {}) for name in ("op", "compiled")]

    def __call__(self, dtype: str, layout: str, size: int, column: str, key: str) -> float | None:
        for tables in self._tables:
            value = tables.get(dtype, {}).get(layout, {}).get(str(size), {}).get(column, {}).get(key)
            if value is not None:
                return float(value)
        return None

    def ratio(self, over: tuple[str, str, int, str, str], under: tuple[str, str, int, str, str]) -> float | None:
        one, other = self(*over), self(*under)
        return one / other if one is not None and other else None


Aim = tuple[str, str, tuple[int, ...], Value, Callable[[float], bool]]


def _aims(found: _Found) -> Iterator[Aim]:
    """Each aim in words, where, at which sizes, what is measured, and what it should be."""
    for dtype in ("float32", "bfloat16"):
        for layout in LAYOUTS:
            where = f"{dtype}, {layout}"

            def share(size: int, dtype: str = dtype, layout: str = layout) -> float | None:
                return found(dtype, layout, size, OP, "forward_of_copy")

            yield "forward at 80 % of a copy's bandwidth or more", where, LARGE, share, lambda value: value >= 0.8

            for key in (FORWARD, BOTH):

                def depthwise(size: int, dtype: str = dtype, layout: str = layout, key: str = key) -> float | None:
                    return found.ratio((dtype, layout, size, DEPTHWISE, key), (dtype, layout, size, OP, key))

                words = f"no slower than the depthwise conv, {IN_WORDS[key]} (times faster)"
                yield words, where, ALL, depthwise, lambda value: value >= 1

            def reference(size: int, dtype: str = dtype, layout: str = layout) -> float | None:
                return found.ratio((dtype, layout, size, COMPILED, BOTH), (dtype, layout, size, OP, BOTH))

            words = "forward + backward 2 times faster than the compiled reference (times faster)"
            yield words, where, ALL, reference, lambda value: value >= 2

            for ending in ("", TF32) if dtype == "float32" else ("",):
                for key in (FORWARD, BOTH):

                    def dense(
                        size: int, dtype: str = dtype, layout: str = layout, key: str = key, ending: str = ending
                    ) -> float | None:
                        over = (dtype, layout, size, DENSE + ending, key)
                        return found.ratio(over, (dtype, layout, size, MODULE + ending, key))

                    words = f"module no slower than the dense conv, {IN_WORDS[key]} (times faster)"
                    yield words, f"{where},{ending}" if ending else where, ALL, dense, lambda value: value >= 1

    for dtype in ("bfloat16", "float16"):
        for layout in LAYOUTS:

            def half(size: int, dtype: str = dtype, layout: str = layout) -> float | None:
                return found.ratio(("float32", layout, size, OP, FORWARD), (dtype, layout, size, OP, FORWARD))

            words = "half types 1.7 times faster than float32, forward (times faster)"
            yield words, f"{dtype}, {layout}", LARGE, half, lambda value: value >= 1.7


def _judged(words: str, where: str, sizes: tuple[int, ...], value: Value, enough: Callable[[float], bool]) -> Any:
    values = {str(size): value(size) for size in sizes}
    known = [one for one in values.values() if one is not None]
    met: bool | None = all(enough(one) for one in known)
    if met and len(known) < len(sizes):
        met = None
    return {"aim": words, "where": where, "values": values, "met": met}
