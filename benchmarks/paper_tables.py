"""Tables 1 to 5 of the paper beside what this package gives: docs/paper_tables.md and two pictures.

    python benchmarks/paper_tables.py                        # minutes: times the operator on this machine
    python benchmarks/paper_tables.py --latency op.json      # times from `ddf-convert bench op --json op.json`

Models are counted on the meta device: nothing is downloaded. Table 2 is measured on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch
from paper_parts.counted import table_1
from paper_parts.memory import memory_png
from paper_parts.page import page
from paper_parts.quoted import TABLE_2

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.bench import op
from ddf_convert.bench.plot import png
from ddf_convert.utils.device import choose

DOCS = Path(__file__).parent.parent / "docs"
SIZES = [(14, 64, 3, 0.25), (14, 64, 5, 0.25), (56, 128, 5, 0.5), (56, 256, 3, 0.25)]  # of table 1; the last is shown


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=Path, metavar="FILE", help="what bench op measured; else it is measured now")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; the GPU if there is one")
    parser.add_argument("--seconds", type=float, default=0.5, help="to spend on each time, at least")
    parser.add_argument("--output", type=Path, default=DOCS, metavar="DIR")
    args = parser.parse_args(arguments)

    for sizes in SIZES:
        formulas = table_1(*sizes)
        for formula in formulas:
            formula.check()
    size, channels, kernel, sigma = SIZES[-1]
    setting = f"n = {size}², c = {channels}, k = {kernel}, sigma = {sigma}"
    latency = json.loads(args.latency.read_text()) if args.latency else _latency(args.device, args.seconds)
    versions = f"torch {torch.__version__.split('+')[0]} and timm {timm.__version__}"
    text = page(formulas, setting, latency, versions)
    args.output.mkdir(parents=True, exist_ok=True)
    write_file(args.output / "paper_latency.png", png(latency))
    write_file(args.output / "paper_memory.png", memory_png(latency))
    write_file(args.output / "paper_tables.md", text)
    print(f"written: {args.output / 'paper_tables.md'}")


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


if __name__ == "__main__":
    main()
