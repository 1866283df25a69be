"""What is measured beside the operator: convolutions, the module, and the operator in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert import ops, reference
from ddf_convert.bench.measure import placed, random_leaf
from ddf_convert.cost.timing import copies_needed
from ddf_convert.layers import DDF2d

OP, MODULE, DENSE, DEPTHWISE = "DDF op", "DDF module", "Conv", "DwConv"
UNFOLD, SLICES, COMPILED = "unfold", "slices", "slices compiled"
TF32 = " TF32"  # ends the name of a column


@dataclass(frozen=True)
class Workload:
    """One size: the input is (batch, channels, size, size), the filters keep its size.

    Attributes:
        size: Rows, and columns, in pixels.
        channels: C.
        batch: B.
        kernel_size: K.
        dtype: One of ``DTYPES``.
        layout: One of ``LAYOUTS``.
        device: Where.
    """

    size: int
    channels: int
    batch: int
    kernel_size: int
    dtype: str
    layout: str
    device: torch.device


@dataclass(frozen=True)
class Column:
    """One of the things measured.

    Attributes:
        name: As the tables call it.
        function: Of the first tensors of an :func:`operands`.
        takes: How many of them.
        tf32: Whether its float32 products may be TF32.
        own: Whether it is ours, whose failure is an error and not a gap in the table.
    """

    name: str
    function: Callable[..., Tensor]
    takes: int
    tf32: bool = False
    own: bool = False


def operands(work: Workload) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sets of (input, channel filter, spatial filter) that want gradients; on a GPU more than its cache holds."""
    maps, filters = (work.batch, work.channels), (work.kernel_size, work.kernel_size)
    shapes = ((*maps, work.size, work.size), (*maps, *filters), (work.batch, math.prod(filters), work.size, work.size))
    layouts = (work.layout, "contiguous", work.layout)

    def made() -> tuple[Tensor, Tensor, Tensor]:
        input, channel, spatial = (
            random_leaf(shape, work.dtype, layout, work.device) for shape, layout in zip(shapes, layouts, strict=True)
        )
        return input, channel, spatial

    first = made()
    return [first, *(made() for _ in range(copies_needed(first, work.device) - 1))]


def columns(work: Workload, compiled: bool) -> Iterator[Column]:
    """Everything to measure for a workload; the modules are on its device, in its dtype and layout.

    Args:
        work: The size.
        compiled: Also the reference under torch.compile, which takes long to compile.
    """
    channels, kernel, padding = work.channels, work.kernel_size, work.kernel_size // 2

    def ready(module: nn.Module) -> nn.Module:
        return placed(module, work.dtype, work.layout, work.device)

    def unfolded(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        batch, _, height, width = input.shape
        windows = F.unfold(input, kernel, padding=padding).view(batch, channels, kernel**2, height, width)
        filters = channel.view(batch, channels, -1, 1, 1) * spatial.view(batch, 1, -1, height, width)
        return (windows * filters).sum(2)

    def sliced(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return reference.forward(input, channel, spatial, reference.Geometry(padding=padding))

    def operator(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return ops.ddf(input, channel, spatial, padding=padding)

    dense = ready(nn.Conv2d(channels, channels, kernel, padding=padding, bias=False))
    depthwise = ready(nn.Conv2d(channels, channels, kernel, padding=padding, groups=channels, bias=False))
    module = ready(DDF2d(channels, kernel))
    yield Column(DENSE, dense, 1)
    yield Column(DEPTHWISE, depthwise, 1)
    yield Column(OP, operator, 3, own=True)
    yield Column(MODULE, module, 1, own=True)
    if work.device.type == "cuda" and work.dtype == "float32":
        yield Column(DENSE + TF32, dense, 1, tf32=True)
        yield Column(DEPTHWISE + TF32, depthwise, 1, tf32=True)
        yield Column(MODULE + TF32, module, 1, tf32=True, own=True)
    yield Column(UNFOLD, unfolded, 3)
    yield Column(SLICES, sliced, 3)
    if compiled:
        torch.compiler.reset()  # after a few sizes torch.compile gives up on a function, and runs it as it is
        yield Column(COMPILED, torch.compile(sliced, dynamic=False), 3)
