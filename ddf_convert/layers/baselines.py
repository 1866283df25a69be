"""Dynamic convolutions that DDF is compared with: CondConv and WeightNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers.cond_conv2d import CondConv2d as Experts
from torch import Tensor, nn

from ddf_convert.layers.base import DynamicFilter2d, Size, SlidingWindow2d, zero_bias

NARROWEST = 16  # least width of WeightNet's squeeze, which is 1/16 of the channels where that is more


class CondConv2d(SlidingWindow2d):
    """A convolution whose weights are a mixture of several experts', mixed for every image: timm's, with its routing.

    Args:
        in_channels: C of the input.
        out_channels: C of the output; None keeps it.
        kernel_size: K, odd; stride, padding, dilation and padding_mode are those of :class:`SlidingWindow2d`.
        groups: Groups of the convolution.
        num_experts: Number of convolutions that are mixed; 8 in the paper's table 4.
        bias: The experts have biases, which are mixed too.

    Attributes:
        experts: timm's ``CondConv2d``.
        routing: The linear map from the pooled input to the experts' shares, before the sigmoid.

    Raises:
        ValueError: An argument does not fit.

    Source: Yang et al., "CondConv: Conditionally Parameterized Convolutions for Efficient Inference", NeurIPS 2019,
    equation 2 and section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        groups: int = 1,
        num_experts: int = 8,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, kernel_size, stride, padding, dilation, padding_mode)
        self.groups = groups
        self.out_channels = in_channels if out_channels is None else out_channels
        if groups < 1 or in_channels % groups or self.out_channels % groups:
            raise ValueError(f"{type(self).__name__}: groups must divide the channels, got {groups}")
        if num_experts < 1:
            raise ValueError(f"{type(self).__name__}: num_experts must be 1 or more, got {num_experts}")
        self._experts_pad = padding_mode == "zeros" and self.padding != "same"
        self.experts = Experts(
            in_channels,
            self.out_channels,
            self.kernel_size[0],
            stride=self.stride[0],
            padding=self.padding if self._experts_pad else 0,
            dilation=self.dilation[0],
            groups=groups,
            bias=bias,
            num_experts=num_experts,
            device=device,
            dtype=dtype,
        )
        self.routing = nn.Linear(in_channels, num_experts, device=device, dtype=dtype)

    def _forward(self, input: Tensor) -> Tensor:
        shares = self.routing(input.mean((-2, -1))).sigmoid()
        if not self._experts_pad:
            input, rest = self.padded(input)
            input = F.pad(input, (rest,) * 4)
        output: Tensor = self.experts(input, shares)
        return output

    def extra_repr(self) -> str:
        """Returns the arguments, as ``print`` shows them."""
        experts = self.experts
        return (
            f"{self.window_repr()}, out_channels={self.out_channels}, groups={experts.groups},"
            f" num_experts={experts.num_experts}, bias={experts.bias is not None}"
        )


class DwCondConv2d(CondConv2d):
    """CondConv of depthwise convolutions; the channels are not mixed.

    Args:
        in_channels: C, of the input and of the output.
        kernel_size: K, odd.
        **options: Any other argument of :class:`CondConv2d` but ``out_channels`` and ``groups``.
    """

    def __init__(self, in_channels: int, kernel_size: int = 3, **options: object) -> None:
        super().__init__(in_channels, None, kernel_size, groups=in_channels, **options)  # type: ignore[arg-type]


class DwWeightNet2d(DynamicFilter2d):
    """Filters every channel of every image with a K x K filter, which a sigmoid and a grouped linear map predict.

    It consists of global average pooling, a linear map to max(16, C / 16) channels, one back to C with a sigmoid, and
    a linear map of each channel by itself to its K*K taps. Filters are not normalized.

    Args:
        in_channels: C, of the input and of the output.
        kernel_size: K, odd; stride, padding, dilation and padding_mode are those of :class:`SlidingWindow2d`.
        bias: Add a learned constant to each channel.

    Attributes:
        squeeze: Linear map from C to max(16, C / 16).
        excite: Linear map back to C.
        expand: (C, K*K), the taps that each channel's excitation scales.
        bias: (C,), or None.

    Raises:
        ValueError: An argument does not fit.

    Source: Ma et al., "WeightNet: Revisiting the Design Space of Weight Networks", ECCV 2020, section 3.3: the
    depthwise form, with M = G = 2 and reduction 16.
    """

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
        self.bias = zero_bias(in_channels, bias, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the taps again, as those of a depthwise convolution, whose fan-in is K*K."""
        nn.init.kaiming_uniform_(self.expand, a=5**0.5)

    def _forward(self, input: Tensor) -> Tensor:
        excitation = self.excite(self.squeeze(input.mean((-2, -1)))).sigmoid()
        # A grouped 1x1 convolution of one input and K*K outputs a group is this product.
        taps = (excitation.unsqueeze(-1) * self.expand).to(input.dtype)
        return self._apply_filters(input, taps.unflatten(-1, self.kernel_size))
