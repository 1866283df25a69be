"""A tensor of more than 2^31 elements, and compute-sanitizer on a small run."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddf_convert import ops, reference
from ddf_convert.bench.measure import LAYOUTS
from gpu.correctness import GRADIENTS, TOLERANCES, error
from gpu.run import Run, check, skip

CHANNELS, SIDE = 8, 16400  # 2.15e9 elements
DRY_SIDE = 70
CORNER = 33  # pixels each way that are compared
CHUNK = 1024  # rows at a time, where float64 copies of everything would not fit
MAP_GRADIENTS = (GRADIENTS[0], GRADIENTS[2])


def large(run: Run, record: dict[str, Any]) -> None:
    """Compares forward and backward beyond 32-bit indices at the four corners, in both layouts."""
    side = DRY_SIDE if run.dry else SIDE
    record["elements"] = CHANNELS * side**2
    if run.without_gpu(record, f"a tensor of {CHANNELS * SIDE**2:.3g} elements; dry run with {CHANNELS * side**2}"):
        needed = 0
    else:
        # In bfloat16: four maps (input, output, both gradients), two spatial filters and what the random numbers take.
        needed = 2 * side**2 * (4 * CHANNELS + 2 * 9) + 4 * CHANNELS * side**2
    for layout in LAYOUTS:
        run.need(20 if needed else 1, f"{layout}")
        if needed and torch.cuda.mem_get_info(run.device)[0] < needed:
            skip(record, layout, f"needs {needed / 2**30:.0f} GiB of free GPU memory")
            continue
        _corners(run, record, side, layout)
        if needed:
            torch.cuda.empty_cache()
        run.save()


def _corners(run: Run, record: dict[str, Any], side: int, layout: str) -> None:
    torch.manual_seed(0)

    # Nothing negative: the channel filter's gradient is a sum over all pixels, in which random signs would hide a gap.
    def random(*shape: int, like: str = layout) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=run.device, memory_format=LAYOUTS[like]).uniform_()

    input, spatial = random(1, CHANNELS, side, side), random(1, 9, side, side)
    channel = random(1, CHANNELS, 3, 3, like="contiguous")
    output = ops.ddf(input, channel, spatial, padding=1)
    grad = random(1, CHANNELS, side, side)
    gradients = torch.ops.ddf_convert.ddf_backward(grad, input, channel, spatial, [True] * 3, 1, 1, 1, "mul")

    worst = dict.fromkeys(("forward", *MAP_GRADIENTS), 0.0)
    for bottom, right in itertools.product((False, True), repeat=2):
        cut = [_corner(tensor, bottom, right).double() for tensor in (input, spatial, grad)]
        exact = _expected(cut, channel.double(), bottom, right)  # nothing is negative: these are the terms, too
        found = [_corner(tensor, bottom, right, CORNER) for tensor in (output, gradients[0], gradients[2])]
        for name, one, other in zip(worst, found, exact, strict=True):
            worst[name] = max(worst[name], error(one, other, other))
    for name, value in worst.items():
        check(record, f"{name}, the four corners, {layout}: error {value:.1e}", value <= TOLERANCES["bfloat16"])

    center = _center_tap(input, spatial, grad)
    value = error(gradients[1][:, :, 1, 1], center, center)
    check(record, f"{GRADIENTS[1]}, center tap, {layout}: error {value:.1e}", value <= TOLERANCES["bfloat16"])


def _corner(tensor: Tensor, bottom: bool, right: bool, size: int = CORNER + 2) -> Tensor:
    rows = slice(-size, None) if bottom else slice(size)
    columns = slice(-size, None) if right else slice(size)
    return tensor[:, :, rows, columns]


def _expected(cut: list[Tensor], channel: Tensor, bottom: bool, right: bool) -> list[Tensor]:
    """Returns output and gradients of the maps at a corner; the cut is larger, as it is wrong at its inner edge."""
    input, spatial, grad = cut
    geometry = reference.Geometry(padding=1)
    output = reference.forward(input, channel, spatial, geometry)
    by_input, _, by_spatial = reference.backward(grad, input, channel, spatial, geometry, (True, False, True))
    assert by_input is not None
    assert by_spatial is not None
    return [_corner(tensor, bottom, right, CORNER) for tensor in (output, by_input, by_spatial)]


def _center_tap(input: Tensor, spatial: Tensor, grad: Tensor) -> Tensor:
    """Returns the channel filter's gradient at the center tap, (1, C)."""
    total = torch.zeros(input.shape[:2], dtype=torch.float64, device=input.device)
    for top in range(0, input.shape[2], CHUNK):
        rows = slice(top, top + CHUNK)
        total += (input[:, :, rows].double() * grad[:, :, rows].double() * spatial[:, 4:5, rows].double()).sum((2, 3))
    return total


def sanitizer(run: Run, record: dict[str, Any]) -> None:
    """Runs compute-sanitizer's memcheck and racecheck on a small run in another process."""
    if run.without_gpu(record, "compute-sanitizer"):
        return
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{folder}/bin" for folder in folders)])
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        skip(record, "compute-sanitizer", "not installed")
        return
    script = Path(__file__).parent.parent / "gpu_check.py"
    # Without torch's cache every tensor is an allocation of its own, whose end the tool knows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in ("memcheck", "racecheck"):
        run.need(25, f"compute-sanitizer {name}")
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, str(script), "--small-run"]
        try:
            ran = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=max(1.0, run.left() - 5)
            )
        except subprocess.TimeoutExpired:
            skip(record, f"compute-sanitizer {name}", "did not end in the time that was left")
            continue
        record[f"{name}_output"] = (ran.stdout + ran.stderr).strip().splitlines()[-12:]
        check(record, f"compute-sanitizer {name}", ran.returncode == 0)
        run.save()
