"""Upsampling layers: DDF-Up beside interpolation, a transposed convolution, and content-aware filters by unfolding.

Source of the last: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, section 3; the layer here is
written from its equations, with their widths (64 channels in the middle), in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert import ops
from ddf_convert.bench.measure import Figures, figures, figures_or_error, placed, random_leaf
from ddf_convert.bench.memory import kept_when_freed
from ddf_convert.bench.op import check_kernel
from ddf_convert.cost.timing import copies_needed
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDFUp2d
from ddf_convert.utils.device import describe

RESOLUTIONS = (28, 56, 112)
BATCH = {"cuda": 16, "cpu": 1}
UP, SEPARATE, BILINEAR, TRANSPOSED, UNFOLDED = "DDF-Up", "DDF-Up apart", "bilinear", "transposed conv", "unfold"
_MIDDLE = 64  # channels from which the unfolding peer predicts its filters


@dataclass(frozen=True)
class Settings:
    """What to measure: the input is (batch, channels, size, size) for each of the resolutions.

    Attributes:
        resolutions: Sizes of the input, in pixels.
        channels: C.
        scale_factor: s.
        batch: B.
        kernel_size: K of the filters; the transposed convolution's is 2 * s.
        dtype: One of ``device.DTYPES``.
        layout: One of ``device.LAYOUTS``.
        device: Where.
        seconds: To spend on each time, at least.

    Raises:
        UsageError: K is even or below 3, or the factor is odd, for which the transposed convolution has no center.
    """

    resolutions: tuple[int, ...]
    channels: int
    scale_factor: int
    batch: int
    kernel_size: int
    dtype: str
    layout: str
    device: torch.device
    seconds: float

    def __post_init__(self) -> None:
        check_kernel(self.kernel_size)
        if self.scale_factor < 2 or self.scale_factor % 2:
            raise UsageError(f"--scale-factor {self.scale_factor}: must be even, and at least 2")


class UnfoldedUp(nn.Module):
    """Content-aware upsampling with the windows of all pixels in memory at once.

    Args:
        channels: C.
        scale_factor: s.
        kernel_size: K.
    """

    def __init__(self, channels: int, scale_factor: int, kernel_size: int) -> None:
        super().__init__()
        self.scale_factor, self.kernel_size = scale_factor, kernel_size
        self.compress = nn.Conv2d(channels, _MIDDLE, 1)
        self.encode = nn.Conv2d(_MIDDLE, scale_factor**2 * kernel_size**2, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, s*H, s*W)."""
        batch, channels, height, width = input.shape
        taps = self.kernel_size**2
        filters = self.encode(self.compress(input)).view(batch, -1, taps, height, width).softmax(2)
        windows = F.unfold(input, self.kernel_size, padding=self.kernel_size // 2)
        windows = windows.view(batch, channels, taps, height, width)
        maps = torch.einsum("bckhw,bskhw->bcshw", windows, filters)
        return F.pixel_shuffle(maps.flatten(1, 2), self.scale_factor)


class SeparateUp(nn.Module):
    """DDF-Up with a call of the operator for each of its branches: what the fused layer is to be faster than."""

    def __init__(self, layer: DDFUp2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, s*H, s*W)."""
        padding = self.layer.kernel_size[0] // 2
        maps = [
            ops.ddf(input, channel(input), spatial(input), padding=padding)
            for channel, spatial in zip(self.layer.channel_branch, self.layer.spatial_branch, strict=True)
        ]
        return F.pixel_shuffle(torch.stack(maps, 2).flatten(1, 2), self.layer.scale_factor)


def layers(settings: Settings) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Everything to measure, by name, on its device, in its dtype and layout."""
    channels, factor = settings.channels, settings.scale_factor

    def ready(module: nn.Module) -> nn.Module:
        return placed(module, settings.dtype, settings.layout, settings.device)

    up = DDFUp2d(channels, factor, settings.kernel_size)
    transposed = nn.ConvTranspose2d(channels, channels, 2 * factor, factor, factor // 2)
    yield UP, ready(up)
    yield SEPARATE, ready(SeparateUp(up))
    yield BILINEAR, lambda input: F.interpolate(input, scale_factor=factor, mode="bilinear")
    yield TRANSPOSED, ready(transposed)
    yield UNFOLDED, ready(UnfoldedUp(channels, factor, settings.kernel_size))


def run(settings: Settings, say: Callable[[str], object] = lambda words: None) -> dict[str, Any]:
    """Measures everything.

    Args:
        settings: What.
        say: Told what is being measured.

    Returns:
        ``results[layout][size][name]`` are the :class:`Figures`; beside them, what they were measured on.
    """
    torch.manual_seed(0)
    rows: dict[str, dict[str, Figures]] = {}
    with kept_when_freed():
        for size in settings.resolutions:
            shape = (settings.batch, settings.channels, size, size)
            first = random_leaf(shape, settings.dtype, settings.layout, settings.device)
            copies = copies_needed([first], settings.device) - 1
            inputs = [(first,), *((torch.randn_like(first).requires_grad_(),) for _ in range(copies))]
            row = rows[str(size)] = {}
            for name, layer in layers(settings):
                say(f"Measuring {name}, {settings.dtype}, {settings.layout}, {size}x{size}")
                measure = figures if name == UP else figures_or_error
                row[name] = measure(layer, inputs, settings.device, settings.seconds)
    return {
        "bench": "up",
        "machine": describe(settings.device),
        "dtype": settings.dtype,
        "kernel_size": settings.kernel_size,
        "scale_factor": settings.scale_factor,
        "channels": settings.channels,
        "batches": dict.fromkeys(rows, settings.batch),
        "results": {settings.layout: rows},
    }
