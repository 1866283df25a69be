"""Plans and converts every architecture of timm and torchvision that has a 3x3 convolution, on shapes alone.

No weights, no downloads.

    python benchmarks/zoo.py                          everything; writes benchmarks/results/zoo.md
    python benchmarks/zoo.py --per-file 1             one architecture of each file of the libraries: a first look
    python benchmarks/zoo.py --only 'resnet*' --library timm
    python benchmarks/zoo.py --real                   real numbers too, for the smallest architecture of each file

Every architecture is checked as `architectures/checks.py` says, and gets a line in benchmarks/results/zoo.jsonl,
whatever happens to the process that checks it. A run goes on where the last one stopped: a line counts as long as
neither ddf_convert (but for kernels and tables), nor the checks, nor the versions of the libraries have changed.
--failed keeps all lines, and repeats the failures alone. Exit code: 0, 1 if anything failed, 2 for a mistake in the
options.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import architectures
from architectures.catalog import LIBRARIES, Architecture, catalog
from architectures.checks import check_real, check_shapes, fail, line_of
from architectures.page import causes, headline, page, table
from common.pool import LostError, call_each
from common.results import RESULTS, ResumableLines, script_parser
from rich.console import Console

import ddf_convert
from ddf_convert.artifacts.atomic import write_file

NOT_CHECKED = ("bench", "cli.py", "commands", "cpu", "cuda", "report")  # parts of ddf_convert that change no line


def main() -> int:
    options = _options()
    everything = catalog()
    chosen = choose(everything, options.only, options.library, options.per_file)
    if not chosen:
        print("no architecture is called that", file=sys.stderr)
        return 2
    if options.fresh:
        options.results.unlink(missing_ok=True)
    store = CheckResults(options.results, source_key(), stale=options.failed)
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


class CheckResults(ResumableLines):
    """A line for each check of each architecture, with the key of the sources that it comes from.

    Args:
        file: Where the lines are kept.
        key: The sources' key now.
        stale: Keep the lines of other sources too.
    """

    def __init__(self, file: Path, key: str, stale: bool = False) -> None:
        super().__init__(
            file,
            key=lambda line: (line["check"], line["library"], line["name"]),
            valid=lambda line: stale or line["key"] == key,
        )
        self._source_key = key

    def add(self, line: dict[str, Any]) -> None:
        super().add({**line, "key": self._source_key})

    def of(self, check: str) -> list[dict[str, Any]]:
        """Returns every line of one check, sorted by file."""
        found = [line for line in self.lines.values() if line["check"] == check]
        return sorted(found, key=lambda line: (line["library"], line["file"], line["name"]))


def source_key() -> str:
    """Returns a hash of everything that a line depends on: ddf_convert, the checks, the libraries' versions."""
    digest = hashlib.sha256()
    for folder in (Path(ddf_convert.__file__).parent, Path(architectures.__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            if file.relative_to(folder).parts[0] not in NOT_CHECKED:
                digest.update(file.read_bytes())
    digest.update(" ".join(version(name) for name in ("torch", *LIBRARIES)).encode())
    return digest.hexdigest()[:12]


def choose(
    everything: Iterable[Architecture], only: str = "*", library: str | None = None, per_file: int | None = None
) -> list[Architecture]:
    """Returns the architectures that the options name; with ``per_file``, some of each file, spread over its list."""
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
    """Returns the architecture with the fewest parameters of each file, among those with something to replace."""
    params = {(line["library"], line["name"]): line["params"] for line in lines if line.get("everything")}
    able = [architecture for architecture in chosen if (architecture.library, architecture.name) in params]
    files = groupby(able, key=lambda architecture: architecture.file)
    return [min(own, key=lambda architecture: params[architecture.library, architecture.name]) for _, own in files]


def run(
    check: Callable[[Architecture], dict[str, Any]],
    architectures: Iterable[Architecture],
    store: CheckResults,
    options: argparse.Namespace,
) -> None:
    """Checks what has no line yet, and prints each failure when it happens."""
    kind = check.__name__.removeprefix("check_")
    known = {(line["library"], line["name"]) for line in store.of(kind) if not (options.failed and "failures" in line)}
    tasks = [a for a in architectures if (a.library, a.name) not in known]
    results = call_each(check, tasks, options.jobs, options.timeout, setup=logging.disable)
    for count, (architecture, result) in enumerate(results, start=1):
        line = result
        if isinstance(result, LostError):
            with line_of(architecture, kind) as line:
                fail(line, "process", str(result))
        store.add(line)
        for failure in line.get("failures", []):
            print(f"{count}/{len(tasks)} {architecture.name}: {failure['step']}: {failure['reason']}", flush=True)


def _options() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--only", default="*", metavar="GLOB", help="names of architectures, such as 'resnet*'")
    parser.add_argument("--library", choices=LIBRARIES, help="only those of this library")
    parser.add_argument("--per-file", type=int, metavar="N", help="only N architectures of each file of a library")
    parser.add_argument("--real", action="store_true", help="real numbers too, for the smallest of each file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for one architecture (600)")
    parser.add_argument("--fresh", action="store_true", help="forget all earlier results")
    parser.add_argument("--failed", action="store_true", help="repeat what failed, and keep every other result")
    parser.add_argument(
        "--results", type=Path, default=RESULTS / "zoo.jsonl", metavar="FILE", help="where the lines are kept"
    )
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
