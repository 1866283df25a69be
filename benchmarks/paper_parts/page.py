"""The page: the paper's tables, each figure beside what was counted or measured here."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from ddf_convert.bench.op import DENSE, DEPTHWISE, MODULE, OP
from ddf_convert.utils.device import describe_short
from paper_parts.counted import Formula, cost_of
from paper_parts.quoted import TABLE_2, TABLE_3, TABLE_4, TABLE_5, Row

COLUMNS = (DENSE, DEPTHWISE, MODULE, OP)  # in the order of table 2
COMMAND = "python benchmarks/paper_tables.py"
_MILLION, _BILLION = 1e6, 1e9


def page(formulas: Sequence[Formula], setting: str, latency: dict[str, Any], versions: str) -> str:
    """Everything as Markdown.

    Args:
        formulas: Table 1.
        setting: What its letters stand for, in words.
        latency: What ``bench op`` found.
        versions: Of the libraries that models come from.
    """
    return "\n".join(_page(formulas, setting, latency, versions)) + "\n"


def _page(formulas: Sequence[Formula], setting: str, latency: dict[str, Any], versions: str) -> Iterator[str]:
    yield "# The paper's tables"
    yield ""
    yield from _prose(
        "Tables 1 to 5 of [Zhou et al., CVPR 2021](https://arxiv.org/abs/2104.14107), beside what this "
        "package gives. "
        "**paper**: quoted from there; all accuracies are (top-1 on ImageNet, in percent): nothing was "
        "trained on ImageNet "
        "here. **counted**: parameters and multiply-accumulates (MACs, the paper's FLOPs) of models built "
        "here, for one "
        "224x224 image. **measured**: times and memory on the machine that is named with them."
    )
    yield ""
    yield from _prose(f"Written by `{COMMAND}` with {versions}.")
    yield ""
    yield from _table_1(formulas, setting)
    yield from _table_2(latency)
    yield "## Table 3: the branches, in ResNet-50"
    yield ""
    yield from _prose(
        "`--filter spatial`, `--filter channel` and `--filter ddf` of `ddf-convert convert resnet50`; the "
        "paper prints no "
        "costs here."
    )
    yield ""
    yield from _markdown(
        ("filter", "params, counted", "MACs, counted", "top-1 / top-5, paper"),
        [(row.name, *_counts(row), row.top1) for row in TABLE_3],
    )
    yield "## Table 4: filters"
    yield ""
    yield from _prose(
        "The rivals are [filters of the same rewriter](filters.md): the sixteen 3x3 convolutions of "
        "ResNet-50 are replaced."
    )
    yield ""
    yield from _costs(TABLE_4, "conv type")
    yield "## Table 5: variants of ResNets"
    yield ""
    yield "In brackets: retrained by the paper's authors."
    yield ""
    yield from _costs(TABLE_5, "network")


def _table_1(formulas: Sequence[Formula], setting: str) -> Iterator[str]:
    yield "## Table 1: theoretical cost"
    yield ""
    yield from _prose(
        "n pixels, c channels, k x k filters, sigma the squeeze of DDF's channel branch. The formulas are "
        "the paper's; where "
        f"it has O(), the sum behind it. The numbers are of {setting}; the script stops unless torch counts "
        "exactly what the "
        "formulas give, for k of 3 and 5 and two widths. DDF has a few parameters more than the paper's "
        "formula, which "
        "leaves out biases and FilterNorm's learned scale (k² + sigma c + 2ck²)."
    )
    yield ""
    yield from _markdown(
        ("filter", "params, paper", "counted", "MACs", "counted", "generated elements, paper", "counted"),
        [
            (
                each.name,
                each.params,
                f"{each.counted[0]:,}" + (f" ({each.beside[1]:,} beside it)" if each.beside[1] else ""),
                each.macs,
                f"{each.counted[1]:,}",
                each.generated,
                f"{each.counted[2]:,}",
            )
            for each in formulas
        ],
    )


def _table_2(latency: dict[str, Any]) -> Iterator[str]:
    layout, results = next(iter(latency["results"].items()))
    batches = latency["batches"]
    images = sorted({int(batches[str(size)]) for size in TABLE_2}, reverse=True)
    yield "## Table 2: latency"
    yield ""
    yield from _prose(
        "Milliseconds of a forward pass, 256 channels, 3x3, float32. **paper**: an RTX 2080 Ti, 32 images. "
        "**measured**: "
        f"{describe_short(latency['machine'])}, {layout}, {' or '.join(map(str, images))} images at a time "
        "(`ddf-convert bench op`). "
        "Compare columns, and not the two machines."
    )
    yield ""
    yield from _markdown(
        ("resolution", "images here", *(f"{name}: paper / measured" for name in (*COLUMNS, f"{OP} / {DENSE}"))),
        [
            (
                f"{size}x{size}",
                batches[str(size)],
                *(
                    f"{told:.2f} / {results[str(size)][column]['forward_ms']:.3g}"
                    for told, column in zip(quoted, COLUMNS, strict=True)
                ),
                f"{quoted[-1] / quoted[0]:.2f} / {_ratio(results[str(size)]):.2f}",
            )
            for size, quoted in TABLE_2.items()
        ],
    )
    yield "![Latency by resolution](paper_latency.png)"
    yield ""
    yield from _prose(
        "The paper's figure of memory, drawn from what was measured here: the peak of a forward and a "
        "backward pass beyond "
        "what it began with. `unfold` stores a window of the input for every pixel, as dynamic filters "
        "usually do."
    )
    yield ""
    yield "![Memory by resolution](paper_memory.png)"
    yield ""


def _ratio(row: dict[str, Any]) -> float:
    """The operator's time over the dense convolution's."""
    return float(row[OP]["forward_ms"] / row[DENSE]["forward_ms"])


def _costs(rows: Sequence[Row], what: str) -> Iterator[str]:
    yield from _markdown(
        ("", what, "params, paper", "counted", "MACs, paper", "counted", "top-1, paper", "note"),
        [
            (
                row.group,
                row.name,
                _printed(row.params, "M"),
                params,
                _printed(row.macs, "G"),
                macs,
                row.top1 or "-",
                row.note,
            )
            for row in rows
            for params, macs in [_counts(row)]
        ],
    )


def _prose(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)


def _counts(row: Row) -> tuple[str, str]:
    cost = cost_of(row)
    return ("-", "-") if cost is None else (f"{cost.params / _MILLION:.2f} M", f"{cost.macs / _BILLION:.2f} G")


def _printed(figure: str, unit: str) -> str:
    return f"{figure} {unit}" if figure else "-"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    yield f"|{'---|' * len(headings)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""
