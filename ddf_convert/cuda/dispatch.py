"""CUDA kernels of the operators: allocates the results and launches the kernels; says whether they can run at all."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ddf_convert.cuda import tiling
from ddf_convert.cuda.kernel_spec import KernelSpec
from ddf_convert.cuda.tiling import Launch, Problem
from ddf_convert.errors import first_line, may_pass
from ddf_convert.reference import shuffle, unshuffle
from ddf_convert.reference.checks import DTYPES, Geometry, gradient_formats, memory_format
from ddf_convert.utils.logging import warn_once

_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
_WIDEST_LOAD = 16  # bytes
_OLDEST = (7, 5)  # compute capability that the compiler of CUDA 13 still makes code for, and that is tested
_INSTALL = "pip install 'numba-cuda[cu{major}]'"
_reasons: dict[torch.device, str | None] = {}  # why the kernels cannot run, for each device that was examined


def forward(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    norm_scale: float | None = None,
) -> Tensor:
    """Computes :func:`ddf_convert.ops.ddf` of arguments that have been checked."""
    layout = memory_format(input)
    shape = (*channel_filter.shape[:2], *spatial_filter.shape[2:])
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    if output.numel() == 0:
        return shuffle(output, geometry.upscale_factor)
    input, channel_filter, spatial_filter = _dense(input, channel_filter, spatial_filter)
    problem = _problem(input, channel_filter, spatial_filter, geometry)
    if problem.is_unrolled:
        launch = tiling.window_launch(problem, gradient=False, normalize=norm_scale is not None)
        _start(launch, output, input, channel_filter, spatial_filter, 1.0 if norm_scale is None else norm_scale)
    else:
        if norm_scale is not None:
            spatial_filter = filter_norm(spatial_filter, problem.size**2, norm_scale)
        launch = tiling.generic_launch(problem, "forward", output.numel())
        _start(launch, output, input, channel_filter, spatial_filter)
    return shuffle(output, geometry.upscale_factor)


def backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients by (input, channel_filter, spatial_filter), None where not needed."""
    grad_output = unshuffle(grad_output, geometry.upscale_factor).contiguous(memory_format=memory_format(input))
    tensors = (grad_output, *_dense(input, channel_filter, spatial_filter))
    problem = _problem(*tensors[1:], geometry, grad_output)
    grad_input = _grad_input(problem, *tensors) if needs[0] else None
    grad_channel = grad_spatial = None
    if needs[1] or needs[2]:
        if grad_output.numel() == 0:
            grad_channel, grad_spatial = torch.zeros_like(tensors[2]), torch.zeros_like(tensors[3])
        elif problem.is_unrolled:
            grad_channel, grad_spatial = _grad_filters(problem, *tensors)
        else:
            grad_channel, grad_spatial = _grad_filters_generic(problem, *tensors, needs)
    return grad_input, grad_channel if needs[1] else None, grad_spatial if needs[2] else None


def filter_norm(filters: Tensor, taps: int, scale: float) -> Tensor:
    """FilterNorm over the taps of (B, G*taps, H, W), in float32 (float64 for float64); keeps dtype and layout."""
    return _filter_norm(filters, taps, scale)


def filter_norm_backward(grad_output: Tensor, filters: Tensor, taps: int, scale: float) -> Tensor:
    """Returns the gradient of :func:`filter_norm` by the filters."""
    return _filter_norm(filters, taps, scale, grad_output)


def _filter_norm(filters: Tensor, taps: int, scale: float, *grad_output: Tensor) -> Tensor:
    layout = memory_format(filters)
    tensors = [tensor.contiguous(memory_format=layout) for tensor in (*grad_output, filters)]
    result = torch.empty_like(tensors[-1], memory_format=layout)
    if result.numel():
        is_gradient, channels_last, shape = bool(grad_output), layout == torch.channels_last, tuple(filters.shape)
        launch = tiling.filter_norm_launch(_DTYPES[filters.dtype], is_gradient, channels_last, shape, taps)
        _start(launch, result, *tensors, scale)
    return result


def _grad_input(
    problem: Problem, grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor
) -> Tensor:
    layout = memory_format(input)
    total = torch.empty_like(input, memory_format=layout)
    if total.numel() == 0:
        return total
    batch, channels, *size = input.shape
    # A gradient for each filter of a pixel, added up below.
    filters = channel_filter.shape[1] // channels
    gradient = total
    if filters > 1:
        shape = (batch, filters * channels, *size)
        gradient = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=layout)
    tensors = (gradient, grad_output, channel_filter, spatial_filter)
    if problem.is_unrolled:
        _start(tiling.window_launch(problem, gradient=True, normalize=False), *tensors, 1.0)
    else:
        _start(tiling.generic_launch(problem, "grad_input", gradient.numel()), *tensors)
    return total if filters == 1 else torch.sum(gradient.unflatten(1, (filters, channels)), 1, out=total)


def _grad_filters(
    problem: Problem, grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes both gradients in one pass: the kernel writes parts, which are added up here."""
    launch, spans, chunks = tiling.grad_filters_launch(problem)
    sums = torch.float64 if input.dtype == torch.float64 else torch.float32
    channel_parts = input.new_empty((spans, *channel_filter.shape), dtype=sums)
    batch, taps, height, width = spatial_filter.shape
    shape = (height, width, taps) if problem.channels_last else (taps, height, width)
    spatial_parts = input.new_empty((chunks, batch, *shape), dtype=sums)
    _start(launch, channel_parts, spatial_parts, grad_output, input, channel_filter, spatial_filter)
    grad_channel, grad_spatial = (
        (parts[0] if len(parts) == 1 else parts.sum(0)).to(input.dtype) for parts in (channel_parts, spatial_parts)
    )
    return grad_channel, grad_spatial.permute(0, 3, 1, 2) if problem.channels_last else grad_spatial


def _grad_filters_generic(
    problem: Problem,
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor]:
    """Computes the gradients that are needed, each by a kernel; the other one is not initialized."""
    grad_channel, grad_spatial = torch.empty_like(channel_filter), torch.empty_like(spatial_filter)
    if needs[1]:
        launch = tiling.generic_launch(problem, "grad_channel", grad_channel.numel())
        _start(launch, grad_channel, grad_output, input, spatial_filter)
    if needs[2]:
        launch = tiling.generic_launch(problem, "grad_spatial", grad_spatial.numel())
        _start(launch, grad_spatial, grad_output, input, channel_filter)
    return grad_channel, grad_spatial


def _dense(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (input, channel_filter, spatial_filter) as the kernels read them, in the layouts of their gradients."""
    input, channel_filter, spatial_filter = (
        tensor.contiguous(memory_format=layout)
        for tensor, layout in zip(tensors, gradient_formats(tensors[0]), strict=True)
    )
    return input, channel_filter, spatial_filter


def _problem(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, geometry: Geometry, *others: Tensor
) -> Problem:
    """Returns what decides on the launch; ``others`` are further maps that the kernels read."""
    addresses = input.data_ptr() | spatial_filter.data_ptr()
    for other in others:
        addresses |= other.data_ptr()
    size = channel_filter.shape[-1]
    batch, source_channels, height, width = input.shape
    _, filter_channels, out_height, out_width = spatial_filter.shape
    stride, padding, dilation, combine, _ = geometry
    return Problem(
        _DTYPES[input.dtype],
        combine == "add",
        memory_format(input) == torch.channels_last,
        addresses % _WIDEST_LOAD == 0,
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
    """Returns the multiprocessors of a GPU; a few for the simulator, which has none."""
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _start(launch: Launch, *arguments: Any) -> None:
    """Starts a kernel on the device of its first argument."""
    device: torch.device = arguments[0].device
    _run(launch.spec, device, launch.blocks, (*arguments, *launch.numbers))


def _run(spec: KernelSpec, device: torch.device, blocks: int, arguments: tuple[Any, ...]) -> None:
    if device.type == "cuda":
        from ddf_convert.cuda.codegen import driver

        driver.run(spec, device.index, blocks, arguments)
    else:
        from ddf_convert.cuda.codegen import simulator

        simulator.simulate(spec, blocks, arguments)


# --- whether the kernels can run --------------------------------------------------------------------------------------


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can work on this CUDA tensor; warns, once for each reason, if they cannot."""
    device = tensor.device
    if device not in _reasons and torch.cuda.is_current_stream_capturing():
        return True  # no time to try: if the kernel then cannot be loaded, the error says what to do
    reason = unusable(device)
    if reason is None:
        return True
    if device in _reasons:
        warn_once(f"CUDA tensors take the slower PyTorch reference: {reason}")
    else:  # the reason holds numbers that change from call to call
        warn_once(f"CUDA tensors take the slower PyTorch reference for now: {reason}", key=f"for now {device}")
    return False


def unusable(device: torch.device) -> str | None:
    """Returns why the kernels cannot run on a CUDA device, and the fix; None if they can.

    The smallest kernel is compiled (or read from the disk), loaded and run, and its result checked, once in a process.
    A failure that may pass (memory or the disk is full) is not remembered: the next call tries again.
    """
    if device not in _reasons:
        try:
            _reasons[device] = _examine(device)
        except Exception as error:
            reason = f"a kernel could not be run on {device} ({first_line(error)})"
            if may_pass(error):
                return f"{reason}; the next call tries again"
            _reasons[device] = f"{reason}; {_advice(error)}"
    return _reasons[device]


def _examine(device: torch.device) -> str | None:
    """Returns what is missing or not supported; raises what a kernel raises that is tried."""
    reason = _missing()
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))},"
            f" and the kernels need {'.'.join(map(str, _OLDEST))} or newer"
        )
    _try(device)
    return None


def _missing() -> str | None:
    """Returns which library is missing, and how to install it."""
    if torch.version.cuda is None:
        return "this torch is not built for CUDA; the kernels are for NVIDIA GPUs"
    install = _INSTALL.format(major=torch.version.cuda.partition(".")[0])
    if importlib.util.find_spec("numba_cuda") is None:
        return f"numba-cuda is not installed: {install}"
    try:
        from cuda.bindings import driver  # noqa: F401
        from numba.core import config
    except ImportError as error:
        return f"numba-cuda is not complete ({error}): {install}"
    if getattr(config, "ENABLE_CUDASIM", 0):
        return "NUMBA_ENABLE_CUDASIM is set, so Numba simulates CUDA: unset it"
    return None


def _try(device: torch.device) -> None:
    filters = torch.arange(9.0, device=device).view(1, 9, 1, 1)
    if not torch.allclose(filter_norm(filters, 9, 1.0), (filters - 4) / filters.std(), atol=1e-5):
        raise RuntimeError("it gave a wrong result; please report it")


def _advice(error: Exception) -> str:
    if "UNSUPPORTED_PTX" in str(error):
        return (
            "the driver is older than the compiler: update it, or install the numba-cuda of its CUDA version"
            f" ({_INSTALL.format(major=12)} for drivers of CUDA 12)"
        )
    return "ddf-convert doctor says more"
