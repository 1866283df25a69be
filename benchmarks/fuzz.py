"""Spoiled artifacts and random command lines: nothing may crash, hang, or write where it should not.

    python benchmarks/fuzz.py                        # 10,000 cases, in two processes
    python benchmarks/fuzz.py --write                # and the page benchmarks/results/fuzz.md
    python benchmarks/fuzz.py --only 1234 --seed 0   # one case again, with what it printed

Of every 5 cases 4 load an artifact that was spoiled (fuzz_parts/spoil.py), and one runs a command line of random
options. A case passes if it works, or says in one short line what is wrong. It fails with a traceback, an error that
the program calls its own fault, or a long one; if it takes too long or too much memory; if it writes outside of its
folder, or changes what it reads; if a restore that is refused changed the model; and if what had to be refused was
loaded, or what had to be loaded came back as another network. The run fails too if some check of the loader was
reached by few cases, or some command never worked: then what is behind it was not tested.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import io
import json
import multiprocessing
import queue
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import PIL.Image
import timm
import torch
from fuzz_parts import artifacts
from fuzz_parts.commands import command_line, commands
from fuzz_parts.guard import Guard, TooLong
from fuzz_parts.spoil import REFUSED, SAME, spoil

import ddf_convert as ddf
from ddf_convert import cli

SECONDS = 60  # of processor time, of a command
# The share of the artifacts that must get as far as each check: about half of what does.
LEAST = {"JSON": 1.0, "schema": 0.8, "hashes": 0.7, "header": 0.7, "shapes": 0.4, "weights": 0.15, "outputs": 0.1}
ENOUGH = 100  # cases of one command, of which one at least must have worked
PAGE = Path(__file__).parent / "results" / "fuzz.md"


class Result(NamedTuple):
    """One case.

    Attributes:
        kind: "artifact" or "command".
        way: How the artifact was spoiled; the command's words.
        depth: The last check of the loader that it came to; of a command, its exit code.
        became: "refused", "loaded" or "cannot run".
        words: What exactly was done.
        wrong: What must not have happened; empty if it passed.
    """

    kind: str
    way: str
    depth: str
    became: str
    words: str
    wrong: str


def prepare(folder: Path) -> None:
    """Good artifacts, weights, pictures, and files that grow when they are read."""
    artifacts.prepare(folder)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pt")
    pixels = numpy.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=numpy.uint8)
    for part, size, pixel in (("rgb/0", 40, pixels), ("depth/0", 40, pixels[..., 0]), ("small", 20, pixels[..., 0])):
        (folder / "pairs" / part).parent.mkdir(parents=True, exist_ok=True)
        depth = pixel if part == "rgb/0" else pixel[:size, :size].astype(numpy.uint16) + 1000
        PIL.Image.fromarray(depth).save(folder / "pairs" / f"{part}.png")
    for split in ("train", "validation"):
        for name in ("one", "two"):
            place = folder / "images" / split / name
            place.mkdir(parents=True)
            for number in range(3):
                PIL.Image.fromarray(pixels).save(place / f"{number}.png")
    (folder / "text.txt").write_text("not a picture")
    options = {"-o": folder / "network", "--factor": 2, "--device": "cpu", "--steps": 1, "--batch-size": 1}
    options |= {"--width": 4, "--crop": 16}
    with contextlib.redirect_stdout(io.StringIO()):
        words = (str(word) for pair in options.items() for word in pair)
        assert cli.run(["depth", "train", str(folder / "pairs"), *words]) == 0
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (folder / "bomb.yaml").write_text("\n".join(lines))
    (folder / "nested.yaml").write_text("[" * 5000)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }\n"
    (folder / "bomb.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def one(number: int, seed: int, good: Path, guard: Guard) -> Result:
    """Runs a case."""
    rng = random.Random(f"{seed} {number}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, contextlib.chdir(place):
        return _command(Path(place), good, rng, guard) if number % 5 == 4 else _artifact(Path(place), good, rng, guard)


def _artifact(place: Path, good: Path, rng: random.Random, guard: Guard) -> Result:
    name = rng.choice(("artifact", "own", "own", "experts"))
    ways = ("load", "load", "inspect") if name == "artifact" else ("restore", "restore", "restore")
    way = rng.choice((*ways, "restore", "original"))
    folder = shutil.copytree(good / name, place / name)
    spoiled, words, expected = spoil(folder, way, rng)
    if way != "inspect":
        depth, became, wrong = artifacts.judge(good, folder, way, expected, guard)
    else:
        files, reach = artifacts.contents(folder), artifacts.Reach()
        with reach.watching():
            code, wrong = run(["inspect", str(folder), "--input-size", "3", "32", "32"], place, guard)
        depth, became = reach.deepest, "refused" if code else "loaded"
        if became != {REFUSED: "refused", SAME: "loaded"}.get(expected, became):
            wrong.append(f"{became}, exit code {code}")
        if artifacts.contents(folder) != files:
            wrong.append("the folder changed")
    return Result("artifact", spoiled, depth, became, f"{name}, {way}: {words}", "; ".join(wrong))


def _command(place: Path, good: Path, rng: random.Random, guard: Guard) -> Result:
    (place / "out").mkdir()
    words, line = command_line(rng, good)
    code, wrong = run(line, place, guard)
    return Result("command", " ".join(words), str(code), "", " ".join(map(repr, line)), "; ".join(wrong))


def run(line: list[str], writable: Path, guard: Guard) -> tuple[Any, list[str]]:
    """The exit code of a command line, and what is wrong with what it did."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with guard.watching(writable, SECONDS) as wrong:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.run(line)
        except TooLong:
            return None, [f"no end after {SECONDS} s"]
        except SystemExit as left:
            code = left.code
        except BaseException as error:
            return None, [f"{type(error).__name__}: {error}"]
    said = err.getvalue()
    if code not in (0, 1, 2):
        wrong.append(f"exit code {code}")
    if "Traceback" in said + out.getvalue() and "--debug" not in line:
        wrong.append(f"a traceback: {said[-500:]}")
    if "this is a fault" in said:
        wrong.append(said.strip()[-500:])
    if code and not said.strip() and "--json" not in line:
        wrong.append("failed without a word")
    if code and len(said) > 2 * artifacts.MESSAGE + sum(map(len, line)):
        wrong.append(f"says {len(said)} characters: {said[:200]}")
    if not said.replace("\n", "").isprintable():
        wrong.append(f"not printable: {said[-500:]!r}")
    if code == 0 and "--json" in line and "--help" not in line and line[0] in ("inspect", "convert"):
        try:
            json.loads(out.getvalue())
        except ValueError:
            wrong.append("--json printed something else too")
    return code, wrong


def unreached(results: Sequence[Result]) -> list[str]:
    """What too few of the cases reached to have been tested."""
    counts = depths(results)
    spoiled = counts["JSON"]
    found = [
        f"only {counts[depth]} of {spoiled} artifacts came to the {depth}"
        for depth, share in LEAST.items()
        if counts[depth] < share * spoiled
    ]
    codes = Counter((result.way, result.depth) for result in results if result.kind == "command")
    for words in commands():
        way = " ".join(words)
        cases = sum(count for (of, _), count in codes.items() if of == way)
        if cases >= ENOUGH and not codes[way, "0"]:
            found.append(f"none of {cases} command lines of {way} worked")
    return found


def depths(results: Sequence[Result]) -> dict[str, int]:
    """How many artifacts came to each check of the loader."""
    last = Counter(result.depth for result in results if result.kind == "artifact")
    return {depth: sum(last[each] for each in artifacts.DEPTHS[place:]) for place, depth in enumerate(artifacts.DEPTHS)}


def tables(results: Sequence[Result]) -> str:
    """What was reached, and what became of it, in Markdown."""
    lines = ["| check | artifacts that came to it | stopped there |", "|---|---:|---:|"]
    counts = depths(results)
    for depth, after in zip(artifacts.DEPTHS, (*artifacts.DEPTHS[1:], None), strict=True):
        stopped = f"{counts[depth] - counts[after]:,}" if after else ""
        lines.append(f"| {depth} | {counts[depth]:,} | {stopped} |")
    for kind, title, field, columns in (
        ("artifact", "what was spoiled", "became", ("refused", "loaded", "cannot run")),
        ("command", "command", "depth", ("0", "1", "2")),
    ):
        lines += ["", f"| {title} | cases | {' | '.join(columns)} |", "|---|" + "---:|" * (1 + len(columns))]
        ways = Counter((each.way, getattr(each, field)) for each in results if each.kind == kind)
        for way in sorted({way for way, _ in ways}):
            row = [sum(count for (of, _), count in ways.items() if of == way), *(ways[way, each] for each in columns)]
            lines.append(f"| {way or '(no command)'} | {' | '.join(f'{count:,}' for count in row)} |")
    return "\n".join(lines)


def caches() -> tuple[Path, ...]:
    """Where the package and its libraries keep what they compiled, or may."""
    own = Path(ddf.__file__).parent  # Numba tries whether it could keep kernels beside their sources
    home = (Path.home() / name for name in (".cache", ".numba", ".config", ".nv", ".triton"))
    compiler = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
    return (*home, compiler, *(own / part / "__pycache__" for part in ("cpu", "cuda")))


def _work(good: Path, seed: int, numbers: list[int], results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    guard = Guard(caches())
    for number in numbers:
        results.put((number, None, 0.0))  # so that it is known which one kills the process
        began = time.monotonic()
        results.put((number, one(number, seed, good, guard), time.monotonic() - began))
    results.put(None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone, in this process")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-good-") as place:
        prepare(Path(place))
        if args.only is not None:
            result = one(args.only, args.seed, Path(place), Guard(caches()))
            print("\n".join(f"{name}: {value}" for name, value in result._asdict().items()))
            return int(bool(result.wrong))
        results, failures, words = _all(args.cases, args.seed, args.jobs, Path(place))
    failures += unreached(results)
    words = f"{len(results):,} cases, seed {args.seed}: {len(failures)} failed; {words}"
    print("\n".join((tables(results), *unreached(results), words)))
    if args.write:
        head = f"# Spoiled artifacts and random command lines\n\n`python benchmarks/fuzz.py --write`: {words}.\n\n"
        PAGE.write_text(f"{head}{tables(results)}\n", encoding="utf-8")
    return int(bool(failures))


def _all(cases: int, seed: int, jobs: int, good: Path) -> tuple[list[Result], list[str], str]:
    """The results, the failures, and how long it took."""
    began = heard = time.monotonic()
    context = multiprocessing.get_context("spawn")
    queued = context.Queue()
    shares = [list(range(first, cases, jobs)) for first in range(jobs)]
    workers = [context.Process(target=_work, args=(good, seed, share, queued), daemon=True) for share in shares]
    for worker in workers:
        worker.start()
    results: list[Result] = []
    failures: list[str] = []
    begun, longest, running = set(), (0.0, -1), len(workers)
    while running:
        try:
            message = queued.get(timeout=5)
        except queue.Empty:
            dead = [worker.exitcode for worker in workers if worker.exitcode]
            if dead or time.monotonic() - heard > 20 * SECONDS:
                failures.append(f"a process {f'ended ({dead})' if dead else 'hangs'} in one of cases {sorted(begun)}")
                print(failures[-1])
                break
            continue
        heard = time.monotonic()
        if message is None:
            running -= 1
            continue
        number, result, seconds = message
        begun ^= {number}
        if result is None:
            continue
        results.append(result)
        longest = max(longest, (seconds, number))
        if result.wrong:
            failures.append(f"case {number}, {result.kind}, {result.way}: {result.words}\n    {result.wrong}")
            print(failures[-1], flush=True)
        if len(results) % 500 == 0:
            print(f"{len(results)} cases, {len(failures)} failed", flush=True)
    minutes = (time.monotonic() - began) / 60
    return results, failures, f"the longest took {longest[0]:.1f} s (case {longest[1]}), all {minutes:.0f} minutes"


if __name__ == "__main__":
    sys.exit(main())
