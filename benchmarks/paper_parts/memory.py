"""The paper's figure of memory, from what ``bench op`` measured."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from ddf_convert.bench.op import DENSE, DEPTHWISE, MODULE, OP, UNFOLD
from ddf_convert.utils.device import describe_short

# As in the plots of ``bench``: ours in warm colors, what they are compared with in cool ones.
_COLUMNS = {OP: "#d62728", MODULE: "#ff7f0e", DENSE: "#1f77b4", DEPTHWISE: "#17becf", UNFOLD: "#7f7f7f"}


def memory_png(latency: dict[str, Any]) -> bytes:
    """Peak memory of a forward and a backward pass, in MiB for each image, by the size of the map; a PNG."""
    _, results = next(iter(latency["results"].items()))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, color in _COLUMNS.items():
        points = [
            (int(size), row[name]["peak_mib"] / latency["batches"][size])
            for size, row in results.items()
            if row.get(name, {}).get("peak_mib")
        ]
        if points:
            axis.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                ms=4,
                lw=2 if name == OP else 1.3,
                color=color,
                label=name,
            )
    sizes = [int(size) for size in results]
    axis.set(xscale="log", yscale="log", xlabel="rows and columns of the map", ylabel="MiB for each image")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.grid(True, alpha=0.3)
    axis.legend()
    axis.set_title(f"forward + backward, 256 channels, 3x3, float32\n{describe_short(latency['machine'])}", fontsize=10)
    contents = io.BytesIO()
    figure.savefig(contents, format="png", dpi=150)
    return contents.getvalue()
