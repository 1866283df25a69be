"""One layer: the convolution, DDF2d, and DDFConv2d, which mixes the channels too."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.bench import device as devices
from ddf_convert.bench.measure import Figures, figures, placed, random_leaf
from ddf_convert.bench.memory import kept_when_freed
from ddf_convert.bench.op import check_kernel
from ddf_convert.cost import count
from ddf_convert.cost.timing import copies_needed
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.layers import DDF2d, DDFConv2d
from ddf_convert.utils.device import describe

BATCH = {"cuda": 32, "cpu": 4}


@dataclass(frozen=True)
class Settings:
    """What to measure: the input is (batch, channels, size, size), the padding keeps its size at stride 1.

    Attributes:
        channels: C, in and out.
        size: Rows, and columns, in pixels.
        kernel_size: K.
        stride: In pixels.
        dilation: In pixels.
        heads: G, of the DDF layers.
        se_ratio: Squeeze of their channel branch.
        combine: "mul" or "add".
        batch: B.
        dtype: One of ``device.DTYPES``.
        layout: One of ``device.LAYOUTS``.
        device: Where.
        seconds: To spend on each time, at least.
        tf32: Whether float32 products may be TF32 on a GPU.

    Raises:
        UsageError: K is even or below 3, the heads do not divide the channels, or the squeeze is not above 0.
    """

    channels: int
    size: int
    kernel_size: int
    stride: int
    dilation: int
    heads: int
    se_ratio: float
    combine: str
    batch: int
    dtype: str
    layout: str
    device: torch.device
    seconds: float
    tf32: bool

    def __post_init__(self) -> None:
        check_kernel(self.kernel_size)
        if self.heads < 1 or self.channels % self.heads:
            raise UsageError(f"--heads {self.heads}: must divide the {self.channels} channels")
        if not 0 < self.se_ratio < math.inf:
            raise UsageError(f"--se-ratio {self.se_ratio}: must be above 0 and finite")

    def layers(self) -> dict[str, nn.Module]:
        """The layers by name, in float32 on the CPU."""
        conv: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation}
        ddf = {**conv, "heads": self.heads, "se_ratio": self.se_ratio, "combine": self.combine}
        padding = self.dilation * (self.kernel_size - 1) // 2
        channels, kernel = self.channels, self.kernel_size
        return {
            "Conv2d": nn.Conv2d(channels, channels, kernel, padding=padding, bias=False, **conv),
            "DDF2d": DDF2d(channels, kernel, **ddf),
            "DDFConv2d": DDFConv2d(channels, channels, kernel, **ddf),
        }

    def input(self) -> Tensor:
        """Random, of the dtype and layout, on the device."""
        shape = (self.batch, self.channels, self.size, self.size)
        return random_leaf(shape, self.dtype, self.layout, self.device)

    def place(self, layer: nn.Module) -> nn.Module:
        """The layer itself, of the dtype and layout, on the device."""
        return placed(layer, self.dtype, self.layout, self.device)


def run(settings: Settings, say: Callable[[str], object] = lambda words: None) -> dict[str, Any]:
    """Measures the three layers.

    Args:
        settings: What.
        say: Told what is being measured.

    Returns:
        ``results[layer]`` are the :class:`Figures`, with ``parameters`` and ``macs``; beside them, the settings.

    Raises:
        DDFError: They do not fit the memory.
    """
    torch.manual_seed(0)
    results: dict[str, Figures] = {}
    try:
        first = settings.input()
        inputs = [(first,), *((settings.input(),) for _ in range(copies_needed([first], settings.device) - 1))]
        with kept_when_freed(), devices.convolution_settings(settings.tf32):
            for name, layer in settings.layers().items():
                say(f"Measuring {name}")
                cost = count.measure(layer, torch.empty(first.shape, device="meta"))
                measured = figures(settings.place(layer), inputs, settings.device, settings.seconds)
                results[name] = {**measured, "parameters": cost.params, "macs": cost.macs}
    except torch.OutOfMemoryError as error:
        raise DDFError("out of memory: give a smaller --batch or --size") from error
    return {
        "bench": "layer",
        "machine": describe(settings.device),
        "settings": {**asdict(settings), "device": str(settings.device)},
        "results": results,
    }
