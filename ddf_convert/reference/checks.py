"""What the operators accept, and the shape and memory format of what they return. The kernels rely on these checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COMBINATIONS = ("mul", "add")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Geometry(NamedTuple):
    """How the windows of a DDF lie on its input and how its filters combine; see :func:`ddf_convert.ops.ddf`."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    combine: str = "mul"
    upscale_factor: int = 1


def output_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int) -> int:
    """Returns the pixels along one side of the output, as for conv2d."""
    return (size + 2 * padding - dilation * (kernel_size - 1) - 1) // stride + 1


def output_shape(input: Tensor, spatial_filter: Tensor, upscale_factor: int = 1) -> tuple[int, int, int, int]:
    """Returns (B, C, s*Ho, s*Wo), the shape of the output for arguments that have been checked."""
    batch, channels = input.shape[:2]
    height, width = spatial_filter.shape[-2:]
    return batch, channels, height * upscale_factor, width * upscale_factor


def memory_format(tensor: Tensor) -> torch.memory_format:
    """Returns the layout of the results for this input: contiguous where one memory order is both layouts."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def gradient_formats(input: Tensor) -> tuple[torch.memory_format, torch.memory_format, torch.memory_format]:
    """Returns the layouts of the gradients of (input, channel_filter, spatial_filter)."""
    layout = memory_format(input)
    return layout, torch.contiguous_format, layout


def check_arguments(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    norm_scale: float | None = None,
) -> None:
    """Raises unless the arguments fit :func:`ddf_convert.ops.ddf`."""
    stride, padding, dilation, combine, upscale_factor = geometry
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
    if norm_scale is not None:
        check_filters(spatial_filter, kernel**2)


def check_gradient(grad_output: Tensor, input: Tensor, spatial_filter: Tensor, upscale_factor: int = 1) -> None:
    """Raises unless a gradient fits the output of :func:`ddf_convert.ops.ddf` for arguments that have been checked."""
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
