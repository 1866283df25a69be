"""Bases of the layers: a convolution's attributes and windows, predicted filters, a 1x1 convolution beside them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.ops import COMBINATIONS, ddf, output_size

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Size = int | tuple[int, int]  # one number for both sides, or two equal ones as Conv2d has them


class ConvAttributes(nn.Module):
    """Has the attributes of a ``Conv2d`` that are the same for all layers, and refuses ``weight`` with the reason.

    Attributes:
        groups: 1, unless the layer takes over a convolution's: every output depends on all channels, by the branches.
        transposed: False.
        output_padding: (0, 0).
    """

    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)

    def __getattr__(self, name: str) -> Any:
        """Raises an AttributeError for ``weight``, so ``hasattr`` and ``getattr`` with a default work."""
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no weight: its filters are predicted from each input;"
                " for dtype and device look at next(layer.parameters())"
            )
        return super().__getattr__(name)


class SlidingWindow2d(ConvAttributes):
    """Base of the layers that compute every output pixel from a K x K window of the input.

    Args:
        in_channels: C of the input.
        kernel_size: K, or (K, K).
        stride: Step between output pixels, in input pixels; one number, or two equal ones, as also the next two.
        padding: Pixels on every side; None keeps the size (at stride 1); "same" is TensorFlow's SAME, which pads so
            that the output has ceil(H / stride) rows, one more pixel below than above where they cannot be equal;
            "valid" is 0.
        dilation: Distance between taps, in pixels.
        padding_mode: "zeros", "reflect", "replicate" or "circular", as for Conv2d.

    Attributes:
        kernel_size: (K, K).
        stride: (rows, columns), equal.
        padding: (rows, columns), equal; or "same".
        dilation: (rows, columns), equal.

    Raises:
        ValueError: An argument does not fit.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
        padding: Size | str | None = None,
        dilation: Size = 1,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        layer = type(self).__name__
        kernel_size = one_size(layer, "kernel_size", kernel_size)
        stride, dilation = one_size(layer, "stride", stride), one_size(layer, "dilation", dilation)
        if stride < 1 or dilation < 1:
            raise ValueError(f"{layer}: stride and dilation must be 1 or more, got {stride} and {dilation}")
        if padding == "valid":
            padding = 0
        elif padding is None:
            padding = dilation * (kernel_size - 1) // 2
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"{layer}: padding must be a number of pixels, None, 'same' or 'valid', got {padding!r}")
        if not isinstance(padding, str):
            padding = one_size(layer, "padding", padding)
            if padding < 0:
                raise ValueError(f"{layer}: padding must not be negative, got {padding}")
        check_padding_mode(layer, padding_mode)
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = (stride, stride)
        self.padding: tuple[int, int] | Literal["same"] = "same" if isinstance(padding, str) else (padding, padding)
        self.dilation = (dilation, dilation)
        self.padding_mode = padding_mode

    def forward(self, input: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, Ho, Wo), as a convolution with the same arguments; or both without B."""
        return batched(self, self._forward, input)

    def _forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def padding_of(self, input: Tensor) -> tuple[int, int, int, int]:
        """Returns the padding in pixels above, below, left and right."""
        if self.padding != "same":
            return (self.padding[0],) * 4
        window = self.kernel_size[0], self.stride[0], self.dilation[0]
        height, width = (same_padding(size, *window) for size in input.shape[-2:])
        return height // 2, height - height // 2, width // 2, width - width // 2

    def padded(self, input: Tensor) -> tuple[Tensor, int]:
        """Pads what the operator cannot pad; returns the input and the zeros on every side that are left to it."""
        top, bottom, left, right = self.padding_of(input)
        if self.padding_mode == "zeros" and all(statically_true(top == side) for side in (bottom, left, right)):
            return input, top
        if not all(statically_true(side == 0) for side in (top, bottom, left, right)):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, (left, right, top, bottom), mode=mode)
        return input, 0

    def output_shape(self, input: Tensor) -> tuple[int, int]:
        """Returns rows and columns of the output, as of a convolution with the same arguments."""
        top, bottom, left, right = self.padding_of(input)
        height, width = input.shape[-2:]
        return self._output_size(height + top + bottom), self._output_size(width + left + right)

    def centers(self, input: Tensor) -> Tensor:
        """Shifts the input so that a stride from its first pixel meets the center of every output's window.

        With the usual padding, dilation * (K - 1) / 2, that is the input itself.
        """
        reach = self.dilation[0] * (self.kernel_size[0] - 1) // 2
        if self.padding == (reach, reach):
            return input
        top, _, left, _ = self.padding_of(input)
        before = (top - reach, left - reach)
        after = tuple(
            (count - 1) * self.stride[0] + 1 - (size + first)
            for count, size, first in zip(self.output_shape(input), input.shape[-2:], before, strict=True)
        )
        # Up to stride - 1 pixels past the last center change nothing: the strided conv does not reach them.
        after = tuple(
            0 if statically_true(excess <= 0) and statically_true(excess > -self.stride[0]) else excess
            for excess in after
        )
        if all(statically_true(pixels == 0) for pixels in before + after):
            return input
        return F.pad(input, (before[1], after[1], before[0], after[0]))

    def _output_size(self, padded: int) -> int:
        return output_size(padded, self.kernel_size[0], self.stride[0], 0, self.dilation[0])

    def window_repr(self) -> str:
        """Returns these arguments, as ``print`` shows them."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size[0]}, stride={self.stride[0]},"
            f" padding={self.padding if isinstance(self.padding, str) else self.padding[0]!r},"
            f" dilation={self.dilation[0]}, padding_mode={self.padding_mode!r}"
        )


class DynamicFilter2d(SlidingWindow2d):
    """Base of the layers that filter every channel by itself with predicted filters, and add a bias."""

    bias: nn.Parameter | None
    _repr_attributes: ClassVar[tuple[str, ...]] = ()  # that ``print`` shows

    def _apply_filters(
        self,
        input: Tensor,
        channel_filter: Tensor | None = None,
        spatial_filter: Tensor | None = None,
        combine: str = COMBINATIONS[0],
        norm_scale: float | None = None,
    ) -> Tensor:
        """Filters the input by the DDF operator and adds the bias.

        Args:
            input: (B, C, H, W), not padded.
            channel_filter: (B, C, K, K); None is all ones.
            spatial_filter: (B, G*K*K, Ho, Wo); None is all ones.
            combine: How the two are combined.
            norm_scale: The operator applies FilterNorm of this scale to the spatial filter; None does not.
        """
        if spatial_filter is None:
            assert channel_filter is not None
            taps = self.kernel_size[0] ** 2
            spatial_filter = channel_filter.new_ones(input.shape[0], taps, *self.output_shape(input))
        if channel_filter is None:
            channel_filter = spatial_filter.new_ones(*input.shape[:2], *self.kernel_size)
        input, padding = self.padded(input)
        output = ddf(
            input,
            channel_filter,
            spatial_filter,
            stride=self.stride[0],
            padding=padding,
            dilation=self.dilation[0],
            combine=combine,
            norm_scale=norm_scale,
        )
        return add_bias(output, self.bias)

    def extra_repr(self) -> str:
        """Returns the arguments, as ``print`` shows them."""
        options = "".join(f" {name}={getattr(self, name)!r}," for name in self._repr_attributes)
        return f"{self.window_repr()},{options} bias={self.bias is not None}"


class MixingConv(ConvAttributes):
    """Base of a layer that filters channels by itself with a 1x1 convolution before or behind, which mixes them.

    It has the attributes of the one convolution that it replaces.

    Attributes:
        mix: The 1x1 ``Conv2d``.
    """

    mix: nn.Conv2d

    @property
    def _filter_layer(self) -> Any:
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """C of the input."""
        return self.mix.in_channels

    @property
    def out_channels(self) -> int:
        """C of the output."""
        return self.mix.out_channels

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(K, K) of the layer that filters."""
        return cast("tuple[int, int]", self._filter_layer.kernel_size)

    @property
    def dilation(self) -> tuple[int, int]:
        """(rows, columns) of the layer that filters."""
        return cast("tuple[int, int]", self._filter_layer.dilation)


def batched(layer: nn.Module, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Calls a forward that takes (B, C, H, W) with an input that may be (C, H, W), as convolutions take it.

    Raises:
        ValueError: The input has another number of dimensions; names the layer's class.
    """
    if input.dim() == 4:
        return forward(input)
    if input.dim() != 3:
        raise ValueError(
            f"{type(layer).__name__}: the input must be (B, C, H, W) or (C, H, W), got {tuple(input.shape)}"
        )
    return forward(input.unsqueeze(0)).squeeze(0)


def zero_bias(
    channels: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter | None:
    """Returns a bias of zeros, (C,), or None without one."""
    return nn.Parameter(torch.zeros(channels, device=device, dtype=dtype)) if bias else None


def add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias (C,), if there is one, to (B, C, H, W); the output keeps its dtype."""
    return output if bias is None else output + bias.to(output.dtype).view(1, -1, 1, 1)


def one_size(layer: str, option: str, size: Size) -> int:
    """Returns the number for both sides of one number or two equal ones; raises a ValueError for anything else."""
    sides = tuple(size) if isinstance(size, tuple | list) else (size,)
    if len(sides) not in (1, 2) or len(set(sides)) != 1 or not hasattr(sides[0], "__index__"):
        raise ValueError(f"{layer}: {option} must be a whole number, or two equal ones, got {size!r}")
    return operator.index(sides[0])


def check_padding_mode(layer: str, padding_mode: str) -> None:
    """Raises a ValueError unless the mode is one of Conv2d's."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"{layer}: padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")


def check_filter_options(
    layer: str, in_channels: int, heads: int = 1, se_ratio: float = 1.0, combine: str = COMBINATIONS[0]
) -> None:
    """Raises a ValueError unless the options of predicted filters fit."""
    if in_channels < 1 or heads < 1 or in_channels % heads:
        raise ValueError(f"{layer}: heads must divide in_channels, got {heads} heads and {in_channels} channels")
    if combine not in COMBINATIONS:
        raise ValueError(f"{layer}: combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    if not 0 < se_ratio < math.inf:
        raise ValueError(f"{layer}: se_ratio must be above 0 and finite, got {se_ratio}")


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Returns the pixels that TensorFlow's SAME adds along one side, before and behind; the size may be symbolic."""
    most = dilation * (kernel_size - 1)
    spare = size - 1 - (size - 1) // stride * stride  # pixels behind the last step of the stride
    # A window that is shorter than its step may need none; the comparison is left out where it cannot.
    return most - spare if most >= stride - 1 else max(most - spare, 0)


def statically_true(condition: Any) -> bool:
    """Returns whether a condition holds for all sizes: False where it depends on a symbolic size.

    ``bool`` of a symbolic condition would specialize the exported program to the example's sizes.

    Args:
        condition: A bool, or a comparison of symbolic sizes.
    """
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))
