"""Upsampling layers: DDF-Up beside interpolation, a transposed convolution, and content-aware filters by unfolding.

Source of the last: Wang et al., "CARAFE: Content-Aware ReAssembly of FEatures", ICCV 2019, section 3; the layer here is
written from its equations, with their widths (64 channels in the middle), in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert import ops
from ddf_convert.bench.measure import (
    ConvBenchSettings,
    Figures,
    Implementation,
    Progress,
    keep_freed_memory,
    map_sets,
    move,
    no_progress,
)
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDFUp2d

RESOLUTIONS = (28, 56, 112)
BATCH = {"cuda": 16, "cpu": 1}
UP, SEPARATE, BILINEAR, TRANSPOSED, UNFOLDED = "DDF-Up", "DDF-Up apart", "bilinear", "transposed conv", "unfold"
_CARAFE_CHANNELS = 64  # from which it predicts its filters


@dataclass(frozen=True, kw_only=True)
class UpSettings(ConvBenchSettings):
    """What to measure: the input is (batch, channels, size, size); the transposed convolution's kernel is 2 * s.

    Attributes:
        resolutions: Sizes of the input, in pixels.
        scale_factor: s.
        layout: A key of ``LAYOUTS``.

    Raises:
        UsageError: The kernel size is wrong, or the factor is odd: the transposed convolution has no center.
    """

    resolutions: tuple[int, ...]
    scale_factor: int
    layout: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale_factor < 2 or self.scale_factor % 2:
            raise UsageError(f"--scale-factor {self.scale_factor}: must be even, and at least 2")

    def implementations(self) -> Iterator[Implementation]:
        """Yields everything to measure, on its device, in its dtype and layout."""
        channels, factor = self.channels, self.scale_factor

        def moved(module: nn.Module) -> nn.Module:
            return move(module, self.dtype, self.layout, self.device)

        up = DDFUp2d(channels, factor, self.kernel_size)
        transposed = nn.ConvTranspose2d(channels, channels, 2 * factor, factor, factor // 2)
        yield Implementation(UP, moved(up), own=True)
        yield Implementation(SEPARATE, moved(SeparateUp(up)))
        yield Implementation(BILINEAR, lambda input: F.interpolate(input, scale_factor=factor, mode="bilinear"))
        yield Implementation(TRANSPOSED, moved(transposed))
        yield Implementation(UNFOLDED, moved(UnfoldedUp(channels, factor, self.kernel_size)))


class UnfoldedUp(nn.Module):
    """Content-aware upsampling with the windows of all pixels in memory at once."""

    def __init__(self, channels: int, scale_factor: int, kernel_size: int) -> None:
        super().__init__()
        self.scale_factor, self.kernel_size = scale_factor, kernel_size
        self.compress = nn.Conv2d(channels, _CARAFE_CHANNELS, 1)
        self.encode = nn.Conv2d(_CARAFE_CHANNELS, scale_factor**2 * kernel_size**2, 3, padding=1)

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
    """DDF-Up with a call of the operator for each of its branches: the baseline of the fused layer."""

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


def run(settings: UpSettings, progress: Progress = no_progress) -> dict[str, Any]:
    """Measures every size.

    Returns:
        ``results[layout][size][implementation]`` are the :class:`Figures`; beside them, what they were measured on.
    """
    torch.manual_seed(0)
    device, dtype, layout = settings.device, settings.dtype, settings.layout
    rows: dict[str, dict[str, Figures]] = {}
    with keep_freed_memory():
        for size in settings.resolutions:
            shape = (settings.batch, settings.channels, size, size)
            inputs = map_sets(shape, dtype, layout, device)
            row = rows[str(size)] = {}
            for implementation in settings.implementations():
                progress(f"Measuring {implementation.name}, {dtype}, {layout}, {size}x{size}")
                row[implementation.name] = implementation.measure(inputs, device, settings.seconds)
    return settings.document(
        "up",
        dtype=dtype,
        kernel_size=settings.kernel_size,
        scale_factor=settings.scale_factor,
        channels=settings.channels,
        batches=dict.fromkeys(rows, settings.batch),
        results={layout: rows},
    )
