"""Checks the CUDA kernels on one GPU, and times them: in one call, under 8 minutes.

    python benchmarks/gpu_check.py                       writes benchmarks/results/gpu_<name>.json and .md
    python benchmarks/gpu_check.py --part correctness,op
    python benchmarks/gpu_check.py --dry-run             the same code on the CPU with tiny sizes

The report is written after every part and every few measurements, so that a crash loses little. Parts run in order of
importance; when the time is over the rest is left out, and the report says so. Exit code: 0, 1 if anything came out
wrong or the kernels are not in use, 2 for a mistake in the options, 3 if nothing came out wrong but something was left
out, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common.results import RESULTS, script_parser
from gpu.correctness import compilation, correctness, small
from gpu.determinism import determinism
from gpu.limits import large, sanitizer
from gpu.page import page
from gpu.run import DroppedError, Run, problems
from gpu.speed import compiled, model, op, up
from gpu.targets import targets

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import UsageError
from ddf_convert.utils.device import choose, describe

INCOMPLETE = 3
GRACE = 45  # seconds past the end after which a hanging kernel is given up


def machine(run: Run, record: dict[str, Any]) -> None:
    """Records names and versions, and whether CUDA tensors take the kernels."""
    record["machine"] = describe(run.device)
    if run.without_gpu(record, "whether the CUDA kernels are in use"):
        return
    from ddf_convert import cuda

    record["kernels_in_use"] = bool(cuda.usable(torch.empty(1, device=run.device)))
    if not record["kernels_in_use"]:
        raise RuntimeError("the CUDA kernels are not in use: `ddf-convert doctor` says why")


class Part(NamedTuple):
    """A part, and the share of the whole time that it may take."""

    name: str
    fill: Callable[[Run, dict[str, Any]], None]
    share: float = 1.0


PARTS = (  # in order of importance
    Part("machine", machine),
    Part("compilation", compilation, 0.25),
    Part("correctness", correctness, 0.25),
    Part("determinism", determinism, 0.2),
    Part("op", op, 0.4),
    Part("up", up, 0.15),
    Part("model", model, 0.25),
    Part("compiled", compiled, 0.3),
    Part("large", large, 0.2),
    Part("sanitizer", sanitizer),
    Part("targets", targets),
)
NAMES = tuple(part.name for part in PARTS)


def main() -> int:
    options = _options()
    if options.small_run:
        small(torch.device("cuda"))
        return 0
    if options.dry_run:
        torch.set_num_threads(1)  # the maps are so small that threads would only wait for one another
    device = choose("cpu" if options.dry_run else "cuda")
    name = "dry run" if options.dry_run else torch.cuda.get_device_name(device)
    folder = _folder(options)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    file = folder / f"gpu_{slug}.json"
    report: dict[str, Any] = {"device": name, "dry_run": options.dry_run, "minutes": options.minutes, "parts": {}}
    if options.resume:
        report = json.loads(file.read_text())

    def save() -> None:
        write_file(file, json.dumps(report, indent=1) + "\n")
        write_file(file.with_suffix(".md"), page(report))

    seconds = options.minutes * 60
    run = Run(device, options.dry_run, time.monotonic() + seconds, save, report["parts"])
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    for place, part in enumerate(PARTS):
        if part.name not in options.part:
            continue
        run.part_end = time.monotonic() + part.share * seconds
        _run_part(run, part)
        remaining = [later.name for later in PARTS[place + 1 :] if later.name in options.part]
        if remaining and not _usable(device):
            _continue_in_new_process(remaining, folder, run)
    faulthandler.cancel_dump_traceback_later()
    names = {
        status: [name for name, record in run.parts.items() if record["status"] == status]
        for status in ("failed", "incomplete")
    }
    ending = "".join(f"; {status}: {', '.join(of_status)}" for status, of_status in names.items() if of_status)
    print(f"report: {file.with_suffix('.md')}{ending}")
    return 1 if names["failed"] else INCOMPLETE if names["incomplete"] else 0


def _run_part(run: Run, part: Part) -> None:
    """Runs one part; the report says whatever happens."""
    record: dict[str, Any] = {"status": "running", "seconds": 0.0}
    run.parts[part.name] = record
    start = time.monotonic()
    print(f"{part.name} ...", end=" ", flush=True)
    run.save()
    try:
        run.need(1, "all of it")
        part.fill(run, record)
    except DroppedError as dropped:
        record["dropped"] = str(dropped)
    except KeyboardInterrupt:
        record["error"] = "interrupted"
        raise
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        record["traceback"] = traceback.format_exc().splitlines()
    finally:
        record["seconds"] = round(time.monotonic() - start, 1)
        record["status"] = "failed" if problems(record) else "incomplete" if "dropped" in record else "passed"
        print(f"{record['status']}, {record['seconds']:.0f} s", flush=True)
        for problem in problems(record)[:5]:
            print(f"  {problem}", flush=True)
        run.save()


def _usable(device: torch.device) -> bool:
    """Returns whether the GPU still answers: after an illegal access it does not, in this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
    return True


def _continue_in_new_process(remaining: list[str], folder: Path, run: Run) -> None:
    """Replaces this process by one that runs the remaining parts."""
    minutes = max(0.1, (run.end - time.monotonic()) / 60)
    print("the GPU no longer answers this process: the next parts get a new one", flush=True)
    arguments = ["--resume", "--minutes", str(minutes), "--part", ",".join(remaining), "--output-dir", str(folder)]
    os.execv(sys.executable, [sys.executable, __file__, *arguments])


def _folder(options: argparse.Namespace) -> Path:
    if options.output_dir is None and options.dry_run:
        return Path(tempfile.mkdtemp(prefix="gpu_check-"))
    folder: Path = options.output_dir or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _options() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="where to write (default: benchmarks/results)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--part", default=",".join(NAMES), help=f"any of {','.join(NAMES)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which the rest is left out (default 8)")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.part = options.part.split(",")
    unknown = [name for name in options.part if name not in NAMES]
    if unknown:
        parser.error(f"--part: no part is called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if not options.minutes > 0:
        parser.error("--minutes: must be above 0")
    return options


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; what was measured is in the report", file=sys.stderr)
        sys.exit(130)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
