"""The operator at the sizes of the paper's Table 2, beside convolutions, the module and plain PyTorch.

Source of the sizes: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, table 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert import ops, reference
from ddf_convert.bench.measure import (
    ConvBenchSettings,
    Figures,
    Implementation,
    Progress,
    convolution_settings,
    copy_bandwidth,
    forward_backward_bytes,
    forward_bytes,
    input_sets,
    keep_freed_memory,
    move,
    no_progress,
    random_leaf,
)
from ddf_convert.layers import DDF2d

RESOLUTIONS = (7, 14, 28, 56, 112, 224)  # Table 2
BATCH = {"cuda": 32, "cpu": 4}  # Table 2 has 32
OP, MODULE, DENSE, DEPTHWISE = "DDF op", "DDF module", "Conv", "DwConv"
UNFOLD, SLICES, COMPILED = "unfold", "slices", "slices compiled"
TF32 = " TF32"  # suffix of a name
_MAX_ELEMENTS_ON_CPU = 4 * 256 * 112**2  # of a map: at 224x224 and 256 channels one image takes long enough


@dataclass(frozen=True)
class OpWorkload:
    """One size: the input is (batch, channels, size, size), and the filters keep its size.

    Attributes:
        size: Rows, and columns, in pixels.
        channels: C.
        batch: B.
        kernel_size: K.
        dtype: A key of ``DTYPES``.
        layout: A key of ``LAYOUTS``.
        device: The device to measure.
    """

    size: int
    channels: int
    batch: int
    kernel_size: int
    dtype: str
    layout: str
    device: torch.device

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns random (input, channel filter, spatial filter) that require gradients."""
        filters = (self.kernel_size, self.kernel_size)
        input = self._leaf(self.layout, self.channels, self.size, self.size)
        channel = self._leaf("contiguous", self.channels, *filters)
        return input, channel, self._leaf(self.layout, self.kernel_size**2, self.size, self.size)

    def _leaf(self, layout: str, *shape: int) -> Tensor:
        return random_leaf((self.batch, *shape), self.dtype, layout, self.device)

    def implementations(self, compiled: bool) -> Iterator[Implementation]:
        """Yields everything to measure; modules are on the device, in the dtype and layout.

        Args:
            compiled: Also the reference under torch.compile, which takes long to compile.
        """
        channels, kernel, padding = self.channels, self.kernel_size, self.kernel_size // 2

        def unfold(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
            batch, _, height, width = input.shape
            windows = F.unfold(input, kernel, padding=padding).view(batch, channels, kernel**2, height, width)
            filters = channel.view(batch, channels, -1, 1, 1) * spatial.view(batch, 1, -1, height, width)
            return (windows * filters).sum(2)

        def slices(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
            return reference.forward(input, channel, spatial, reference.Geometry(padding=padding))

        def operator(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
            return ops.ddf(input, channel, spatial, padding=padding)

        dense, depthwise, module = (
            move(module, self.dtype, self.layout, self.device)
            for module in (
                nn.Conv2d(channels, channels, kernel, padding=padding, bias=False),
                nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, bias=False),
                DDF2d(channels, kernel),
            )
        )
        yield Implementation(DENSE, dense)
        yield Implementation(DEPTHWISE, depthwise)
        yield Implementation(OP, operator, inputs=3, own=True)
        yield Implementation(MODULE, module, own=True)
        if self.device.type == "cuda" and self.dtype == "float32":
            yield Implementation(DENSE + TF32, dense, tf32=True)
            yield Implementation(DEPTHWISE + TF32, depthwise, tf32=True)
            yield Implementation(MODULE + TF32, module, tf32=True, own=True)
        yield Implementation(UNFOLD, unfold, inputs=3)
        yield Implementation(SLICES, slices, inputs=3)
        if compiled:
            torch.compiler.reset()  # after a few sizes torch.compile gives up on a function and runs it uncompiled
            yield Implementation(COMPILED, torch.compile(slices, dynamic=False), inputs=3)


@dataclass(frozen=True, kw_only=True)
class OpSettings(ConvBenchSettings):
    """What to measure. On the CPU, large maps get fewer images than ``batch``.

    Attributes:
        resolutions: Sizes of the maps, in pixels.
        layouts: Keys of ``LAYOUTS``.
        compiled: Also measure the reference under torch.compile.
    """

    resolutions: tuple[int, ...]
    layouts: tuple[str, ...]
    compiled: bool

    def workload(self, layout: str, size: int) -> OpWorkload:
        """Returns one size."""
        batch = self.batch
        if self.device.type == "cpu":
            batch = max(1, min(batch, _MAX_ELEMENTS_ON_CPU // (self.channels * size**2)))
        return OpWorkload(size, self.channels, batch, self.kernel_size, self.dtype, layout, self.device)


def run(settings: OpSettings, progress: Progress = no_progress) -> dict[str, Any]:
    """Measures every layout and size.

    Returns:
        ``results[layout][size][implementation]`` are the :class:`Figures`; beside them, what they were measured on.
    """
    torch.manual_seed(0)
    results: dict[str, dict[str, dict[str, Figures]]] = {layout: {} for layout in settings.layouts}
    batches: dict[str, int] = {}
    with keep_freed_memory():
        progress("Measuring the bandwidth of a copy")
        bandwidth = copy_bandwidth(settings.device, settings.seconds)
        for layout in settings.layouts:
            for size in settings.resolutions:
                work = settings.workload(layout, size)
                batches[str(size)] = work.batch
                row = results[layout][str(size)] = {}
                measure_workload(work, settings.seconds, settings.compiled, bandwidth, row, progress)
    return settings.document(
        "op",
        dtype=settings.dtype,
        kernel_size=settings.kernel_size,
        channels=settings.channels,
        batches=batches,
        copy_gb_per_s=bandwidth / 1e9,
        results=results,
    )


def measure_workload(
    work: OpWorkload,
    seconds: float,
    compiled: bool,
    bandwidth: float,
    row: dict[str, Figures],
    progress: Progress = no_progress,
    only: Callable[[str], bool] = lambda name: True,
) -> None:
    """Measures one size.

    Args:
        work: The size.
        seconds: Minimum time to spend on each figure.
        compiled: Also measure the reference under torch.compile.
        bandwidth: Bandwidth of a copy in bytes a second; the operator's figures get their share of it.
        row: Receives the figures of each implementation as soon as they are there.
        progress: Receives what is measured next.
        only: Whether to measure the implementation of this name.
    """
    sets = input_sets(work.inputs, work.device)
    for implementation in work.implementations(compiled):
        if not only(implementation.name):
            continue
        progress(f"Measuring {implementation.name}, {work.dtype}, {work.layout}, {work.size}x{work.size}")
        with convolution_settings(implementation.tf32):
            figures = implementation.measure(sets, work.device, seconds)
        if implementation.name == OP:
            figures |= _shares_of_copy(figures, sets[0], bandwidth)
        row[implementation.name] = figures


def _shares_of_copy(figures: Figures, inputs: Sequence[Tensor], bandwidth: float) -> dict[str, float]:
    """The operator's share of the bandwidth of a copy, forward and with backward."""
    input, channel, spatial = inputs
    tensors = (input, channel, spatial, input)  # the output is as large as the input
    counts = {"forward": forward_bytes(*tensors), "forward_backward": forward_backward_bytes(*tensors)}
    return {f"{name}_of_copy": count / (figures[f"{name}_ms"] / 1e3) / bandwidth for name, count in counts.items()}
