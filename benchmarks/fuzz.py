"""Corrupted artifacts and random command lines: nothing may crash, hang, or write where it should not.

    python benchmarks/fuzz.py                        # 10,000 cases, in two processes
    python benchmarks/fuzz.py --write                # and the page benchmarks/results/fuzz.md
    python benchmarks/fuzz.py --only 1234 --seed 0   # one case again, with what it printed

Of every 5 cases 4 load a corrupted artifact (fuzzing/corrupt.py), and one runs a command line of random options. A case
passes if it works, or says in one short line what is wrong. It fails with a traceback, an error that the program calls
its own fault, or a long one; if it takes too long or too much memory; if it writes outside of its folder, or changes
what it reads; if a restore that is refused changed the model; and if what had to be refused was loaded, or what had to
be loaded came back as another network. The run fails too if few cases came to some check of the loader, or some command
never worked: then what is behind it was not tested.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import PIL.Image
import timm
import torch
from common import markdown
from common.pool import LostError, call_each
from common.results import RESULTS, script_parser
from fuzzing import artifacts
from fuzzing.commands import command_line, commands
from fuzzing.corrupt import REFUSED, SAME, corrupt
from fuzzing.sandbox import Sandbox, TooLongError

from ddf_convert import cli

SECONDS = 60  # of processor time, of a command
# The least share of the artifacts that must come to each check: about half of what does.
LEAST = {"JSON": 1.0, "schema": 0.8, "hashes": 0.7, "header": 0.7, "shapes": 0.4, "weights": 0.15, "outputs": 0.1}
ENOUGH = 100  # cases of one command, of which one at least must have worked
PAGE = RESULTS / "fuzz.md"


class Result(NamedTuple):
    """The result of a case.

    Attributes:
        kind: "artifact" or "command".
        name: The corruption's, or the command's words.
        depth: Of an artifact, the last check of the loader that it came to; of a command, its exit code.
        outcome: Of an artifact, "refused", "loaded" or "cannot run".
        details: What exactly was done.
        problems: What must not have happened; empty if it passed.
    """

    kind: str
    name: str
    depth: str
    outcome: str
    details: str
    problems: str


def prepare(folder: Path) -> None:
    """Writes good artifacts, weights, pictures, and files that grow when they are read."""
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


# --- one case ---


def run_case(number: int, seed: int, good: Path, sandbox: Sandbox) -> Result:
    rng = random.Random(f"{seed} {number}")
    case = _command_case if number % 5 == 4 else _artifact_case
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, contextlib.chdir(place):
        return case(Path(place), good, rng, sandbox)


def _artifact_case(place: Path, good: Path, rng: random.Random, sandbox: Sandbox) -> Result:
    name = rng.choice(("artifact", "own", "own", "experts"))
    loaders = ("load", "load", "inspect") if name == "artifact" else ("restore", "restore", "restore")
    loader = rng.choice((*loaders, "restore", "original"))
    folder = shutil.copytree(good / name, place / name)
    corruption, details, expected = corrupt(folder, loader, rng)
    if loader != "inspect":
        depth, outcome, problems = artifacts.judge(good, folder, loader, expected, sandbox)
    else:
        files, probe = artifacts.contents(folder), artifacts.DepthProbe()
        with probe.watching():
            code, problems = run_command(["inspect", str(folder), "--input-size", "3", "32", "32"], place, sandbox)
        depth, outcome = probe.deepest, "refused" if code else "loaded"
        if outcome != {REFUSED: "refused", SAME: "loaded"}.get(expected, outcome):
            problems.append(f"{outcome}, exit code {code}")
        if artifacts.contents(folder) != files:
            problems.append("the folder changed")
    return Result("artifact", corruption, depth, outcome, f"{name}, {loader}: {details}", "; ".join(problems))


def _command_case(place: Path, good: Path, rng: random.Random, sandbox: Sandbox) -> Result:
    (place / "out").mkdir()
    words, line = command_line(rng, good)
    code, problems = run_command(line, place, sandbox)
    return Result("command", " ".join(words), str(code), "", " ".join(map(repr, line)), "; ".join(problems))


def run_command(line: list[str], writable: Path, sandbox: Sandbox) -> tuple[Any, list[str]]:
    """Runs a command line; returns its exit code and all problems."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with sandbox.watching(writable, SECONDS) as problems:
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.run(line)
        except TooLongError:
            return None, [f"no end after {SECONDS} s"]
        except SystemExit as exit:
            code = exit.code
        except BaseException as error:
            return None, [f"{type(error).__name__}: {error}"]
    errors = err.getvalue()
    if code not in (0, 1, 2):
        problems.append(f"exit code {code}")
    if "Traceback" in errors + out.getvalue() and "--debug" not in line:
        problems.append(f"a traceback: {errors[-500:]}")
    if "this is a fault" in errors:
        problems.append(errors.strip()[-500:])
    if code and not errors.strip() and "--json" not in line:
        problems.append("failed without a word")
    if code and len(errors) > 2 * artifacts.LONGEST_MESSAGE + sum(map(len, line)):
        problems.append(f"says {len(errors)} characters: {errors[:200]}")
    if not errors.replace("\n", "").isprintable():
        problems.append(f"not printable: {errors[-500:]!r}")
    if code == 0 and "--json" in line and "--help" not in line and line[0] in ("inspect", "convert"):
        try:
            json.loads(out.getvalue())
        except ValueError:
            problems.append("--json printed something else too")
    return code, problems


# --- all cases ---


def run_all(cases: int, seed: int, jobs: int, good: Path) -> tuple[list[Result], list[str], str]:
    """Returns the results, the failures, and how long it took."""
    start = time.monotonic()
    results: list[Result] = []
    failures: list[str] = []
    longest = (0.0, -1)
    calls = call_each(functools.partial(_timed_case, seed, good), range(cases), jobs, 20 * SECONDS)
    for count, (number, answer) in enumerate(calls, 1):
        if isinstance(answer, LostError):
            failures.append(f"case {number}: {answer}")
            print(failures[-1], flush=True)
            continue
        result, seconds = answer
        results.append(result)
        longest = max(longest, (seconds, number))
        if result.problems:
            failures.append(f"case {number}, {result.kind}, {result.name}: {result.details}\n    {result.problems}")
            print(failures[-1], flush=True)
        if count % 500 == 0:
            print(f"{count} cases, {len(failures)} failed", flush=True)
    minutes = (time.monotonic() - start) / 60
    return results, failures, f"the longest took {longest[0]:.1f} s (case {longest[1]}), all {minutes:.0f} minutes"


def _timed_case(seed: int, good: Path, number: int) -> tuple[Result, float]:
    start = time.monotonic()
    return run_case(number, seed, good, _sandbox()), time.monotonic() - start


_sandbox = functools.cache(Sandbox)  # one for each process: an audit hook stays until it ends


def depth_counts(results: Sequence[Result]) -> dict[str, int]:
    """Counts the artifacts that came to each check of the loader."""
    last = Counter(result.depth for result in results if result.kind == "artifact")
    return {depth: sum(last[each] for each in artifacts.DEPTHS[place:]) for place, depth in enumerate(artifacts.DEPTHS)}


def coverage_gaps(results: Sequence[Result]) -> Iterator[str]:
    """Yields each check that too few artifacts came to, and each command that never worked."""
    counts = depth_counts(results)
    total = counts["JSON"]
    for depth, share in LEAST.items():
        if counts[depth] < share * total:
            yield f"only {counts[depth]} of {total} artifacts came to the {depth}"
    codes = Counter((result.name, result.depth) for result in results if result.kind == "command")
    for words in commands():
        name = " ".join(words)
        cases = sum(count for (of, _), count in codes.items() if of == name)
        if cases >= ENOUGH and not codes[name, "0"]:
            yield f"none of {cases} command lines of {name} worked"


def tables(results: Sequence[Result]) -> Iterator[str]:
    """Yields Markdown: how many cases came to each check, and what came of each corruption and command."""
    counts = depth_counts(results)
    rows: list[tuple[str, ...]] = []
    for depth, after in zip(artifacts.DEPTHS, (*artifacts.DEPTHS[1:], None), strict=True):
        rows.append((depth, f"{counts[depth]:,}", f"{counts[depth] - counts[after]:,}" if after else ""))
    yield from markdown.table(("check", "artifacts that came to it", "stopped there"), rows, numbers=True)
    for kind, title, field, columns in (
        ("artifact", "corruption", "outcome", ("refused", "loaded", "cannot run")),
        ("command", "command", "depth", ("0", "1", "2")),
    ):
        found = Counter((each.name, getattr(each, field)) for each in results if each.kind == kind)
        rows = []
        for name in sorted({name for name, _ in found}):
            row = [sum(count for (of, _), count in found.items() if of == name), *(found[name, c] for c in columns)]
            rows.append((name or "(no command)", *(f"{count:,}" for count in row)))
        yield from markdown.table((title, "cases", *columns), rows, numbers=True)


def main(arguments: list[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, metavar="N", help="this case alone, in this process")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fuzz-good-") as place:
        prepare(Path(place))
        if options.only is not None:
            result = run_case(options.only, options.seed, Path(place), Sandbox())
            print("\n".join(f"{name}: {value}" for name, value in result._asdict().items()))
            return int(bool(result.problems))
        results, failures, duration = run_all(options.cases, options.seed, options.jobs, Path(place))
    gaps = list(coverage_gaps(results))
    failures += gaps
    summary = f"{len(results):,} cases, seed {options.seed}: {len(failures)} failed; {duration}"
    text = "\n".join(tables(results))
    print("\n".join((text, *gaps, summary)))
    if options.write:
        head = f"# Corrupted artifacts and random command lines\n\n`python benchmarks/fuzz.py --write`: {summary}.\n\n"
        PAGE.write_text(head + text, encoding="utf-8")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
