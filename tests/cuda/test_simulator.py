"""The CUDA kernels in Numba's simulator against the reference in float64; see cuda_simulator.py for how and what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.cuda_simulator import GROUPS, INCOMPLETE, LAYOUTS, TOLERANCES, chosen
from support.paths import TESTS

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
PROGRAM = TESTS / "support" / "cuda_simulator.py"


Simulate = Callable[[str, str, str], list[dict[str, Any]]]
# Where the layout matters least, `make test` runs half of the cases in one of them, layouts taking turns from group to
# group; `make test-long` runs all in both.
HALVED = ("shapes", "dtypes", "geometry", "kernel sizes", "plain", "normalized", "upscaled", "needs")
RUNS = [(group, layout, "all") for group in GROUPS if group not in HALVED for layout in LAYOUTS]
RUNS += [(group, tuple(LAYOUTS)[turn % 2], "half") for turn, group in enumerate(HALVED)]
LONG = [pytest.param(group, layout, "all", marks=pytest.mark.long) for group in HALVED for layout in LAYOUTS]


@pytest.fixture(scope="module")
def simulate() -> Iterator[Simulate]:
    """Runs groups in one process of their own: Numba decides whether to simulate when it is imported."""
    with subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin
        assert process.stdout

        def ask(*words: str) -> list[dict[str, Any]]:
            watch = threading.Timer(300, process.kill)
            watch.start()
            print(*words, sep=", ", file=process.stdin, flush=True)
            answer = process.stdout.readline()
            watch.cancel()
            assert answer, f"the simulator ended with {process.wait(60)}: its last words are in standard error"
            return json.loads(answer)

        yield ask
        process.stdin.close()


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with one case, in words."""
    limit = TOLERANCES[found["dtype"]]
    too_far = [f"{name}: {error:.1e} > {limit:.0e}" for name, error in found["errors"].items() if not error <= limit]
    return [f"{found['case']}: {fault}" for fault in (*found["complaints"], *too_far)]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "layout", "part"), RUNS + LONG)
def test_kernels_match_the_reference(group: str, layout: str, part: str, simulate: Simulate) -> None:
    found = simulate(group, layout, part)
    assert [each["case"] for each in found] == [case.name for case in chosen(group, layout, part)]
    assert len(found) >= 3
    wrong = [fault for each in found for fault in faults(each)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_what_no_block_writes_is_noticed(simulate: Simulate) -> None:
    """The check itself: without the last block of each launch every result is wrong."""
    found = simulate(INCOMPLETE, "contiguous", "all")
    assert len(found) == 2
    for each in found:
        assert len(faults(each)) == 4, each
