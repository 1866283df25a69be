"""What the operators accept, the memory format of what they give back, and how torch.func transforms them.

The kernels rely on these checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

COMBINATIONS = ("mul", "add")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def output_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels along one side of the output, as for conv2d."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The layout that the kernels give their results for this input.

    Where one memory order is both (one channel, or one pixel), it is called contiguous.
    """
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def check_arguments(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    upscale_factor: int = 1,
) -> None:
    """Raises unless the arguments fit :func:`ddf_convert.ops.ddf`."""
    if combine not in COMBINATIONS:
        raise ValueError(f"ddf: combine must be 'mul' or 'add', got {combine!r}")
    if stride < 1 or dilation < 1 or padding < 0:
        raise ValueError(
            f"ddf: needs stride >= 1, dilation >= 1 and padding >= 0, got {stride}, {dilation} and {padding}"
        )
    if input.dim() != 4:
        raise ValueError(f"ddf: input must be (B, C, H, W), got shape {tuple(input.shape)}")
    if upscale_factor < 1:
        raise ValueError(f"ddf: upscale_factor must be 1 or more, got {upscale_factor}")
    batch, channels, height, width = input.shape
    filters, several = upscale_factor**2, "" if upscale_factor == 1 else f"{upscale_factor}*{upscale_factor}*"
    kernel = channel_filter.shape[-1] if channel_filter.dim() == 4 else 0
    if tuple(channel_filter.shape) != (batch, filters * channels, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(
            f"ddf: channel_filter must be (B, {several}C, K, K) = ({batch}, {filters * channels}, K, K) with K odd,"
            f" got {tuple(channel_filter.shape)}"
        )
    rows = output_size(height, kernel, stride, padding, dilation)
    columns = output_size(width, kernel, stride, padding, dilation)
    if rows < 1 or columns < 1:
        raise ValueError(
            f"ddf: a {height}x{width} input is too small for kernel {kernel}, padding {padding}, dilation {dilation}"
        )
    heads = spatial_filter.shape[1] // (filters * kernel**2) if spatial_filter.dim() == 4 else 0
    shape = (batch, filters * heads * kernel**2, rows, columns)
    if tuple(spatial_filter.shape) != shape or heads < 1 or channels % heads:
        raise ValueError(
            f"ddf: spatial_filter must be (B, {several}G*K*K, Ho, Wo) ="
            f" ({batch}, {several}G*{kernel**2}, {rows}, {columns})"
            f" with G dividing {channels} channels, got {tuple(spatial_filter.shape)}"
        )
    dtypes = (input.dtype, channel_filter.dtype, spatial_filter.dtype)
    if dtypes[0] not in DTYPES or len(set(dtypes)) > 1:
        raise TypeError(
            f"ddf: the tensors must all be float32, float64, float16 or bfloat16 and of one dtype, got {dtypes}"
        )
    if not input.device == channel_filter.device == spatial_filter.device:
        devices = ", ".join(str(tensor.device) for tensor in (input, channel_filter, spatial_filter))
        raise ValueError(f"ddf: the tensors must be on one device, got {devices}")


def output_shape(input: Tensor, spatial_filter: Tensor, upscale_factor: int = 1) -> tuple[int, int, int, int]:
    """(B, C, s*Ho, s*Wo), of the output of :func:`ddf_convert.ops.ddf` with these, checked, arguments."""
    batch, channels = input.shape[:2]
    height, width = spatial_filter.shape[-2:]
    return batch, channels, height * upscale_factor, width * upscale_factor


def check_gradient(grad_output: Tensor, input: Tensor, spatial_filter: Tensor, upscale_factor: int = 1) -> None:
    """Raises unless a gradient fits the output of :func:`ddf_convert.ops.ddf` with these, checked, arguments."""
    _check_like(grad_output, output_shape(input, spatial_filter, upscale_factor), input, "ddf_backward: grad_output")


def check_filters(filters: Tensor, taps: int) -> None:
    """Raises unless the arguments fit :func:`ddf_convert.ops.filter_norm`."""
    if taps < 2:
        raise ValueError(f"filter_norm: a deviation needs 2 taps or more, got {taps}")
    if filters.dim() != 4 or filters.shape[1] % taps:
        raise ValueError(f"filter_norm: filters must be (B, G*{taps}, H, W), got {tuple(filters.shape)}")
    if filters.dtype not in DTYPES:
        raise TypeError(f"filter_norm: filters must be float32, float64, float16 or bfloat16, got {filters.dtype}")


def check_filters_gradient(grad_output: Tensor, filters: Tensor) -> None:
    """Raises unless a gradient fits the output of :func:`ddf_convert.ops.filter_norm`."""
    _check_like(grad_output, tuple(filters.shape), filters, "filter_norm_backward: grad_output")


def _check_like(tensor: Tensor, shape: tuple[int, ...], other: Tensor, name: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must be {shape} of {other.dtype} on {other.device},"
            f" got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        )


def gradient_formats(input: Tensor) -> tuple[torch.memory_format, torch.memory_format, torch.memory_format]:
    """Layouts of the gradients of (input, channel_filter, spatial_filter): the maps keep the layout of the input."""
    layout = memory_format(input)
    return layout, torch.contiguous_format, layout


# --- torch.func: gradients of one sample, Jacobians, ensembles --------------------------------------------------------


def register_autograd(
    library: torch.library.Library,
    operator: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Registers a gradient as ``torch.library.register_autograd`` does, but one that ``torch.func`` can take too.

    That of torch 2.14 and before raises under ``torch.func.grad``. Here, as in torch's own operators, each transform
    records what it differentiates, and hands the call on to the next one.

    Args:
        library: Of the operator.
        operator: Its name, without the namespace.
        backward: From (ctx, gradients of the outputs) to one gradient, or None, for each argument.
        setup_context: From (ctx, arguments, output) to what ``backward`` reads from ctx.
    """
    overload = getattr(torch.ops.ddf_convert, operator).default
    defaults = [argument.default_value for argument in overload._schema.arguments]

    def next_kernel(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Differentiated(_SingleLevelFunction):
        """The operator, at one level of differentiation."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *arguments, keyset = inputs
            with torch.enable_grad():  # torch turned them off here; they are on for the transforms further in
                output = next_kernel(keyset, tuple(arguments))
            # The dispatcher leaves out arguments that equal their defaults.
            setup_context(ctx, (*arguments, *defaults[len(arguments) :]), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *gradients), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Any:
            raise NotImplementedError(
                f"ddf_convert::{operator} has no forward-mode derivative; use reverse mode: torch.func.grad or jacrev"
            )

    def kernel(keyset: Any, *arguments: Any) -> Any:
        # In forward mode too, where the tangents would be lost without an error.
        forward_mode = forward_ad._current_level >= 0
        if forward_mode or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            with enable_single_level_autograd_function():
                return Differentiated.apply(*arguments, keyset)  # type: ignore[attr-defined]
        return next_kernel(keyset, arguments)

    library.impl(operator, kernel, "Autograd", with_keyset=True)


def register_vmap(operator: str, tensors: int, check: Callable[..., object]) -> None:
    """Registers what ``torch.func.vmap`` does with an operator: the mapped dimension becomes part of the batch.

    Args:
        operator: Its name, without the namespace.
        tensors: How many of its arguments, the first ones, are (B, ...) tensors.
        check: Raises unless the arguments of one sample fit.
    """
    overload = getattr(torch.ops.ddf_convert, operator)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size, dims, options = info.batch_size, in_dims[:tensors], arguments[tensors:]
        stacked = [
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments, dims, strict=False)
        ]
        check(*[tensor[0] for tensor in stacked], *options)
        output = overload(*[tensor.flatten(0, 1) for tensor in stacked], *options)
        shape = stacked[0].shape[:2]
        if isinstance(output, Tensor):
            return output.unflatten(0, shape), 0
        # A gradient that is not wanted has no elements, and no batch.
        wanted = [gradient.dim() > 1 for gradient in output]
        unfolded = (
            gradient.unflatten(0, shape) if each else gradient for gradient, each in zip(output, wanted, strict=True)
        )
        return tuple(unfolded), tuple(0 if each else None for each in wanted)

    torch.library.register_vmap(f"ddf_convert::{operator}", rule)
