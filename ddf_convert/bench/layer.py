"""One layer: the convolution, DDF2d, and DDFConv2d, which mixes the channels too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddf_convert.bench.measure import (
    ConvBenchSettings,
    Figures,
    Progress,
    convolution_settings,
    keep_freed_memory,
    map_sets,
    measure,
    move,
    no_progress,
)
from ddf_convert.cost import count
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.layers import DDF2d, DDFConv2d

BATCH = {"cuda": 32, "cpu": 4}


@dataclass(frozen=True, kw_only=True)
class LayerSettings(ConvBenchSettings):
    """What to measure: the input is (batch, channels, size, size); the padding keeps its size at stride 1.

    Attributes:
        size: Rows, and columns, in pixels.
        stride: Stride in pixels.
        dilation: Dilation in pixels.
        heads: Heads of the DDF layers.
        se_ratio: Squeeze of their channel branch.
        combine: "mul" or "add".
        layout: A key of ``LAYOUTS``.
        tf32: Whether float32 products may be TF32 on a GPU.

    Raises:
        UsageError: The kernel size is wrong, the heads do not divide the channels, or the squeeze is not above 0.
    """

    size: int
    stride: int
    dilation: int
    heads: int
    se_ratio: float
    combine: str
    layout: str
    tf32: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.channels % self.heads:
            raise UsageError(f"--heads {self.heads}: must divide the {self.channels} channels")
        if not 0 < self.se_ratio < math.inf:
            raise UsageError(f"--se-ratio {self.se_ratio}: must be above 0 and finite")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the input."""
        return self.batch, self.channels, self.size, self.size

    def layers(self) -> dict[str, nn.Module]:
        """Returns the layers by name, in float32 on the CPU."""
        conv: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation}
        ddf = {**conv, "heads": self.heads, "se_ratio": self.se_ratio, "combine": self.combine}
        padding = self.dilation * (self.kernel_size - 1) // 2
        channels, kernel = self.channels, self.kernel_size
        return {
            "Conv2d": nn.Conv2d(channels, channels, kernel, padding=padding, bias=False, **conv),
            "DDF2d": DDF2d(channels, kernel, **ddf),
            "DDFConv2d": DDFConv2d(channels, channels, kernel, **ddf),
        }


def run(settings: LayerSettings, progress: Progress = no_progress) -> dict[str, Any]:
    """Measures the three layers.

    Returns:
        ``results[layer]`` are the :class:`Figures`, with ``parameters`` and ``macs``; beside them, the settings.

    Raises:
        DDFError: They do not fit the memory.
    """
    torch.manual_seed(0)
    device, dtype, layout = settings.device, settings.dtype, settings.layout
    results: dict[str, Figures] = {}
    try:
        inputs = map_sets(settings.shape, dtype, layout, device)
        with keep_freed_memory(), convolution_settings(settings.tf32):
            for name, layer in settings.layers().items():
                progress(f"Measuring {name}")
                cost = count.measure(layer, torch.empty(settings.shape, device="meta"))
                figures = measure(move(layer, dtype, layout, device), inputs, device, settings.seconds)
                results[name] = {**figures, "parameters": cost.params, "macs": cost.macs}
    except torch.OutOfMemoryError as error:
        raise DDFError("out of memory: give a smaller --batch or --size") from error
    return settings.document("layer", settings=settings.to_dict(), results=results)
