"""What layers share that stand where a convolution stood: its attributes, its windows, its unbatched inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.ops import output_size


def statically_true(condition: Any) -> bool:
    """Whether a condition holds; False where that depends on a size that is still open.

    ``bool`` of an open one would have the tracer settle it as it is for the example, and what is exported would be
    wrong, or refuse to run, at other sizes.

    Args:
        condition: A bool, or what a comparison of symbolic sizes gives.
    """
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Size = int | tuple[int, int]  # one number for both sides, or two equal ones as Conv2d has them


class ConvAttributes(nn.Module):
    """Answers what code reads of a ``Conv2d``, beside the sizes that each layer sets itself.

    Attributes:
        groups: 1 unless the layer takes over a convolution's: every output depends on all channels, by the branches.
        transposed: False.
        output_padding: (0, 0).
    """

    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0, 0)

    def __getattr__(self, name: str) -> Any:
        """As for any module; a weight is refused with the reason, so ``hasattr`` and ``getattr`` with a default work.

        Raises:
            AttributeError: There is no such attribute.
        """
        if name == "weight":
            raise AttributeError(
                f"{type(self).__name__} has no weight: its filters are predicted from each input;"
                " for dtype and device look at next(layer.parameters())"
            )
        return super().__getattr__(name)


class SlidingWindow2d(ConvAttributes):
    """A layer whose every output pixel is made of a K x K window of the input; the base of the layers here.

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
        if padding == "valid":
            padding = 0
        if stride < 1 or dilation < 1:
            raise ValueError(f"{layer}: stride and dilation must be 1 or more, got {stride} and {dilation}")
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"{layer}: padding must be a number of pixels, None, 'same' or 'valid', got {padding!r}")
        if padding is None:
            padding = dilation * (kernel_size - 1) // 2
        elif not isinstance(padding, str):
            padding = one_size(layer, "padding", padding)
        if isinstance(padding, int) and padding < 0:
            raise ValueError(f"{layer}: padding must not be negative, got {padding}")
        check_padding_mode(layer, padding_mode)
        self.in_channels = self.out_channels = in_channels
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = (stride, stride)
        self.padding: tuple[int, int] | Literal["same"] = "same" if isinstance(padding, str) else (padding, padding)
        self.dilation = (dilation, dilation)
        self.padding_mode = padding_mode

    def padding_of(self, input: Tensor) -> tuple[int, int, int, int]:
        """Pixels above, below, left and right."""
        if self.padding != "same":
            return (self.padding[0],) * 4
        window = self.kernel_size[0], self.stride[0], self.dilation[0]
        height, width = (same_padding(size, *window) for size in input.shape[-2:])
        return height // 2, height - height // 2, width // 2, width - width // 2

    def padded(self, input: Tensor) -> tuple[Tensor, int]:
        """The input with what the operator cannot pad by itself, and the zeros on every side that are left to it."""
        top, bottom, left, right = self.padding_of(input)
        if self.padding_mode == "zeros" and all(statically_true(top == side) for side in (bottom, left, right)):
            return input, top
        if not all(statically_true(side == 0) for side in (top, bottom, left, right)):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, (left, right, top, bottom), mode=mode)
        return input, 0

    def output_shape(self, input: Tensor) -> tuple[int, int]:
        """Rows and columns of the output: those of a convolution with the same arguments."""
        top, bottom, left, right = self.padding_of(input)
        height, width = input.shape[-2:]
        return self._steps(height + top + bottom), self._steps(width + left + right)

    def centers(self, input: Tensor) -> Tensor:
        """The input, moved so that a stride from its first pixel meets the center of every output's window.

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

    def _steps(self, padded: int) -> int:
        return output_size(padded, self.kernel_size[0], self.stride[0], 0, self.dilation[0])

    def window_repr(self) -> str:
        """These arguments, as ``print`` shows them."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size[0]}, stride={self.stride[0]},"
            f" padding={self.padding if isinstance(self.padding, str) else self.padding[0]!r},"
            f" dilation={self.dilation[0]}, padding_mode={self.padding_mode!r}"
        )


def one_size(layer: str, option: str, size: Size) -> int:
    """One number for both sides, as the layers here need it, of one or of two equal ones.

    Raises:
        ValueError: In the name of the layer: the two differ, or it is no whole number.
    """
    sides = tuple(size) if isinstance(size, tuple | list) else (size,)
    if len(sides) not in (1, 2) or len(set(sides)) != 1 or not hasattr(sides[0], "__index__"):
        raise ValueError(f"{layer}: {option} must be a whole number, or two equal ones, got {size!r}")
    return operator.index(sides[0])


def batched(layer: str, forward: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """Calls a forward that takes (B, C, H, W) with an input that may be (C, H, W), as convolutions take it.

    Raises:
        ValueError: In the name of the layer: the input has another number of dimensions.
    """
    if input.dim() == 4:
        return forward(input)
    if input.dim() != 3:
        raise ValueError(f"{layer}: the input must be (B, C, H, W) or (C, H, W), got {tuple(input.shape)}")
    return forward(input.unsqueeze(0)).squeeze(0)


def same_padding(size: int, kernel_size: int, stride: int, dilation: int) -> int:
    """Pixels that TensorFlow's SAME adds along one side, before and behind; the size may be symbolic."""
    most = dilation * (kernel_size - 1)
    spare = size - 1 - (size - 1) // stride * stride  # pixels behind the last step of the stride
    # A window that is shorter than its step may need none; the comparison is left out where it cannot.
    return most - spare if most >= stride - 1 else max(most - spare, 0)


def check_padding_mode(layer: str, padding_mode: str) -> None:
    """Raises a ValueError, in the name of a layer, unless the mode is one of Conv2d's."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"{layer}: padding_mode must be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")


def add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a constant to each channel, (C,), if there is one; the output keeps its dtype."""
    return output if bias is None else output + bias.to(output.dtype).view(1, -1, 1, 1)
