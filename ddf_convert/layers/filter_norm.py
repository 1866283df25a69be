"""FilterNorm: generated filters are standardised over their K*K taps, which keeps training stable.

Source: section 3.2 of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddf_convert.ops import filter_norm


def filter_gain(nonlinearity: str, kernel_size: int) -> float:
    """The base scale of normalised filters: ``calculate_gain(nonlinearity) / K``."""
    return nn.init.calculate_gain(nonlinearity) / kernel_size  # type: ignore[arg-type]


def _check_kernel(kernel_size: int) -> None:
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"FilterNorm needs an odd kernel size of 3 or more, got {kernel_size}")


class SpatialFilterNorm(nn.Module):
    """Normalises each pixel's filter, head by head; the scale is the constant base scale.

    Args:
        kernel_size: K, odd and at least 3.
        nonlinearity: A name that ``torch.nn.init.calculate_gain`` knows.

    Raises:
        ValueError: ``kernel_size`` is even or under 3.
    """

    def __init__(self, kernel_size: int, nonlinearity: str = "linear") -> None:
        super().__init__()
        _check_kernel(kernel_size)
        self.kernel_size = kernel_size
        self.scale = filter_gain(nonlinearity, kernel_size)

    def forward(self, filters: Tensor) -> Tensor:
        """(B, G*K*K, H, W) -> the same shape and dtype."""
        return filter_norm(filters, self.kernel_size**2, self.scale)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return f"kernel_size={self.kernel_size}, scale={self.scale:.4g}"


class ChannelFilterNorm(nn.Module):
    """Normalises each channel's filter; the scale is learned, and a shift can be.

    Args:
        channels: C.
        kernel_size: K, odd and at least 3.
        nonlinearity: A name that ``torch.nn.init.calculate_gain`` knows; it sets the base scale.
        shift: Learn an added shift ("mean" in the state dict), which starts at 0.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        std: (C*K*K,), the learned scale: a normal variable times the base scale at the start.
        mean: (C*K*K,), the learned shift, or None.

    Raises:
        ValueError: ``kernel_size`` is even or under 3.
    """

    mean: nn.Parameter | None

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        nonlinearity: str = "linear",
        shift: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_kernel(kernel_size)
        self.channels = channels
        self.kernel_size = kernel_size
        self.nonlinearity = nonlinearity
        size = channels * kernel_size**2
        self.std = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.mean = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if shift else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the scale again and sets the shift to 0."""
        nn.init.normal_(self.std, std=filter_gain(self.nonlinearity, self.kernel_size))
        if self.mean is not None:
            nn.init.zeros_(self.mean)

    def forward(self, filters: Tensor) -> Tensor:
        """(B, C*K*K, 1, 1) or (B, C*K*K) -> (B, C, K, K), same dtype."""
        taps = self.kernel_size**2
        shape = (self.channels, self.kernel_size, self.kernel_size)
        # To the operator, channels are the heads of an image of one pixel.
        normalised = filter_norm(filters.reshape(-1, self.channels * taps, 1, 1), taps)
        scaled = normalised.view(-1, *shape) * self.std.view(shape)
        if self.mean is not None:
            scaled = scaled + self.mean.view(shape)
        return scaled.to(filters.dtype)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return f"{self.channels}, kernel_size={self.kernel_size}, shift={self.mean is not None}"
