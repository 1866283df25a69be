"""The operator and its peers at the sizes of the paper's Table 2.

Source of the sizes: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, table 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ddf_convert.bench import device as devices
from ddf_convert.bench.bandwidth import copy_bandwidth, forward_backward_bytes, forward_bytes
from ddf_convert.bench.measure import Figures, figures, figures_or_error
from ddf_convert.bench.memory import kept_when_freed
from ddf_convert.bench.peers import OP, Workload, columns, operands
from ddf_convert.errors import UsageError
from ddf_convert.utils.device import describe

RESOLUTIONS = (7, 14, 28, 56, 112, 224)  # Table 2
BATCH = {"cuda": 32, "cpu": 4}  # Table 2 has 32
_LARGEST_ON_CPU = 4 * 256 * 112**2  # elements of a map: at 224x224 and 256 channels one image is enough to wait for


@dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
        resolutions: Sizes of the maps, in pixels.
        channels: C.
        batch: B; on the CPU large maps get fewer images.
        kernel_size: K.
        dtype: One of ``device.DTYPES``.
        layouts: Of ``device.LAYOUTS``.
        device: Where.
        seconds: To spend on each time, at least.
        compiled: Also the reference under torch.compile.

    Raises:
        UsageError: K is even or below 3.
    """

    resolutions: tuple[int, ...]
    channels: int
    batch: int
    kernel_size: int
    dtype: str
    layouts: tuple[str, ...]
    device: torch.device
    seconds: float
    compiled: bool

    def __post_init__(self) -> None:
        check_kernel(self.kernel_size)

    def workload(self, layout: str, size: int) -> Workload:
        """One size of these, with as many images as are worth waiting for."""
        batch = self.batch
        if self.device.type == "cpu":
            batch = max(1, min(batch, _LARGEST_ON_CPU // (self.channels * size**2)))
        return Workload(size, self.channels, batch, self.kernel_size, self.dtype, layout, self.device)


def check_kernel(kernel_size: int) -> None:
    """Raises a UsageError unless FilterNorm has a filter to normalize, with a center."""
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise UsageError(f"--kernel-size {kernel_size}: must be odd, and at least 3")


def run(settings: Settings, say: Callable[[str], object] = lambda words: None) -> dict[str, Any]:
    """Measures everything.

    Args:
        settings: What.
        say: Told what is being measured.

    Returns:
        ``results[layout][size][column]`` are the :class:`Figures`; beside them, what they were measured on.
    """
    torch.manual_seed(0)
    results: dict[str, dict[str, dict[str, Figures]]] = {layout: {} for layout in settings.layouts}
    batches: dict[str, int] = {}
    with kept_when_freed():
        say("Measuring the bandwidth of a copy")
        bandwidth = copy_bandwidth(settings.device, settings.seconds)
        for layout in settings.layouts:
            for size in settings.resolutions:
                work = settings.workload(layout, size)
                batches[str(size)] = work.batch
                row = results[layout][str(size)] = {}
                measure(work, settings.seconds, settings.compiled, bandwidth, row, say)
    return {
        "bench": "op",
        "machine": describe(settings.device),
        "dtype": settings.dtype,
        "kernel_size": settings.kernel_size,
        "channels": settings.channels,
        "batches": batches,
        "copy_gb_per_s": bandwidth / 1e9,
        "results": results,
    }


def measure(
    work: Workload,
    seconds: float,
    compiled: bool,
    bandwidth: float,
    row: dict[str, Figures],
    say: Callable[[str], object] = lambda words: None,
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Measures one size.

    Args:
        work: The size.
        seconds: To spend on each time, at least.
        compiled: Also the reference under torch.compile.
        bandwidth: Of a copy, in bytes a second; the operator's figures get their share of it.
        row: Gets the figures of each column as soon as they are there.
        say: Told what is being measured.
        only: Of a column's name: whether to measure it.
    """
    sets = operands(work)
    for column in columns(work, compiled):
        if not only(column.name):
            continue
        say(f"Measuring {column.name}, {work.dtype}, {work.layout}, {work.size}x{work.size}")
        inputs = [tensors[: column.takes] for tensors in sets]
        with devices.convolution_settings(column.tf32):
            measured = (figures if column.own else figures_or_error)(column.function, inputs, work.device, seconds)
        if column.name == OP:
            output = sets[0][0]  # as large as the input
            for name, floor in (
                ("forward", forward_bytes(*sets[0], output)),
                ("forward_backward", forward_backward_bytes(*sets[0], output)),
            ):
                measured[f"{name}_of_copy"] = floor / (measured[f"{name}_ms"] / 1e3) / bandwidth
        row[column.name] = measured
