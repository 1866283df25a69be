"""The contract of the DDF operator: ``ddf_convert::ddf`` and its gradient, registered with torch.library.

One operator, whatever the device: Numba kernels on the CPU, Numba-CUDA kernels on NVIDIA GPUs, the plain PyTorch
reference anywhere else. It has a fake (shape, dtype, memory format), autograd to any order, autocast that follows the
current autocast dtype, and a formula for ``torch.utils.flop_counter.FlopCounterMode``. ``ddf_convert::ddf_normalized``
is the same with FilterNorm on the way in, which spares CUDA kernels a pass over the filters.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, equation 1 and section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ddf_convert import reference
from ddf_convert.ops.filter_norm import filter_norm
from ddf_convert.ops.registration import register_autograd, register_vmap
from ddf_convert.reference.checks import (
    COMBINATIONS,
    DTYPES,
    check_arguments,
    check_filters,
    check_gradient,
    gradient_formats,
    memory_format,
    output_shape,
    output_size,
)

__all__ = [
    "COMBINATIONS",
    "DTYPES",
    "check_arguments",
    "ddf",
    "ddf_normalized",
    "filter_norm",
    "memory_format",
    "output_size",
]

_library = torch.library.Library("ddf_convert", "DEF")
_library.define(
    "ddf(Tensor input, Tensor channel_filter, Tensor spatial_filter,"
    " int stride, int padding, int dilation, str combine, int upscale_factor=1) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "ddf_normalized(Tensor input, Tensor channel_filter, Tensor spatial_filter, float scale,"
    " int stride, int padding, int dilation, str combine, int upscale_factor=1) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# A gradient that is not wanted comes back with no elements: torch.library has no optional outputs.
_library.define(
    "ddf_backward(Tensor grad_output, Tensor input, Tensor channel_filter, Tensor spatial_filter,"
    " int stride, int padding, int dilation, str combine, bool[3] needs, int upscale_factor=1)"
    " -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def ddf(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    combine: str = "mul",
    upscale_factor: int = 1,
) -> Tensor:
    """Decoupled dynamic filter: a K x K filter of its own at every pixel of every channel.

    ``out[b, r, y, x] = sum over (i, j) of combine(channel_filter[b, r, i, j], spatial_filter[b, g*K*K + i*K + j, y, x])
    * input[b, r, y*stride - padding + i*dilation, x*stride - padding + j*dilation]`` with head ``g = r // (C / G)``.
    Taps outside the input read zero. The orientation is that of ``torch.nn.functional.conv2d``.

    With an ``upscale_factor`` s of more than 1 (DDF-Up) there are s*s filters for every pixel of every channel: filter
    ``dy * s + dx`` makes the pixels (s*y + dy, s*x + dx) of an output that is s times as high and wide.

    Args:
        input: (B, C, H, W), float32, float64, float16 or bfloat16; contiguous or channels_last (kept).
        channel_filter: (B, s*s*C, K, K), K odd, same dtype and device; all channels of the first filter come first.
        spatial_filter: (B, s*s*G*K*K, Ho, Wo), likewise, G dividing C; Ho and Wo as for conv2d.
        stride: Step between output pixels, in input pixels.
        padding: Zeros around the input, in pixels.
        dilation: Distance between taps, in pixels.
        combine: "mul" (the paper's equation 1) or "add" (the authors' second variant).
        upscale_factor: s.

    Returns:
        (B, C, s*Ho, s*Wo), dtype and memory format of ``input``. Half types accumulate in float32.

    Raises:
        ValueError: A shape, a device, or ``combine``, stride, padding, dilation or the factor, does not fit.
        TypeError: The dtypes differ or are not among those above.
    """
    output: Tensor = torch.ops.ddf_convert.ddf(
        input, channel_filter, spatial_filter, stride, padding, dilation, combine, upscale_factor
    )
    return output


def ddf_normalized(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    *,
    scale: float,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    combine: str = "mul",
    upscale_factor: int = 1,
) -> Tensor:
    """:func:`ddf` of spatial filters as the 1x1 convolution made them: FilterNorm is part of the operator.

    The result is that of ``ddf(input, channel_filter, filter_norm(spatial_filter, K*K, scale), ...)``. CUDA kernels
    and the reference do not round normalized half filters to their type first.

    Args:
        input: As for :func:`ddf`.
        channel_filter: As for :func:`ddf`, with K of 3 or more.
        spatial_filter: (B, s*s*G*K*K, Ho, Wo), as for :func:`ddf`, not normalized.
        scale: The deviation of a normalized filter over its taps.
        stride: As for :func:`ddf`.
        padding: As for :func:`ddf`.
        dilation: As for :func:`ddf`.
        combine: As for :func:`ddf`.
        upscale_factor: As for :func:`ddf`.

    Returns:
        (B, C, s*Ho, s*Wo), dtype and memory format of ``input``. Half types are normalized and accumulate in float32.

    Raises:
        ValueError: A shape, a device, or ``combine``, stride, padding, dilation or the factor, does not fit.
        TypeError: The dtypes differ or are not among those of :func:`ddf`.
    """
    output: Tensor = torch.ops.ddf_convert.ddf_normalized(
        input, channel_filter, spatial_filter, scale, stride, padding, dilation, combine, upscale_factor
    )
    return output


def _check_normalized(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, scale: float, *options: Any
) -> int:
    """The taps of a filter, once the arguments are found to fit."""
    check_arguments(input, channel_filter, spatial_filter, *options)
    taps = int(channel_filter.shape[-1]) ** 2
    check_filters(spatial_filter, taps)
    return taps


def _check_backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    needs: Sequence[bool],
    upscale_factor: int = 1,
) -> tuple[tuple[int, int, int, str], tuple[bool, ...], int]:
    """The arguments after the tensors, in three parts, once all are found to fit."""
    geometry = (stride, padding, dilation, combine)
    check_arguments(input, channel_filter, spatial_filter, *geometry, upscale_factor)
    check_gradient(grad_output, input, spatial_filter, upscale_factor)
    return geometry, tuple(needs), upscale_factor


# --- any device: the reference ----------------------------------------------------------------------------------------


def _forward_reference(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    check_arguments(input, channel_filter, spatial_filter, *options)
    output = reference.forward(input, channel_filter, spatial_filter, *options)
    return output.contiguous(memory_format=memory_format(input))


def _normalized_reference(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, scale: float, *options: Any
) -> Tensor:
    taps = _check_normalized(input, channel_filter, spatial_filter, scale, *options)
    normalized = reference.filter_norm(spatial_filter, taps, scale)
    output = reference.forward(input, channel_filter, normalized, *options)
    return output.contiguous(memory_format=memory_format(input))


def _backward_reference(
    grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    geometry, needs, factor = _check_backward(grad_output, input, channel_filter, spatial_filter, *options)
    arguments: list[Any] = [*geometry, needs, factor]
    gradients = reference.backward(grad_output, input, channel_filter, spatial_filter, *arguments)
    formats = gradient_formats(input)
    return tuple(
        input.new_empty(0) if gradient is None else gradient.contiguous(memory_format=layout)
        for gradient, layout in zip(gradients, formats, strict=True)
    )


_library.impl("ddf", _forward_reference, "CompositeExplicitAutograd")
_library.impl("ddf_normalized", _normalized_reference, "CompositeExplicitAutograd")
_library.impl("ddf_backward", _backward_reference, "CompositeExplicitAutograd")


# --- the CPU: Numba kernels, imported at first use; the reference where Numba may not compile -------------------------


def _forward_cpu(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    from ddf_convert.cpu import dispatch as cpu

    check_arguments(input, channel_filter, spatial_filter, *options)
    if not cpu.usable():
        return _forward_reference(input, channel_filter, spatial_filter, *options)
    return cpu.forward(input, channel_filter, spatial_filter, *[*options[:4], memory_format(input), *options[4:]])


def _normalized_cpu(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, scale: float, *options: Any
) -> Tensor:
    from ddf_convert.cpu import dispatch as cpu

    taps = _check_normalized(input, channel_filter, spatial_filter, scale, *options)
    if not cpu.usable():
        return _normalized_reference(input, channel_filter, spatial_filter, scale, *options)
    normalized = reference.filter_norm(spatial_filter, taps, scale).to(input.dtype)
    return cpu.forward(input, channel_filter, normalized, *[*options[:4], memory_format(input), *options[4:]])


def _backward_cpu(
    grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    from ddf_convert.cpu import dispatch as cpu

    geometry, needs, factor = _check_backward(grad_output, input, channel_filter, spatial_filter, *options)
    if not cpu.usable():
        return _backward_reference(grad_output, input, channel_filter, spatial_filter, *options)
    arguments: list[Any] = [*geometry, needs, memory_format(input), factor]
    return cpu.backward(grad_output, input, channel_filter, spatial_filter, *arguments)


_library.impl("ddf", _forward_cpu, "CPU")
_library.impl("ddf_normalized", _normalized_cpu, "CPU")
_library.impl("ddf_backward", _backward_cpu, "CPU")


# --- CUDA: Numba-CUDA kernels where they can run, imported at first use; the reference where not ----------------------


def _forward_cuda(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    from ddf_convert import cuda

    check_arguments(input, channel_filter, spatial_filter, *options)
    if not cuda.usable(input):
        return _forward_reference(input, channel_filter, spatial_filter, *options)
    return cuda.forward(
        input, channel_filter, spatial_filter, *[*options[:4], memory_format(input), None, *options[4:]]
    )


def _normalized_cuda(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, scale: float, *options: Any
) -> Tensor:
    from ddf_convert import cuda

    _check_normalized(input, channel_filter, spatial_filter, scale, *options)
    if not cuda.usable(input):
        return _normalized_reference(input, channel_filter, spatial_filter, scale, *options)
    return cuda.forward(
        input, channel_filter, spatial_filter, *[*options[:4], memory_format(input), scale, *options[4:]]
    )


def _backward_cuda(
    grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    from ddf_convert import cuda

    geometry, needs, factor = _check_backward(grad_output, input, channel_filter, spatial_filter, *options)
    if not cuda.usable(input):
        return _backward_reference(grad_output, input, channel_filter, spatial_filter, *options)
    arguments: list[Any] = [*geometry, needs, memory_format(input), factor]
    return cuda.backward(grad_output, input, channel_filter, spatial_filter, *arguments)


_library.impl("ddf", _forward_cuda, "CUDA")
_library.impl("ddf_normalized", _normalized_cuda, "CUDA")
_library.impl("ddf_backward", _backward_cuda, "CUDA")


# --- fake: shapes, dtypes and memory formats --------------------------------------------------------------------------


@torch.library.register_fake("ddf_convert::ddf")  # type: ignore[untyped-decorator]
def _forward_fake(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    check_arguments(input, channel_filter, spatial_filter, *options)
    return _empty(input, spatial_filter, *options[4:])


@torch.library.register_fake("ddf_convert::ddf_normalized")  # type: ignore[untyped-decorator]
def _normalized_fake(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, scale: float, *options: Any
) -> Tensor:
    _check_normalized(input, channel_filter, spatial_filter, scale, *options)
    return _empty(input, spatial_filter, *options[4:])


def _empty(input: Tensor, spatial_filter: Tensor, *upscale_factor: int) -> Tensor:
    shape = output_shape(input, spatial_filter, *upscale_factor)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


@torch.library.register_fake("ddf_convert::ddf_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    grad_output: Tensor, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    _, needs, _ = _check_backward(grad_output, input, channel_filter, spatial_filter, *options)
    tensors = (input, channel_filter, spatial_filter)
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
        if needed
        else tensor.new_empty(0)
        for tensor, layout, needed in zip(tensors, gradient_formats(input), needs, strict=True)
    )


# --- autograd, to any order -------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, options = inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors)
    *ctx.options, ctx.factor = options


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.ddf_convert.ddf_backward(grad_output, *ctx.saved_tensors, *ctx.options, needs, ctx.factor)
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None, None, None)


def _backward_normalized(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The chain rule, in operators that have gradients of their own."""
    input, channel_filter, spatial_filter = ctx.saved_tensors
    scale, *options = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    taps = channel_filter.shape[-1] ** 2
    normalized = filter_norm(spatial_filter, taps, scale)
    gradients = torch.ops.ddf_convert.ddf_backward(
        grad_output, input, channel_filter, normalized, *options, needs, ctx.factor
    )
    wanted = [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    if needs[2]:
        wanted[2] = torch.ops.ddf_convert.filter_norm_backward(gradients[2], spatial_filter, taps, scale)
    return (*wanted, None, None, None, None, None, None)


def _save_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options, ctx.needs, ctx.factor = inputs[4:8], inputs[8], inputs[9]


def _second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients.

    Write T(F, C, S) for the operator. With cotangents (u, v, w) of its gradients, the scalar whose gradient is asked
    for is <g, T(u, C, S) + T(F, v, S) + T(F, C, w)> under ``mul``, where T is linear in each argument, and
    <g, T(u, C, S) + T(F, v, w)> under ``add``, where T(F, C, S) = A(F, C) + B(F, S).
    """
    grad_output, input, channel, spatial = ctx.saved_tensors
    u, v, w = (
        cotangent if needed else torch.zeros_like(tensor)
        for cotangent, needed, tensor in zip(cotangents, ctx.needs, (input, channel, spatial), strict=True)
    )
    # Each term of the sum, with the places of (F, C, S) that it holds as themselves: those it is differentiated by.
    terms = [((u, channel, spatial), (False, True, True))]
    if ctx.options[-1] == "mul":
        terms.append(((input, v, spatial), (True, False, True)))
        terms.append(((input, channel, w), (True, True, False)))
    else:
        terms.append(((input, v, w), (True, False, False)))
    wants = ctx.needs_input_grad
    totals: list[Tensor | None] = [None, None, None, None]

    def add(place: int, gradient: Tensor) -> None:
        total = totals[place]
        totals[place] = gradient if total is None else total + gradient

    for tensors, own in terms:
        if wants[0]:
            add(0, torch.ops.ddf_convert.ddf(*tensors, *ctx.options, ctx.factor))
        needs = [here and wanted for here, wanted in zip(own, wants[1:4], strict=True)]
        if any(needs):
            gradients = torch.ops.ddf_convert.ddf_backward(grad_output, *tensors, *ctx.options, needs, ctx.factor)
            for place, needed in enumerate(needs):
                if needed:
                    add(place + 1, gradients[place])
    return (*totals, None, None, None, None, None, None)


register_autograd(_library, "ddf", _backward, _save)
register_autograd(_library, "ddf_normalized", _backward_normalized, _save)
register_autograd(_library, "ddf_backward", _second_backward, _save_second)


# --- vmap: the mapped dimension becomes part of the batch -------------------------------------------------------------

register_vmap("ddf", 3, check_arguments)
register_vmap("ddf_normalized", 3, _check_normalized)
register_vmap("ddf_backward", 4, _check_backward)


# --- autocast: the current autocast dtype of the device, not a fixed one ----------------------------------------------


def _autocast(operator: str, device: str) -> None:
    """Registers what autocast does: the three tensors take its dtype, and the operator runs below it."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")
    run = getattr(torch.ops.ddf_convert, operator)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.device.type == device and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor

    def call(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
        tensors = [cast(tensor) for tensor in (input, channel_filter, spatial_filter)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            output: Tensor = run(*tensors, *options)
            return output

    _library.impl(operator, call, f"Autocast{device.upper()}")


for _operator in ("ddf", "ddf_normalized"):
    for _device in ("cpu", "cuda"):
        _autocast(_operator, _device)


# --- FLOPs: two for each of the K * K multiply-accumulates of an output element; FilterNorm, as any norm, not counted -


@register_flop_formula([torch.ops.ddf_convert.ddf, torch.ops.ddf_convert.ddf_normalized])
def _forward_flops(input: Any, channel_filter: Any, *rest: Any, out_shape: Any, **kwargs: Any) -> int:
    outputs: int = math.prod(out_shape)
    return 2 * int(channel_filter[-1]) ** 2 * outputs


@register_flop_formula(torch.ops.ddf_convert.ddf_backward)
def _backward_flops(grad_output: Any, input: Any, channel_filter: Any, *rest: Any, **kwargs: Any) -> int:
    outputs: int = math.prod(grad_output)
    needs: list[bool] = rest[5]
    return sum(needs) * 2 * int(channel_filter[-1]) ** 2 * outputs
