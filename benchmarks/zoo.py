"""Plans and converts every architecture of timm and torchvision that has a 3x3 convolution, on shapes alone.

No weights, no downloads.

    python benchmarks/zoo.py                          everything; writes benchmarks/results/zoo.md
    python benchmarks/zoo.py --per-file 1             one architecture of each file of the libraries: a first look
    python benchmarks/zoo.py --only 'resnet*' --library timm
    python benchmarks/zoo.py --real                   real numbers too, for the smallest architecture of each file

Every architecture is checked as `zoo_parts/shapes.py` says, and gets a line in benchmarks/results/zoo.jsonl, whatever
happens to the process that checks it. A run goes on where the last one stopped: a line counts as long as neither
ddf_convert (but for kernels and tables), nor these checks, nor the versions of the libraries have changed. --failed
keeps all lines, and repeats the failures alone. Exit code: 0, 1 if anything failed, 2 for a mistake in the options.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from zoo_parts.catalogue import LIBRARIES, Architecture, catalogue
from zoo_parts.page import causes, headline, page, table
from zoo_parts.pool import LostError, each
from zoo_parts.real import check_real
from zoo_parts.record import fail, line_of
from zoo_parts.shapes import check_shapes
from zoo_parts.store import Store, source_key

from ddf_convert.artifacts.atomic import write_file

RESULTS = Path(__file__).parent / "results" / "zoo.jsonl"


def main() -> int:
    options = _options()
    everything = catalogue()
    chosen = choose(everything, options.only, options.library, options.per_file)
    if not chosen:
        print("no architecture is called that", file=sys.stderr)
        return 2
    store = Store(options.results, source_key(), stale=options.failed, fresh=options.fresh)
    start = time.monotonic()
    run(check_shapes, chosen, store, options)
    if options.real:
        run(check_real, smallest(chosen, store.of("shapes")), store, options)
    names = {(architecture.library, architecture.name) for architecture in chosen}
    lines, real = (
        [line for line in store.of(check) if (line["library"], line["name"]) in names] for check in ("shapes", "real")
    )
    console = Console()
    console.print(table(lines))
    for cause, of_cause in causes([*lines, *real]):
        console.print(f"{len(of_cause)}: {cause}: {', '.join(of_cause[:3])}", markup=False, highlight=False)
    console.print(headline(lines, real, len(chosen), time.monotonic() - start), highlight=False)
    if len(lines) == len(everything):
        versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
        write_file(options.results.with_suffix(".md"), page(lines, real, len(everything), versions))
    return 1 if any("failures" in line for line in [*lines, *real]) else 0


def choose(
    everything: Iterable[Architecture], only: str = "*", library: str | None = None, per_file: int | None = None
) -> list[Architecture]:
    """The architectures that the options ask for; of each file the first ones, spread over its list."""
    found = [
        architecture
        for architecture in everything
        if fnmatch.fnmatch(architecture.name, only) and library in (None, architecture.library)
    ]
    if per_file is None:
        return found
    files = [list(own) for _, own in groupby(found, key=lambda architecture: architecture.file)]
    counts = [min(per_file, len(own)) for own in files]
    return [own[len(own) * place // n] for own, n in zip(files, counts, strict=True) for place in range(n)]


def smallest(chosen: Sequence[Architecture], lines: Iterable[dict[str, Any]]) -> list[Architecture]:
    """The architecture of fewest parameters of each file, among those that have something to replace."""
    params = {(line["library"], line["name"]): line["params"] for line in lines if line.get("everything")}
    able = [architecture for architecture in chosen if (architecture.library, architecture.name) in params]
    files = groupby(able, key=lambda architecture: architecture.file)
    return [min(own, key=lambda architecture: params[architecture.library, architecture.name]) for _, own in files]


def run(
    check: Callable[[Architecture], dict[str, Any]],
    architectures: Iterable[Architecture],
    store: Store,
    options: argparse.Namespace,
) -> None:
    """Checks what has no line yet; says each failure when it happens."""
    kind = check.__name__.removeprefix("check_")
    known = {(line["library"], line["name"]) for line in store.of(kind) if not (options.failed and "failures" in line)}
    tasks = [a for a in architectures if (a.library, a.name) not in known]
    for count, (architecture, result) in enumerate(each(check, tasks, options.jobs, options.timeout), start=1):
        line = result
        if isinstance(result, LostError):
            with line_of(architecture, kind) as line:
                fail(line, "process", str(result))
        store.add(line)
        for failure in line.get("failures", []):
            print(f"{count}/{len(tasks)} {architecture.name}: {failure['step']}: {failure['reason']}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of architectures, such as 'resnet*'")
    parser.add_argument("--library", choices=LIBRARIES, help="only those of this library")
    parser.add_argument("--per-file", type=int, metavar="N", help="only N architectures of each file of a library")
    parser.add_argument("--real", action="store_true", help="real numbers too, for the smallest of each file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for one architecture (600)")
    parser.add_argument("--fresh", action="store_true", help="forget all earlier results")
    parser.add_argument("--failed", action="store_true", help="repeat what failed, and keep every other result")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where the lines are kept")
    options = parser.parse_args()
    for name in ("per_file", "jobs", "timeout"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: must be above 0")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this run stopped", file=sys.stderr)
        sys.exit(130)
