"""From tensors to launches: allocates what comes out, and says which tensors a kernel works on."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ddf_convert.cuda import tiling
from ddf_convert.cuda.kernel_spec import Variant
from ddf_convert.cuda.tiling import Geometry, Launch
from ddf_convert.errors import may_pass
from ddf_convert.reference import shuffle, unshuffle
from ddf_convert.reference.checks import DTYPES
from ddf_convert.utils.logging import warn_once

_OLDEST = (7, 5)  # compute capability that the compiler of CUDA 13 still makes code for, and that is tested
_MEND = "pip install 'numba-cuda[cu{major}]'"
_found: dict[torch.device, str | None] = {}  # of each device that was examined, once it is settled


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this CUDA tensor; says why not, once for each reason, in a warning.

    Args:
        tensor: On any CUDA device.
    """
    device = tensor.device
    if device not in _found and torch.cuda.is_current_stream_capturing():
        return True  # no time to try: where the kernel then cannot be loaded, the error says what to do
    reason = unusable(device)
    if reason is None:
        return True
    if device in _found:
        warn_once(f"CUDA tensors take the slower PyTorch reference: {reason}")
    else:  # the reason holds numbers that change from call to call
        warn_once(f"CUDA tensors take the slower PyTorch reference for now: {reason}", key=f"for now {device}")
    return False


def unusable(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, and the mend; None if they can.

    It is found out once in a process: the smallest of the kernels is compiled (or read from the disk), loaded and run,
    and its result looked at. A failure that may pass (memory or the disk is full) is not remembered: the next call
    tries again.

    Args:
        device: A CUDA device with its index.
    """
    if device not in _found:
        try:
            _found[device] = _examine(device)
        except Exception as error:
            reason = f"a kernel could not be run on {device} ({_first_line(error)})"
            if may_pass(error):
                return f"{reason}; the next call tries again"
            _found[device] = f"{reason}; {_advice(error)}"
    return _found[device]


def _examine(device: torch.device) -> str | None:
    """What is missing or not supported; raises what a kernel raises that is tried."""
    reason = _missing() or _unsupported(device)
    if reason is None:
        _try(device)
    return reason


def _missing() -> str | None:
    """What is not there."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA; the kernels are for NVIDIA GPUs"
    mend = _MEND.format(major=torch.version.cuda.partition(".")[0])
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed: {mend}"
    try:
        from cuda.bindings import driver  # noqa: F401
        from numba.core import config
    except ImportError as error:
        return f"numba-cuda is not complete ({error}): {mend}"
    if getattr(config, "ENABLE_CUDASIM", 0):
        return "NUMBA_ENABLE_CUDASIM is set, so Numba simulates CUDA: unset it"
    return None


def _unsupported(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))},"
            f" and the kernels need {'.'.join(map(str, _OLDEST))} or newer"
        )
    return None


def _try(device: torch.device) -> None:

    filters = torch.arange(9.0, device=device).view(1, 9, 1, 1)
    made = filter_norm(filters, 9, 1.0, torch.contiguous_format)
    expected = (filters - 4) / filters.std()
    if not torch.allclose(made, expected, atol=1e-5):
        raise RuntimeError("it gave a wrong result; please report it")


def _advice(error: Exception) -> str:
    text = str(error)
    if "UNSUPPORTED_PTX" in text:
        return (
            "the driver is older than the compiler: update it, or install the numba-cuda of its CUDA version"
            f" ({_MEND.format(major=12)} for drivers of CUDA 12)"
        )
    return "ddf-convert doctor says more"


def _first_line(error: Exception) -> str:
    text: Any = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
_WIDEST = 16  # bytes of the widest load


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    layout: torch.memory_format,
    norm_scale: float | None = None,
    upscale_factor: int = 1,
) -> Tensor:
    """See :func:`ddf_convert.ops.ddf`; the arguments have been checked. The output has ``layout``.

    Args:
        input: As there.
        channel_filter: As there.
        spatial_filter: As there.
        stride: As there.
        padding: As there.
        dilation: As there.
        combine: As there.
        layout: Of the output: that of the input.
        norm_scale: Apply FilterNorm with this scale to the spatial filter first; None: take it as it is.
        upscale_factor: As there.
    """
    shape = (*channel_filter.shape[:2], *spatial_filter.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if output.numel() == 0:
        return shuffle(output, upscale_factor).contiguous(memory_format=layout)
    filters = _dense(channel_filter, spatial_filter, layout)
    input = input.contiguous(memory_format=layout)
    geometry = _geometry(input, *filters, stride, padding, dilation, combine, layout)
    if geometry.is_fast:
        launch = tiling.window(geometry, gradient=False, normalize=norm_scale is not None)
        _start(launch, output, input, *filters, 1.0 if norm_scale is None else norm_scale)
        return shuffle(output, upscale_factor)
    if norm_scale is not None:
        filters = filters[0], filter_norm(filters[1], geometry.size**2, norm_scale, layout)
    _start(tiling.plain(geometry, "forward", output.numel()), output, input, *filters)
    return shuffle(output, upscale_factor)


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    needs: tuple[bool, bool, bool],
    layout: torch.memory_format,
    upscale_factor: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (input, channel_filter, spatial_filter); those not needed have no elements.

    The arguments have been checked. The gradients of the maps have ``layout``.
    """
    channel_filter, spatial_filter = _dense(channel_filter, spatial_filter, layout)
    tensors = (
        unshuffle(grad_output, upscale_factor).contiguous(memory_format=layout),
        input.contiguous(memory_format=layout),
        channel_filter,
        spatial_filter,
    )
    geometry = _geometry(*tensors[1:], stride, padding, dilation, combine, layout, tensors[0])
    made: list[Tensor | None] = [None, None, None]
    if needs[0]:
        made[0] = _grad_input(geometry, *tensors, layout)
    if needs[1] or needs[2]:
        if grad_output.numel() == 0:
            made[1:] = torch.zeros_like(channel_filter), torch.zeros_like(spatial_filter, memory_format=layout)
        elif geometry.is_fast:
            made[1:] = _grad_filters(geometry, *tensors)
        else:
            made[1:] = _grad_filters_plain(geometry, *tensors, layout, needs)
    grad_input, grad_channel, grad_spatial = (
        input.new_empty(0) if gradient is None or not needed else gradient
        for gradient, needed in zip(made, needs, strict=True)
    )
    return grad_input, grad_channel, grad_spatial


def filter_norm(filters: Tensor, taps: int, scale: float, layout: torch.memory_format) -> Tensor:
    """FilterNorm over the taps of (B, G*taps, H, W), in float32 (float64 for float64); keeps dtype and layout."""
    filters = filters.contiguous(memory_format=layout)
    result = torch.empty_like(filters, memory_format=layout)
    if result.numel():
        _start(_norm(filters, taps, layout, gradient=False), result, filters, scale)
    return result


def filter_norm_backward(grad: Tensor, filters: Tensor, taps: int, scale: float, layout: torch.memory_format) -> Tensor:
    """The gradient of the filters, given that of :func:`filter_norm`."""
    filters = filters.contiguous(memory_format=layout)
    result = torch.empty_like(filters, memory_format=layout)
    if result.numel():
        grad = grad.contiguous(memory_format=layout)
        _start(_norm(filters, taps, layout, gradient=True), result, grad, filters, scale)
    return result


def _norm(filters: Tensor, taps: int, layout: torch.memory_format, gradient: bool) -> Launch:
    shape = tuple(filters.shape)
    return tiling.norm(_DTYPES[filters.dtype], gradient, layout == torch.channels_last, shape, taps)


def _grad_input(
    geometry: Geometry,
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    layout: torch.memory_format,
) -> Tensor:
    gradient = torch.empty_like(input, memory_format=layout)
    if gradient.numel() == 0:
        return gradient
    filters = channel_filter.shape[1] // input.shape[1]
    if filters > 1:  # a gradient for each filter of a pixel, added up below
        shape = (len(input), filters * input.shape[1], *input.shape[2:])
        total, gradient = gradient, torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    tensors = (gradient, grad_output, channel_filter, spatial_filter)
    if geometry.is_fast:
        _start(tiling.window(geometry, gradient=True, normalize=False), *tensors, 1.0)
    else:
        _start(tiling.plain(geometry, "grad_input", gradient.numel()), *tensors)
    return gradient if filters == 1 else torch.sum(gradient.unflatten(1, (filters, input.shape[1])), 1, out=total)


def _grad_filters(
    geometry: Geometry, grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor
) -> list[Tensor]:
    """Both gradients in one pass: the kernel writes parts, which are added up here."""
    launch, spans, chunks = tiling.filter_gradients(geometry)
    sums = torch.float64 if input.dtype == torch.float64 else torch.float32
    channel_parts = input.new_empty((spans, *channel_filter.shape), dtype=sums)
    batch, taps, height, width = spatial_filter.shape
    shape = (height, width, taps) if geometry.channels_last else (taps, height, width)
    spatial_parts = input.new_empty((chunks, batch, *shape), dtype=sums)
    _start(launch, channel_parts, spatial_parts, grad_output, input, channel_filter, spatial_filter)
    grad_channel, grad_spatial = (
        (parts[0] if len(parts) == 1 else parts.sum(0)).to(input.dtype) for parts in (channel_parts, spatial_parts)
    )
    return [grad_channel, grad_spatial.permute(0, 3, 1, 2) if geometry.channels_last else grad_spatial]


def _grad_filters_plain(
    geometry: Geometry,
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    layout: torch.memory_format,
    needs: tuple[bool, bool, bool],
) -> list[Tensor]:
    """The gradients that are needed; the other tensors are not to be looked at."""
    grad_channel = torch.empty_like(channel_filter)
    grad_spatial = torch.empty_like(spatial_filter, memory_format=layout)
    if needs[1]:
        launch = tiling.plain(geometry, "grad_channel", grad_channel.numel())
        _start(launch, grad_channel, grad_output, input, spatial_filter)
    if needs[2]:
        launch = tiling.plain(geometry, "grad_spatial", grad_spatial.numel())
        _start(launch, grad_spatial, grad_output, input, channel_filter)
    return [grad_channel, grad_spatial]


def _dense(channel_filter: Tensor, spatial_filter: Tensor, layout: torch.memory_format) -> tuple[Tensor, Tensor]:
    """The filters as the kernels read them."""
    return channel_filter.contiguous(), spatial_filter.contiguous(memory_format=layout)


def _geometry(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    layout: torch.memory_format,
    *others: Tensor,
) -> Geometry:
    """``others`` are further maps that the kernels read."""
    addresses = input.data_ptr() | spatial_filter.data_ptr()
    for other in others:
        addresses |= other.data_ptr()
    size = channel_filter.shape[-1]
    batch, source_channels, height, width = input.shape
    _, filter_channels, out_height, out_width = spatial_filter.shape
    return Geometry(
        _DTYPES[input.dtype],
        combine == "add",
        layout == torch.channels_last,
        addresses % _WIDEST == 0,
        batch,
        channel_filter.shape[1],
        source_channels,
        filter_channels // (size * size),
        height,
        width,
        out_height,
        out_width,
        size,
        stride,
        padding,
        dilation,
        multiprocessors(input.device),
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; for the simulator, which has none, a few."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _start(launch: Launch, *arguments: Any) -> None:
    """Starts a kernel; its device is that of the first argument."""
    device: torch.device = arguments[0].device
    _run(launch.variant, device, launch.blocks, (*arguments, *launch.numbers))


def _run(variant: Variant, device: torch.device, blocks: int, arguments: tuple[Any, ...]) -> None:
    if device.type == "cuda":
        from ddf_convert.cuda.codegen import driver

        driver.run(variant, device.index, blocks, arguments)
    else:
        from ddf_convert.cuda.codegen import simulator

        simulator.simulate(variant, blocks, arguments)
