"""How dynamic the filters of a layer are: numbers from 0, a fixed depthwise convolution, to 1.

The filter of pixel p and channel c is ``F = spatial[p] * channel[c]``, or their sum. Each number says how much of all
these filters is lost, in norm, if something in them is replaced by its mean:

    number = sqrt(sum of (F - F with the mean in its place)^2 / sum of F^2)

where the sums run over images, pixels, channels and taps. They are exact, and come from the moments of both filters:
nothing of the size pixels x channels is made.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_SAME = 1e-6  # what is below it is rounding


@dataclass(frozen=True)
class Dynamics:
    """How dynamic the filters of a layer are on some images; each number goes from 0 to 1.

    Attributes:
        total: What of the filters no fixed depthwise convolution could do, the best one for these images included.
        pixels: What is lost if each image has the mean of its spatial filters everywhere.
        images: What is lost if all images have the mean of their channel filters; None for one image.
        channels: What is lost if the channels of a head share the mean of their channel filters. Fixed filters differ
            from channel to channel too: it is no part of the total.
    """

    total: float
    pixels: float
    images: float | None
    channels: float

    def to_dict(self) -> dict[str, float | None]:
        """As JSON."""
        return {"total": self.total, "pixels": self.pixels, "images": self.images, "channels": self.channels}


def measure(spatial: Tensor, channel: Tensor, combine: str) -> Dynamics:
    """Measures the filters of one layer.

    Args:
        spatial: (B, N, G, T, P), the filters of P pixels; N branches (1, or s*s of DDF-Up), G heads, T taps.
        channel: (B, N, C, T); channels of a head stand together.
        combine: "mul" or "add".
    """
    spatial = spatial.double()
    channel = channel.double().unflatten(2, (spatial.shape[2], -1)).transpose(3, 4)  # (B, N, G, T, C / G)
    mean_s, mean_c = spatial.mean(-1), channel.mean(-1)  # (B, N, G, T)
    var_s = (spatial - mean_s[..., None]).square().mean(-1)
    var_c = (channel - mean_c[..., None]).square().mean(-1)
    square_s, square_c = var_s + mean_s.square(), var_c + mean_c.square()
    moved = (channel - channel.mean(0)).square().mean(-1)  # from the mean of all images
    if combine == "mul":
        every, whole = square_s * square_c, mean_s[..., None] * channel
        pixels, channels, images = var_s * square_c, square_s * var_c, square_s * moved
    else:
        every, whole = square_s + square_c + 2 * mean_s * mean_c, mean_s[..., None] + channel
        pixels, channels, images = var_s, var_c, moved
    # The best fixed filter of a channel is its mean over pixels and images. What that is off by is the variance over
    # pixels, and for each image how far the mean over its pixels is from the mean of all.
    total = pixels + (whole - whole.mean(0)).square().mean(-1)
    size = float(every.mean())
    if size <= 0:
        return Dynamics(0.0, 0.0, 0.0 if len(spatial) > 1 else None, 0.0)

    def share(part: Tensor) -> float:
        found = (max(0.0, float(part.mean())) / size) ** 0.5
        return 0.0 if found < _SAME else min(1.0, found)

    return Dynamics(share(total), share(pixels), share(images) if len(spatial) > 1 else None, share(channels))
