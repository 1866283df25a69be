"""FilterNorm: predicted filters are standardized over their K*K taps, which keeps training stable.

Source: section 3.2 of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddf_convert.ops.filter_norm import filter_norm


def filter_gain(nonlinearity: str, kernel_size: int) -> float:
    """Returns the base scale of normalized filters: ``calculate_gain(nonlinearity) / K``."""
    return nn.init.calculate_gain(nonlinearity) / kernel_size  # type: ignore[arg-type]


def _check_kernel(kernel_size: int) -> None:
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"FilterNorm needs an odd kernel size of 3 or more, got {kernel_size}")


@torch.no_grad()
def _fix(scale: Tensor, shift: Tensor, filter: Tensor | float) -> None:
    scale.zero_()
    shift.copy_(filter.reshape(-1) if isinstance(filter, Tensor) else torch.full_like(shift, filter))


class SpatialFilterNorm(nn.Module):
    """Normalizes each pixel's filter, head by head, to a constant base scale or a learned scale.

    Args:
        kernel_size: K, odd and at least 3.
        nonlinearity: A name that ``torch.nn.init.calculate_gain`` knows.
        heads: G.
        affine: Learn a scale and an added shift for every tap of a head, the same for all pixels. They start at the
            base scale and at 0.

    Attributes:
        scale: The base scale.
        std: (G*K*K,), the learned scale, or None.
        mean: (G*K*K,), the learned shift, or None.

    Raises:
        ValueError: ``kernel_size`` is even or under 3.
    """

    std: nn.Parameter | None
    mean: nn.Parameter | None

    def __init__(
        self,
        kernel_size: int,
        nonlinearity: str = "linear",
        heads: int = 1,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_kernel(kernel_size)
        self.kernel_size = kernel_size
        self.scale = filter_gain(nonlinearity, kernel_size)
        size = heads * kernel_size**2
        self.std = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if affine else None
        self.mean = nn.Parameter(torch.empty(size, device=device, dtype=dtype)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the learned scale to the base scale, and the shift to 0."""
        if self.std is not None and self.mean is not None:
            nn.init.constant_(self.std, self.scale)
            nn.init.zeros_(self.mean)

    def fix(self, filter: Tensor | float) -> None:
        """Makes every filter this one, (G*K*K,) or a number for all taps, whatever the input: the scale becomes 0.

        Raises:
            ValueError: Scale and shift are not learned.
        """
        if self.std is None or self.mean is None:
            raise ValueError("only a FilterNorm with affine=True can be fixed")
        _fix(self.std, self.mean, filter)

    def forward(self, filters: Tensor) -> Tensor:
        """(B, G*K*K, H, W) -> the same shape and dtype."""
        if self.std is None or self.mean is None:
            return filter_norm(filters, self.kernel_size**2, self.scale)
        normalized = filter_norm(filters, self.kernel_size**2)
        return torch.addcmul(self.mean.view(-1, 1, 1), normalized, self.std.view(-1, 1, 1)).to(filters.dtype)

    def extra_repr(self) -> str:
        """Returns the arguments, as ``print`` shows them."""
        return f"kernel_size={self.kernel_size}, scale={self.scale:.4g}, affine={self.std is not None}"


class ChannelFilterNorm(nn.Module):
    """Normalizes each channel's filter to a learned scale and, optionally, a learned shift.

    Args:
        channels: C.
        kernel_size: K, odd and at least 3.
        nonlinearity: A name that ``torch.nn.init.calculate_gain`` knows; it sets the base scale.
        shift: Learn an added shift ("mean" in the state dict), which starts at 0.

    Attributes:
        std: (C*K*K,), the learned scale, initialized from a normal distribution times the base scale.
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

    def fix(self, filter: Tensor | float) -> None:
        """Makes every filter this one, (C, K, K) or a number for all taps, whatever the input: the scale becomes 0.

        Raises:
            ValueError: The shift is not learned.
        """
        if self.mean is None:
            raise ValueError("only a FilterNorm with a learned shift can be fixed")
        _fix(self.std, self.mean, filter)

    def forward(self, filters: Tensor) -> Tensor:
        """(B, C*K*K, 1, 1) or (B, C*K*K) -> (B, C, K, K), same dtype."""
        taps = self.kernel_size**2
        shape = (self.channels, self.kernel_size, self.kernel_size)
        # To the operator, channels are the heads of an image of one pixel.
        normalized = filter_norm(filters.reshape(-1, self.channels * taps, 1, 1), taps)
        scaled = normalized.view(-1, *shape) * self.std.view(shape)
        if self.mean is not None:
            scaled = scaled + self.mean.view(shape)
        return scaled.to(filters.dtype)

    def extra_repr(self) -> str:
        """Returns the arguments, as ``print`` shows them."""
        return f"{self.channels}, kernel_size={self.kernel_size}, shift={self.mean is not None}"
