"""Calls of the operator to compare, and the CUDA kernels that they take."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from unittest import mock

import torch
from torch import Tensor

from ddf_convert import ops
from ddf_convert.bench.measure import DTYPES, LAYOUTS
from ddf_convert.cuda import dispatch
from ddf_convert.cuda.kernel_spec import KernelSpec
from ddf_convert.reference import Geometry

BATCH = 2


@dataclass(frozen=True)
class MapGeometry:
    """Map and filter window; ``padding`` comes on top of what keeps the size, None is no padding at all."""

    height: int
    width: int
    stride: int = 1
    dilation: int = 1
    padding: int | None = 0


GEOMETRIES = (
    MapGeometry(13, 16),  # rows that can be read 4 elements at a time
    MapGeometry(9, 14),  # ... 2
    MapGeometry(11, 7),  # ... 1
    MapGeometry(15, 18, stride=2),
    MapGeometry(17, 20, dilation=2),
    MapGeometry(12, 13, padding=None),
    MapGeometry(19, 21, stride=2, dilation=2),
    MapGeometry(5, 132),  # wider than a block
    MapGeometry(40, 36),  # several blocks each way
    MapGeometry(14, 16, stride=2),
    MapGeometry(20, 17, stride=3, padding=None),
    MapGeometry(22, 12, dilation=3),
    MapGeometry(8, 9, padding=2),  # windows that see nothing but zeros
    MapGeometry(1, 1),
)
COMBINED = (GEOMETRIES[0], GEOMETRIES[3])  # with every combination of combine and heads
LARGER = (GEOMETRIES[1], GEOMETRIES[2], GEOMETRIES[5], GEOMETRIES[9])  # for kernels larger than 3x3
# With one head, and with two.
CHANNELS = {1: (64, 1, 3, 8, 48, 256), 2: (64, 2, 6, 8, 48, 256)}


@dataclass(frozen=True)
class Case:
    """One call of the operator."""

    kernel: int
    dtype: str
    layout: str
    geometry: MapGeometry
    channels: int
    heads: int
    combine: str
    upscale: int = 1

    def options(self) -> tuple[int, int, int, str]:
        """Returns (stride, padding, dilation, combine), as the operators take them."""
        same = self.geometry.dilation * (self.kernel - 1) // 2
        padding = 0 if self.geometry.padding is None else same + self.geometry.padding
        return self.geometry.stride, padding, self.geometry.dilation, self.combine

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Returns random [input, channel filter, spatial filter, gradient of the output]."""
        return [tensor.normal_() for tensor in self.empty_tensors(device)]

    def empty_tensors(self, device: torch.device) -> list[Tensor]:
        """Returns the same without values."""
        stride, padding, dilation, _ = self.options()
        rows, columns = (
            ops.output_size(size, self.kernel, stride, padding, dilation)
            for size in (self.geometry.height, self.geometry.width)
        )
        maps, filters = (BATCH, self.channels), self.upscale**2
        shapes = (
            (*maps, self.geometry.height, self.geometry.width),
            (BATCH, filters * self.channels, self.kernel, self.kernel),
            (BATCH, filters * self.heads * self.kernel**2, rows, columns),
            (*maps, self.upscale * rows, self.upscale * columns),
        )
        layouts = (self.layout, "contiguous", self.layout, self.layout)
        return [
            torch.empty(shape, dtype=DTYPES[self.dtype], device=device, memory_format=LAYOUTS[layout])
            for shape, layout in zip(shapes, layouts, strict=True)
        ]

    def __str__(self) -> str:
        """Returns everything that differs between cases, in one line."""
        window = [f"{field.name} {getattr(self.geometry, field.name)}" for field in fields(MapGeometry)[2:]]
        map = f"{self.channels} channels of {self.geometry.height}x{self.geometry.width}"
        upscaled = f", upscaled {self.upscale}x" if self.upscale > 1 else ""
        kind = f"K {self.kernel}, {self.dtype}, {self.layout}{upscaled}"
        return f"{kind}, {map}, {', '.join(window)}, {self.heads} heads, {self.combine}"


def cases(dtypes: Sequence[str], kernels: Sequence[int], geometries: Sequence[MapGeometry]) -> Iterator[Case]:
    """Yields every combination for 3x3 in some geometries; elsewhere a sample in which combine and heads take turns.

    A kernel is compiled for its geometry, which takes seconds: too long to combine everything. Dtypes and layouts
    change fastest, so that each has been seen when the time is over.
    """
    turn = itertools.count()
    variants = list(itertools.product(("mul", "add"), (1, 2)))
    for kernel in kernels:
        for place, geometry in enumerate(geometries):
            every = kernel == 3 and geometry in COMBINED
            chosen = variants if every else [variants[(place + kernel // 2) % len(variants)]]
            for combine, heads in chosen:
                channels = CHANNELS[heads][next(turn) % len(CHANNELS[heads])]
                for dtype, layout in itertools.product(dtypes, LAYOUTS):
                    yield Case(kernel, dtype, layout, geometry, channels, heads, combine)


def kernels_of(
    cases: Iterable[Case], multiprocessors: int | None = None, normalized: bool = False
) -> dict[KernelSpec, None]:
    """Returns the kernels that cases take, in order; calls are dispatched and not run.

    Args:
        cases: The calls; forward and all gradients.
        multiprocessors: Of the GPU; None dispatches as for the simulator.
        normalized: Also the forward kernels that normalize the spatial filter.
    """
    found: dict[KernelSpec, None] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "_run", lambda spec, *rest: found.setdefault(spec)))
        if multiprocessors is not None:
            stack.enter_context(mock.patch.object(dispatch, "multiprocessors", return_value=multiprocessors))
        for case in cases:
            input, channel, spatial, grad = case.empty_tensors(torch.device("cpu"))
            geometry = Geometry(*case.options())
            dispatch.forward(input, channel, spatial, geometry)
            if normalized:
                dispatch.forward(input, channel, spatial, geometry, norm_scale=1.0)
            dispatch.backward(grad, input, channel, spatial, geometry, (True, True, True))
    return found
