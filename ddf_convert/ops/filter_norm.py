"""The FilterNorm operator ``ddf_convert::filter_norm`` and its gradient, registered with torch.library.

Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddf_convert import reference
from ddf_convert.ops.ddf import Backend, register_backends
from ddf_convert.ops.registration import register_autograd, register_vmap
from ddf_convert.reference.checks import check_filters, check_filters_gradient, memory_format

_library = torch.library.Library("ddf_convert", "FRAGMENT")
_library.define(
    "filter_norm(Tensor filters, int taps, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "filter_norm_backward(Tensor grad_output, Tensor filters, int taps, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def filter_norm(filters: Tensor, taps: int, scale: float = 1.0) -> Tensor:
    """Standardizes every filter over its taps, which keeps the training of generated filters stable.

    ``out = scale * (filters - mean) / (deviation + 1e-10)``, mean and unbiased standard deviation over the taps of one
    head at one pixel.

    Args:
        filters: (B, G*taps, H, W), float32, float64, float16 or bfloat16; contiguous or channels_last (kept).
        taps: Of one filter, K*K, 2 or more.
        scale: The deviation of a normalized filter over its taps.

    Returns:
        The shape, dtype and memory format of ``filters``. Half types are calculated in float32, then rounded.

    Raises:
        ValueError: The shape or ``taps`` does not fit.
        TypeError: The dtype is not among those above.

    Source: Zhou et al., "Decoupled Dynamic Filter Networks", CVPR 2021, section 3.2.
    """
    normalized: Tensor = torch.ops.ddf_convert.filter_norm(filters, taps, scale)
    return normalized


def _check_backward(grad_output: Tensor, filters: Tensor, taps: int, scale: float) -> None:
    check_filters(filters, taps)
    check_filters_gradient(grad_output, filters)


def _forward(backend: Backend, filters: Tensor, taps: int, scale: float) -> Tensor:
    check_filters(filters, taps)
    return _like(filters, backend(filters).filter_norm(filters, taps, scale))


def _backward(backend: Backend, grad_output: Tensor, filters: Tensor, taps: int, scale: float) -> Tensor:
    _check_backward(grad_output, filters, taps, scale)
    return _like(filters, backend(filters).filter_norm_backward(grad_output, filters, taps, scale))


def _like(filters: Tensor, result: Tensor) -> Tensor:
    return result.to(filters.dtype).contiguous(memory_format=memory_format(filters))


# Only CUDA has kernels of its own; a CPU takes the reference too.
register_backends(_library, "filter_norm", _forward, ("CompositeExplicitAutograd", "CUDA"))
register_backends(_library, "filter_norm_backward", _backward, ("CompositeExplicitAutograd", "CUDA"))


# --- fake: shapes, dtypes and memory formats --------------------------------------------------------------------------


@torch.library.register_fake("ddf_convert::filter_norm")  # type: ignore[untyped-decorator]
def _forward_fake(filters: Tensor, taps: int, scale: float) -> Tensor:
    check_filters(filters, taps)
    return _empty(filters)


@torch.library.register_fake("ddf_convert::filter_norm_backward")  # type: ignore[untyped-decorator]
def _backward_fake(grad_output: Tensor, filters: Tensor, taps: int, scale: float) -> Tensor:
    _check_backward(grad_output, filters, taps, scale)
    return _empty(filters)


def _empty(filters: Tensor) -> Tensor:
    layout = memory_format(filters)
    return torch.empty(filters.shape, dtype=filters.dtype, device=filters.device, memory_format=layout)


# --- autograd, to any order -------------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.taps, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    (filters,) = ctx.saved_tensors
    return torch.ops.ddf_convert.filter_norm_backward(grad_output, filters, ctx.taps, ctx.scale), None, None


def _second_gradients(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, filters = ctx.saved_tensors
    by_grad = by_filters = None
    if ctx.needs_input_grad[0]:  # the Jacobian is symmetric
        by_grad = torch.ops.ddf_convert.filter_norm_backward(cotangent, filters, ctx.taps, ctx.scale)
    if ctx.needs_input_grad[1]:
        by_filters = reference.filter_norm_second_backward(cotangent, grad_output, filters, ctx.taps, ctx.scale)
        by_filters = by_filters.to(filters.dtype)
    return by_grad, by_filters, None, None


register_autograd(_library, "filter_norm", _gradient, _save)
register_autograd(_library, "filter_norm_backward", _second_gradients, _save)

register_vmap("filter_norm", 1, lambda filters, taps, scale: check_filters(filters, taps))
register_vmap("filter_norm_backward", 2, _check_backward)
