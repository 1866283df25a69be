"""The CUDA kernels in Numba's simulator against the reference in float64; see cuda_simulator.py for how and what."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda_simulator import GROUPS, LAYOUTS, SPOILT, TOLERANCES

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
PROGRAM = Path(__file__).with_name("cuda_simulator.py")


def simulate(group: str, layout: str) -> list[dict[str, Any]]:
    """Runs a group in a process of its own: Numba decides whether to simulate when it is imported."""
    result = subprocess.run(
        [sys.executable, str(PROGRAM), group, layout],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def faults(found: dict[str, Any]) -> list[str]:
    """What is wrong with one case, in words."""
    limit = TOLERANCES[found["dtype"]]
    too_far = [f"{name}: {error:.1e} > {limit:.0e}" for name, error in found["errors"].items() if not error <= limit]
    return [f"{found['case']}: {fault}" for fault in (*found["complaints"], *too_far)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group", GROUPS)
def test_kernels_match_the_reference(group: str, layout: str) -> None:
    found = simulate(group, layout)
    assert [each["case"] for each in found] == [case.name for case in GROUPS[group]]
    wrong = [fault for each in found for fault in faults(each)]
    assert not wrong, "\n".join(wrong)


def test_what_no_block_writes_is_noticed() -> None:
    """The check itself: without the last block of each launch every result is wrong."""
    found = simulate(SPOILT, "contiguous")
    assert len(found) == 2
    for each in found:
        assert len(faults(each)) == 4, each
