"""Tables 1 to 5 of the paper beside what this package gives: docs/paper_tables.md and two pictures.

    python benchmarks/paper_tables.py                        # minutes: times the operator on this machine
    python benchmarks/paper_tables.py --latency op.json      # times from `ddf-convert bench op --json op.json`

Models are counted on the meta device: nothing is downloaded. Table 2 is measured on the GPU if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from common.markdown import paragraph, table
from common.results import png, script_parser
from paper_values import IMAGE, TABLE_2, TABLE_3, TABLE_4, TABLE_5, PaperRow
from torch import nn

from ddf_convert import Cost, measure
from ddf_convert.artifacts.atomic import write_file
from ddf_convert.bench import op
from ddf_convert.bench import plot as bench_plot
from ddf_convert.bench.op import DENSE, DEPTHWISE, MODULE, OP, UNFOLD
from ddf_convert.layers import DDF2d
from ddf_convert.utils.device import choose, describe_short
from ddf_convert.utils.figures import new_figure

DOCS = Path(__file__).parent.parent / "docs"
SIZES = [(14, 64, 3, 0.25), (14, 64, 5, 0.25), (56, 128, 5, 0.5), (56, 256, 3, 0.25)]  # of table 1; the last is shown
COLUMNS = (DENSE, DEPTHWISE, MODULE, OP)  # in the order of table 2
# In the plot of memory, as in those of ``bench``: ours in warm colors, the baselines in cool ones.
COLORS = {OP: "#d62728", MODULE: "#ff7f0e", DENSE: "#1f77b4", DEPTHWISE: "#17becf", UNFOLD: "#7f7f7f"}


def main(arguments: list[str] | None = None) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--latency", type=Path, metavar="FILE", help="what bench op measured; else it is measured now")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each time, at least")
    parser.add_argument("--output", type=Path, default=DOCS, metavar="DIR")
    options = parser.parse_args(arguments)

    for sizes in SIZES:
        for formula in table_1(*sizes):
            formula.check()
    latency = json.loads(options.latency.read_text()) if options.latency else _latency(options.device, options.seconds)
    options.output.mkdir(parents=True, exist_ok=True)
    write_file(options.output / "paper_latency.png", bench_plot.png(latency))
    write_file(options.output / "paper_memory.png", memory_png(latency))
    write_file(options.output / "paper_tables.md", "\n".join([*page(latency), ""]))
    print(f"written: {options.output / 'paper_tables.md'}")


def _latency(device: str | None, seconds: float) -> dict[str, Any]:
    where = choose(device)
    settings = op.OpSettings(
        resolutions=tuple(TABLE_2),
        channels=256,
        batch=op.BATCH[where.type],
        kernel_size=3,
        dtype="float32",
        layouts=("contiguous",),
        device=where,
        seconds=seconds,
        compiled=False,
    )
    return op.run(settings, lambda words: print(words, flush=True))


# --- what is counted ---


def cost_of(row: PaperRow) -> Cost | None:
    """Returns parameters and MACs of a row's model at 224x224; None if there is nothing to build."""
    if row.build is None:
        return None
    with torch.device("meta"):
        model = row.build()
    return measure(model.eval(), IMAGE)


@dataclass(frozen=True)
class Formula:
    """A filter of table 1, at one size.

    Attributes:
        name: The filter.
        params: The paper's formula for parameters.
        macs: The sum behind the paper's O().
        generated: The formula for elements of the filters that are generated for one image: the paper's space.
        expected: (parameters, MACs, generated elements) by these formulas.
        counted: The same, counted by torch.
        left_out: Number of parameters that the paper's formula leaves out.
    """

    name: str
    params: str
    macs: str
    generated: str
    expected: tuple[int, int, int]
    counted: tuple[int, int, int]
    left_out: int = 0

    def check(self) -> None:
        """Raises a RuntimeError unless torch counts what the formulas give."""
        found = (self.counted[0] - self.left_out, *self.counted[1:])
        if found != self.expected:
            raise RuntimeError(f"table 1, {self.name}: the formulas give {self.expected}, torch counts {found}")


def table_1(size: int, c: int, k: int, sigma: float) -> list[Formula]:
    """Returns table 1 for a map of size x size (n is its square), c channels, k x k filters and DDF's squeeze sigma."""
    n, squeezed = size * size, round(sigma * c)
    image = torch.empty(1, c, size, size, device="meta")

    def counted(module: nn.Module) -> tuple[int, int]:
        cost = measure(module, image)
        return cost.params, cost.macs

    with torch.device("meta"):
        dense = counted(nn.Conv2d(c, c, k, padding=k // 2, bias=False))
        depthwise = counted(nn.Conv2d(c, c, k, padding=k // 2, groups=c, bias=False))
        # A filter for every pixel, generated by a 1x1 convolution: c inputs, c*c*k*k outputs.
        generator = nn.Conv2d(c, c * c * k * k, 1, bias=False)
        dynamic = counted(generator)
        ddf = DDF2d(c, k, se_ratio=sigma)
        decoupled = counted(ddf)
        filters = (generator(image).numel(), ddf.spatial_branch(image).numel() + ddf.channel_branch(image).numel())
    branches = n * c * k**2 + squeezed * c * (1 + k**2)
    return [
        Formula("Conv", "c²k²", "nc²k²", "-", (c**2 * k**2, n * c**2 * k**2, 0), (*dense, 0)),
        Formula("DwConv", "ck²", "nck²", "-", (c * k**2, n * c * k**2, 0), (*depthwise, 0)),
        Formula(
            "DyFilter",
            "c³k²",
            "nc³k² + nc²k²",
            "nc²k²",
            (c**3 * k**2, n * c**3 * k**2 + n * c**2 * k**2, n * c**2 * k**2),
            (dynamic[0], dynamic[1] + filters[0], filters[0]),  # each element is multiplied once more, with a pixel
        ),
        Formula(
            "DDF",
            "ck² + sigma c²(1 + k²)",
            "2nck² + sigma c²(1 + k²)",
            "(n + c)k²",
            (c * k**2 + squeezed * c * (1 + k**2), n * c * k**2 + branches, (n + c) * k**2),
            (*decoupled, filters[1]),
            k**2 + squeezed + 2 * c * k**2,  # biases and FilterNorm's scale
        ),
    ]


# --- the page ---


def page(latency: dict[str, Any]) -> Iterator[str]:
    """Yields the page; ``latency`` is what ``bench op`` measured."""
    yield "# The paper's tables"
    yield ""
    yield from paragraph(
        "Tables 1 to 5 of [Zhou et al., CVPR 2021](https://arxiv.org/abs/2104.14107), beside what this package gives."
        " **paper**: quoted from there; all accuracies are (top-1 on ImageNet, in percent): nothing was trained on"
        " ImageNet here. **counted**: parameters and multiply-accumulates (MACs, the paper's FLOPs) of models built"
        " here, for one 224x224 image. **measured**: times and memory on the machine that is named with them."
    )
    versions = f"torch {torch.__version__.split('+')[0]} and timm {timm.__version__}"
    yield from paragraph(f"Written by `python benchmarks/paper_tables.py` with {versions}.")
    yield from _table_1_lines()
    yield from _table_2_lines(latency)
    yield "## Table 3: the branches, in ResNet-50"
    yield ""
    yield from paragraph(
        "`--filter spatial`, `--filter channel` and `--filter ddf` of `ddf-convert convert resnet50`; the paper prints"
        " no costs here."
    )
    yield from table(
        ("filter", "params, counted", "MACs, counted", "top-1 / top-5, paper"),
        [(row.name, *counts(row), row.top1) for row in TABLE_3],
    )
    yield "## Table 4: filters"
    yield ""
    yield from paragraph(
        "The baselines are [filters of the same rewriter](filters.md): the sixteen 3x3 convolutions of ResNet-50 are"
        " replaced."
    )
    yield from _cost_table(TABLE_4, "conv type")
    yield "## Table 5: variants of ResNets"
    yield ""
    yield "In brackets: retrained by the paper's authors."
    yield ""
    yield from _cost_table(TABLE_5, "network")


def _table_1_lines() -> Iterator[str]:
    size, channels, kernel, sigma = SIZES[-1]
    yield "## Table 1: theoretical cost"
    yield ""
    yield from paragraph(
        "n pixels, c channels, k x k filters, sigma the squeeze of DDF's channel branch. The formulas are the paper's;"
        f" where it has O(), the sum behind it. The numbers are of n = {size}², c = {channels}, k = {kernel}, sigma ="
        f" {sigma}; the script stops unless torch counts exactly what the formulas give, for k of 3 and 5 and two"
        " widths. DDF has a few parameters more than the paper's formula, which leaves out biases and FilterNorm's"
        " learned scale (k² + sigma c + 2ck²)."
    )
    rows = []
    for formula in table_1(*SIZES[-1]):
        params, macs, generated = (f"{count:,}" for count in formula.counted)
        if formula.left_out:
            params += f" ({formula.left_out:,} beside it)"
        rows.append((formula.name, formula.params, params, formula.macs, macs, formula.generated, generated))
    yield from table(
        ("filter", "params, paper", "counted", "MACs", "counted", "generated elements, paper", "counted"), rows
    )


def _table_2_lines(latency: dict[str, Any]) -> Iterator[str]:
    layout, results = next(iter(latency["results"].items()))
    batches = latency["batches"]
    images = sorted({int(batches[str(size)]) for size in TABLE_2}, reverse=True)
    yield "## Table 2: latency"
    yield ""
    yield from paragraph(
        "Milliseconds of a forward pass, 256 channels, 3x3, float32. **paper**: an RTX 2080 Ti, 32 images."
        f" **measured**: {describe_short(latency['machine'])}, {layout}, {' or '.join(map(str, images))} images at a"
        " time (`ddf-convert bench op`). Compare columns, and not the two machines."
    )
    rows = []
    for size, quoted in TABLE_2.items():
        measured = [results[str(size)][column]["forward_ms"] for column in COLUMNS]
        pairs = [f"{paper:.2f} / {ms:.3g}" for paper, ms in zip(quoted, measured, strict=True)]
        ratios = f"{quoted[-1] / quoted[0]:.2f} / {measured[-1] / measured[0]:.2f}"
        rows.append((f"{size}x{size}", batches[str(size)], *pairs, ratios))
    names = (*COLUMNS, f"{OP} / {DENSE}")
    yield from table(("resolution", "images here", *(f"{name}: paper / measured" for name in names)), rows)
    yield "![Latency by resolution](paper_latency.png)"
    yield ""
    yield from paragraph(
        "The paper's figure of memory, drawn from what was measured here: the peak of a forward and a backward pass"
        " beyond what it began with. `unfold` stores a window of the input for every pixel, as dynamic filters usually"
        " do."
    )
    yield "![Memory by resolution](paper_memory.png)"
    yield ""


def _cost_table(rows: Sequence[PaperRow], what: str) -> Iterator[str]:
    body = []
    for row in rows:
        params, macs = counts(row)
        printed = [f"{number} {unit}" if number else "-" for number, unit in ((row.params, "M"), (row.macs, "G"))]
        body.append((row.group, row.name, printed[0], params, printed[1], macs, row.top1 or "-", row.note))
    yield from table(("", what, "params, paper", "counted", "MACs, paper", "counted", "top-1, paper", "note"), body)


def counts(row: PaperRow) -> tuple[str, str]:
    """Returns parameters and MACs of a row's model as the page shows them."""
    cost = cost_of(row)
    return ("-", "-") if cost is None else (f"{cost.params / 1e6:.2f} M", f"{cost.macs / 1e9:.2f} G")


def memory_png(latency: dict[str, Any]) -> bytes:
    """Draws the peak memory of a forward and a backward pass for each image, by the size of the map."""
    _, results = next(iter(latency["results"].items()))
    figure = new_figure(7, 4.2)
    axis = figure.subplots()
    for name, color in COLORS.items():
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
    return png(figure, dpi=150)


if __name__ == "__main__":
    main()
