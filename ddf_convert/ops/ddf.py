"""The DDF operator ``ddf_convert::ddf`` and its gradient, registered with torch.library.

It has kernels by device, a fake kernel, autograd to any order, a batching rule, autocast that follows the current
dtype, and a formula for ``torch.utils.flop_counter.FlopCounterMode``.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, equation 1 and section 3.2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ddf_convert import reference
from ddf_convert.ops.registration import register_autograd, register_vmap
from ddf_convert.reference.checks import (
    Geometry,
    check_arguments,
    check_gradient,
    gradient_formats,
    memory_format,
    output_shape,
)

_GEOMETRY = "int stride, int padding, int dilation, str combine, int upscale_factor=1"  # the fields of Geometry
_library = torch.library.Library("ddf_convert", "DEF")
_library.define(
    f"ddf(Tensor input, Tensor channel_filter, Tensor spatial_filter, {_GEOMETRY}, float? norm_scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# A gradient that is not needed comes back with no elements: torch.library has no optional outputs.
_library.define(
    "ddf_backward(Tensor grad_output, Tensor input, Tensor channel_filter, Tensor spatial_filter, bool[3] needs,"
    f" {_GEOMETRY}) -> (Tensor, Tensor, Tensor)",
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
    norm_scale: float | None = None,
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
        spatial_filter: (B, s*s*G*K*K, Ho, Wo), same dtype and device, G dividing C; Ho and Wo as for conv2d.
        stride: Step between output pixels, in input pixels.
        padding: Zeros around the input, in pixels.
        dilation: Distance between taps, in pixels.
        combine: "mul" (the paper's equation 1) or "add" (the authors' second variant).
        upscale_factor: s.
        norm_scale: Takes ``filter_norm(spatial_filter, K*K, norm_scale)`` as spatial filter; None for the filter as it
            is. Only CPU kernels round a normalized half filter to its dtype first.

    Returns:
        (B, C, s*Ho, s*Wo), dtype and memory format of ``input``. Half types are normalized and accumulate in float32.

    Raises:
        ValueError: A shape, a device, or ``combine``, stride, padding, dilation or the factor, does not fit.
        TypeError: The dtypes differ or are not among those above.
    """
    output: Tensor = torch.ops.ddf_convert.ddf(
        input, channel_filter, spatial_filter, stride, padding, dilation, combine, upscale_factor, norm_scale
    )
    return output


def _check(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any
) -> tuple[Geometry, float | None]:
    """Checks the arguments of ``ddf``; returns those after the tensors."""
    geometry, norm_scale = Geometry(*options[:5]), options[5] if len(options) > 5 else None
    check_arguments(input, channel_filter, spatial_filter, geometry, norm_scale)
    return geometry, norm_scale


def _check_backward(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    needs: Sequence[bool],
    *options: Any,
) -> Geometry:
    """Checks the arguments of ``ddf_backward``; returns those after ``needs``."""
    geometry = Geometry(*options)
    check_arguments(input, channel_filter, spatial_filter, geometry)
    check_gradient(grad_output, input, spatial_filter, geometry.upscale_factor)
    return geometry


# --- kernels by device ------------------------------------------------------------------------------------------------


def _cpu(tensor: Tensor) -> Any:
    from ddf_convert.cpu import dispatch

    return dispatch if dispatch.usable() else reference


def _cuda(tensor: Tensor) -> Any:
    from ddf_convert import cuda

    return cuda if cuda.usable(tensor) else reference


Backend = Callable[[Tensor], Any]  # from the first tensor of a call to the module that computes it
# By dispatch key: kernels, imported at first use, or the reference where they cannot run.
BACKENDS: dict[str, Backend] = {"CompositeExplicitAutograd": lambda tensor: reference, "CPU": _cpu, "CUDA": _cuda}


def register_backends(
    library: torch.library.Library, operator: str, kernel: Callable[..., Any], keys: Iterable[str] = tuple(BACKENDS)
) -> None:
    """Registers ``kernel(backend, *arguments)``, with its backend, for each dispatch key."""
    for key in keys:
        library.impl(operator, functools.partial(kernel, BACKENDS[key]), key)


def _forward(backend: Backend, input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    geometry, norm_scale = _check(input, channel_filter, spatial_filter, *options)
    output: Tensor = backend(input).forward(input, channel_filter, spatial_filter, geometry, norm_scale)
    return output.contiguous(memory_format=memory_format(input))


def _backward(
    backend: Backend,
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    tensors = (grad_output, input, channel_filter, spatial_filter)
    geometry = _check_backward(*tensors, needs, *options)
    gradients = backend(input).backward(*tensors, geometry, tuple(needs))
    return tuple(
        input.new_empty(0) if gradient is None else gradient.contiguous(memory_format=layout)
        for gradient, layout in zip(gradients, gradient_formats(input), strict=True)
    )


register_backends(_library, "ddf", _forward)
register_backends(_library, "ddf_backward", _backward)


# --- fake: shapes, dtypes and memory formats --------------------------------------------------------------------------


@torch.library.register_fake("ddf_convert::ddf")  # type: ignore[untyped-decorator]
def _forward_fake(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    geometry, _ = _check(input, channel_filter, spatial_filter, *options)
    shape = output_shape(input, spatial_filter, geometry.upscale_factor)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(input))


@torch.library.register_fake("ddf_convert::ddf_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    grad_output: Tensor,
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    needs: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, ...]:
    tensors = (input, channel_filter, spatial_filter)
    _check_backward(grad_output, *tensors, needs, *options)
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)
        if needed
        else tensor.new_empty(0)
        for tensor, layout, needed in zip(tensors, gradient_formats(input), needs, strict=True)
    )


# --- autograd, to any order -------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:3])
    *ctx.geometry, ctx.norm_scale = inputs[3:]


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, channel_filter, spatial_filter = ctx.saved_tensors
    taps, scale = channel_filter.shape[-1] ** 2, ctx.norm_scale
    filters = spatial_filter
    if scale is not None:
        filters = torch.ops.ddf_convert.filter_norm(spatial_filter, taps, scale)
    needs = list(ctx.needs_input_grad[:3])
    made = torch.ops.ddf_convert.ddf_backward(grad_output, input, channel_filter, filters, needs, *ctx.geometry)
    gradients = [gradient if needed else None for gradient, needed in zip(made, needs, strict=True)]
    if needs[2] and scale is not None:
        gradients[2] = torch.ops.ddf_convert.filter_norm_backward(made[2], spatial_filter, taps, scale)
    return (*gradients, *[None] * 6)


def _save_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.needs, *ctx.geometry = inputs[4:]


def _second_gradients(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the gradients.

    Write T(F, C, S) for the operator. With cotangents (u, v, w) of its gradients, the scalar to differentiate is
    <g, T(u, C, S) + T(F, v, S) + T(F, C, w)> under ``mul``, where T is linear in each argument, and
    <g, T(u, C, S) + T(F, v, w)> under ``add``, where T(F, C, S) = A(F, C) + B(F, S).
    """
    grad_output, input, channel, spatial = ctx.saved_tensors
    u, v, w = (
        cotangent if needed else torch.zeros_like(tensor)
        for cotangent, needed, tensor in zip(cotangents, ctx.needs, (input, channel, spatial), strict=True)
    )
    # Each term of the sum, and which of (F, C, S) it holds itself: it is differentiated by those.
    terms = [((u, channel, spatial), (False, True, True))]
    if Geometry(*ctx.geometry).combine == "mul":
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
            add(0, torch.ops.ddf_convert.ddf(*tensors, *ctx.geometry))
        needs = [here and wanted for here, wanted in zip(own, wants[1:4], strict=True)]
        if any(needs):
            gradients = torch.ops.ddf_convert.ddf_backward(grad_output, *tensors, needs, *ctx.geometry)
            for place, needed in enumerate(needs):
                if needed:
                    add(place + 1, gradients[place])
    return (*totals, *[None] * 6)


register_autograd(_library, "ddf", _gradients, _save)
register_autograd(_library, "ddf_backward", _second_gradients, _save_second)

register_vmap("ddf", 3, _check)
register_vmap("ddf_backward", 4, _check_backward)


# --- autocast: the tensors take the current autocast dtype of the device, and the operator runs below it --------------


def _register_autocast(device: str) -> None:
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.device.type == device and tensor.dtype != torch.float64
        return tensor.to(torch.get_autocast_dtype(device)) if eligible else tensor

    def call(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
        tensors = [cast(tensor) for tensor in (input, channel_filter, spatial_filter)]
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            output: Tensor = torch.ops.ddf_convert.ddf(*tensors, *options)
            return output

    _library.impl("ddf", call, f"Autocast{device.upper()}")


_register_autocast("cpu")
_register_autocast("cuda")


# --- FLOPs: two for each of the K * K multiply-accumulates of an output element; FilterNorm is not counted ------------


@register_flop_formula(torch.ops.ddf_convert.ddf)
def _forward_flops(input: Any, channel_filter: Any, *rest: Any, out_shape: Any, **kwargs: Any) -> int:
    outputs: int = math.prod(out_shape)
    return 2 * int(channel_filter[-1]) ** 2 * outputs


@register_flop_formula(torch.ops.ddf_convert.ddf_backward)
def _backward_flops(
    grad_output: Any, input: Any, channel_filter: Any, spatial_filter: Any, needs: list[bool], *rest: Any, **kwargs: Any
) -> int:
    outputs: int = math.prod(grad_output)
    return sum(needs) * 2 * int(channel_filter[-1]) ** 2 * outputs
