"""DwWeightNet2d: WeightNet for depthwise convolutions, a rival in the paper's table 4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddf_convert.layers.single import filtered_by_channel
from ddf_convert.layers.window import Size, Windowed, add_bias, batched

NARROWEST = 16  # the squeeze is never narrower, and 1/16 of the channels where that is more


class DwWeightNet2d(Windowed):
    """Filters every channel of every image with a K x K filter, which a sigmoid and a grouped linear map predict.

    Global average pooling, a linear map to max(16, C / 16) channels, one back to C with a sigmoid, and a linear map of
    each channel by itself to its K*K taps. Filters are not normalised.

    Args:
        in_channels: C, of the input and of the output.
        kernel_size: K, odd.
        stride: Step between output pixels, in input pixels.
        padding: Pixels on every side; None keeps the size; "same" is TensorFlow's SAME.
        dilation: Distance between taps, in pixels.
        bias: Add a learned constant to each channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as for Conv2d.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        squeeze: C to max(16, C / 16).
        excite: Back to C.
        expand: (C, K*K), the taps that each channel's excitation scales.
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Ma et al., "WeightNet: Revisiting the Design Space of Weight Networks", ECCV 2020, section 3.3: the
    depthwise form, with M = G = 2 and reduction 16.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        squeezed = max(NARROWEST, in_channels // NARROWEST)
        self.squeeze = nn.Linear(in_channels, squeezed, device=device, dtype=dtype)
        self.excite = nn.Linear(squeezed, in_channels, device=device, dtype=dtype)
        self.expand = nn.Parameter(torch.empty(in_channels, self.kernel_size[0] ** 2, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(in_channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the taps again, as those of a depthwise convolution, whose fan-in is K*K."""
        nn.init.kaiming_uniform_(self.expand, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, Ho, Wo), Ho and Wo as for a convolution with the same arguments; or both without B."""
        return batched("DwWeightNet2d", self._forward, input)

    def _forward(self, input: Tensor) -> Tensor:
        excitation = self.excite(self.squeeze(input.mean((-2, -1)))).sigmoid()
        # A grouped 1x1 convolution of one input and K*K outputs a group is this product.
        taps = (excitation.unsqueeze(-1) * self.expand).to(input.dtype)
        channel_filter = taps.unflatten(-1, self.kernel_size)
        return add_bias(filtered_by_channel(self, input, channel_filter), self.bias)

    def extra_repr(self) -> str:
        """The arguments, as ``print`` shows them."""
        return f"{self.window_repr()}, bias={self.bias is not None}"
