"""Spoilt artifacts and random command lines: nothing may crash, hang, or write where it should not.

    python benchmarks/fuzz.py                        # 5,000 cases, in two processes
    python benchmarks/fuzz.py --only 1234 --seed 0   # one case again, with what it printed

Of every 5 cases 3 load an artifact whose manifest, weights or safetensors header somebody changed, and 2 run a command
line of random options. A case passes if it works, or says in one line what is wrong; it fails with a traceback, an
error that the program calls its own fault, more than one line, more than a minute, or a write outside of its folder.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import multiprocessing
import os
import queue
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import timm
import torch
from fuzz_parts.commands import command_line
from fuzz_parts.guard import Guard, TooLong
from fuzz_parts.spoil import spoil

import ddf_convert as ddf
from ddf_convert import cli

SECONDS = 60
MEMORY = 12 * 2**30  # bytes of address space: a manifest must not be able to ask for more than a machine has
MODEL = "test_resnet"  # timm's smallest


def prepare(folder: Path) -> None:
    """A good artifact, one of a model of the user's own, weights, and a few pictures."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=5)
    image = torch.empty(1, 3, 32, 32)
    ddf.save(ddf.convert(model, example_input=image), folder / "artifact")
    ddf.save(ddf.convert(model, example_input=image), folder / "own", source=None)
    torch.save(model.state_dict(), folder / "weights.pt")
    pixels = numpy.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=numpy.uint8)
    for split in ("train", "validation"):
        for name in ("one", "two"):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(3):
                PIL.Image.fromarray(pixels).save(place / f"{number}.png")
    (folder / "text.txt").write_text("not a picture")


def one(number: int, seed: int, good: Path, guard: Guard) -> tuple[str, str, str]:
    """Runs a case: its kind, what it was, and what is wrong with what came of it (empty if nothing)."""
    dice = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place)
        os.chdir(folder)
        if number % 5 < 3:
            shutil.copytree(good / "artifact", folder / "artifact")
            words = spoil(folder / "artifact", dice)
            return "artifact", words, _load(folder, dice, guard)
        (folder / "out").mkdir()
        files = [str(path) for path in (good / "artifact", good / "images", good / "weights.pt", good / "text.txt")]
        files.append(str(good / "images" / "train" / "one" / "0.png"))
        line = command_line(dice, files, str(folder / "out" / "result"))
        return "command", " ".join(map(repr, line)), run(line, folder, guard)


def _load(folder: Path, dice: random.Random, guard: Guard) -> str:
    before = _contents(folder)
    loading = dice.choice(("load", "restore", "inspect"))
    if loading == "inspect":
        return run(["inspect", str(folder / "artifact")], folder / "artifact", guard)
    with guard.watching(folder / "artifact", SECONDS) as found:  # an interrupted save may be finished there
        try:
            if loading == "load":
                ddf.load(folder / "artifact")
            else:
                ddf.restore(timm.create_model(MODEL, num_classes=5), folder / "artifact")
        except ddf.DDFError as error:
            if "\n" in str(error):
                return f"an error of several lines: {error}"
        except TooLong:
            return f"no end after {SECONDS} s"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    outside = {name for name in before ^ _contents(folder) if not name.startswith("artifact")}
    return "; ".join([*found, *(f"changed {name}" for name in sorted(outside))])


def run(line: list[str], writable: Path, guard: Guard) -> str:
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with guard.watching(writable, SECONDS) as found:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.run(line)
        except TooLong:
            return f"no end after {SECONDS} s"
        except SystemExit as left:
            code = left.code
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    said = err.getvalue()
    wrong = list(found)
    if code not in (0, 1, 2):
        wrong.append(f"exit code {code}")
    if "Traceback" in said + out.getvalue() and "--debug" not in line:
        wrong.append(f"a traceback: {said[-500:]}")
    if "this is a fault" in said:
        wrong.append(said.strip()[-500:])
    if code and not said.strip() and "--json" not in line:
        wrong.append("failed without a word")
    if code == 0 and "--json" in line and "--help" not in line and line[0] in ("inspect", "convert"):
        try:
            json.loads(out.getvalue())
        except ValueError:
            wrong.append("--json printed something else too")
    return "; ".join(wrong)


def _contents(folder: Path) -> set[str]:
    return {f"{path.relative_to(folder)}" for path in folder.rglob("*")}


def _work(good: Path, seed: int, numbers: list[int], results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    guard = Guard(caches())
    for number in numbers:
        began = time.monotonic()
        results.put((number, *one(number, seed, good, guard), time.monotonic() - began))
    results.put(None)


def caches() -> tuple[Path, ...]:
    """Where the package and its libraries keep what they compiled, or may."""
    own = Path(ddf.__file__).parent  # Numba tries whether it could keep kernels beside their sources
    home = (Path.home() / name for name in (".cache", ".numba", ".config", ".nv", ".triton"))
    compiler = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return (*home, compiler, *(own / part / "__pycache__" for part in ("cpu", "cuda")))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone, in this process")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-good-") as place:
        good = Path(place)
        prepare(good)
        if args.only is not None:
            kind, words, wrong = one(args.only, args.seed, good, Guard(caches()))
            print(f"{kind}: {words}\n{wrong or 'passed'}")
            return int(bool(wrong))
        return _all(args.cases, args.seed, args.jobs, good)


def _all(cases: int, seed: int, jobs: int, good: Path) -> int:
    began = heard = time.monotonic()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shares = [list(range(first, cases, jobs)) for first in range(jobs)]
    workers = [context.Process(target=_work, args=(good, seed, share, results), daemon=True) for share in shares]
    for worker in workers:
        worker.start()
    counts: Counter[str] = Counter()
    failures, longest, running = [], (0.0, -1), len(workers)
    while running:
        try:
            result = results.get(timeout=5)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            silent = time.monotonic() - heard > 5 * SECONDS
            if dead or silent:
                failures.append(f"a process ended ({dead})" if dead else "a process hangs")
                print(failures[-1])
                break
            continue
        heard = time.monotonic()
        if result is None:
            running -= 1
            continue
        number, kind, words, wrong, seconds = result
        counts[kind] += 1
        longest = max(longest, (seconds, number))
        if wrong:
            failures.append(f"case {number}, {kind}: {words}\n    {wrong}")
            print(failures[-1], flush=True)
        if sum(counts.values()) % 500 == 0:
            print(f"{sum(counts.values())} cases, {len(failures)} failed", flush=True)
    kinds = ", ".join(f"{count} of {kind}s" for kind, count in sorted(counts.items()))
    print(
        f"{sum(counts.values())} cases ({kinds}), seed {seed}: {len(failures)} failed;"
        f" the longest took {longest[0]:.1f} s (case {longest[1]}); {(time.monotonic() - began) / 60:.0f} min"
    )
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
