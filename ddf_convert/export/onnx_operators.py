"""Translates the package's operators to ONNX graphs of standard operators, for ``torch.onnx``.

Taps are slices of the padded map that end a fixed number of pixels before its border. This needs no arithmetic with
sizes: every number in the graph is a constant, whatever the size of the image. The rest is as in ``reference``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ddf_convert.reference import EPSILON, LEAST_SQUARE

_TO_THE_END = 2**31 - 1  # beyond any size: ONNX has no None


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Returns a ``custom_translation_table`` for ``torch.onnx.export``; needs onnxscript."""
    from onnxscript import opset18

    op: Any = opset18

    def constants() -> Callable[..., Any]:
        """Returns a function that makes each list of integers once, since every node slows the export down."""
        return functools.cache(lambda *values: op.Constant(value_ints=list(values)))

    def number(value: float) -> Any:
        return op.Constant(value_float=float(value))

    def to_float32(value: Any) -> Any:
        """Half types are calculated in float32."""
        return op.Cast(value, to=_FLOAT) if value.dtype in _halves() else value

    def filter_norm(filters: Any, taps: int, scale: float) -> Any:
        return op.CastLike(normalized(filters, taps, scale), filters)

    def normalized(filters: Any, taps: int, scale: float) -> Any:
        ints, wide = constants(), to_float32(filters)
        by_tap = op.Reshape(wide, ints(0, filters.shape[1] // taps, taps, -1))
        shifted = op.Sub(by_tap, op.Slice(by_tap, ints(0), ints(1), ints(2)))
        centered = op.Sub(shifted, op.ReduceMean(shifted, ints(2), keepdims=1))
        square = op.ReduceSum(op.Mul(centered, centered), ints(2), keepdims=1)
        square = op.Max(square, number(LEAST_SQUARE))
        deviation = op.Sqrt(op.Div(square, number(taps - 1)))
        factor = op.Div(number(scale), op.Add(deviation, number(EPSILON)))
        return op.Reshape(op.Mul(centered, factor), op.Shape(filters))

    def ddf(
        input: Any,
        channel_filter: Any,
        spatial_filter: Any,
        stride: int,
        padding: int,
        dilation: int,
        combine: str,
        upscale_factor: int = 1,
        norm_scale: float | None = None,
    ) -> Any:
        if norm_scale is None:
            spatial = to_float32(spatial_filter)
        else:
            spatial = normalized(spatial_filter, channel_filter.shape[-1] ** 2, norm_scale)
        ints = constants()
        channels, size = input.shape[1], channel_filter.shape[-1]
        taps, cells = size**2, upscale_factor**2
        heads = spatial_filter.shape[1] // (cells * taps)
        padded = to_float32(input)
        if padding:
            padded = op.Pad(padded, ints(*(0, 0, padding, padding) * 2))
        views = []
        for tap in range(taps):
            first = tuple(place * dilation for place in divmod(tap, size))
            last = tuple(place - dilation * (size - 1) or _TO_THE_END for place in first)
            is_slice = last != first or stride > 1
            view = op.Slice(padded, ints(*first), ints(*last), ints(2, 3), ints(stride, stride))
            views.append(view if is_slice else padded)
        # One tap of one cell at a time: (B, G, Ho, Wo) and (B, C, 1, 1).
        per_pixel = spatial_taps(spatial, cells, heads, taps, ints)
        by_tap = op.Reshape(to_float32(channel_filter), ints(0, cells * channels, taps, 1))
        per_channel = [op.Split(cell, num_outputs=taps, axis=2) for cell in split(by_tap, cells)]
        combined = op.Mul if combine == "mul" else op.Add
        outputs = []
        for cell in range(cells):
            total = None
            for tap, view in enumerate(views):
                weights = per_pixel[cell * taps + tap]
                if heads > 1:
                    weights = by_channel(weights, channels, heads)
                term = op.Mul(combined(weights, per_channel[cell][tap]), view)
                total = term if total is None else op.Add(total, term)
            outputs.append(total)
        if cells == 1:
            output = outputs[0]
        else:
            output = op.DepthToSpace(op.Concat(*outputs, axis=1), blocksize=upscale_factor, mode="DCR")
        return op.CastLike(output, input)

    def split(value: Any, count: int) -> list[Any]:
        return [value] if count == 1 else list(op.Split(value, num_outputs=count, axis=1))

    def spatial_taps(spatial: Any, cells: int, heads: int, taps: int, ints: Callable[..., Any]) -> list[Any]:
        """(B, cells*G*taps, Ho, Wo) -> one (B, G, Ho, Wo) for each tap of each cell."""
        if heads == 1:
            return split(spatial, cells * taps)
        ends = [((cell + 1) * heads * taps, cell * heads * taps + tap) for cell in range(cells) for tap in range(taps)]
        return [op.Slice(spatial, ints(first), ints(end), ints(1), ints(taps)) for end, first in ends]

    def by_channel(per_head: Any, channels: int, heads: int) -> Any:
        """(B, G, H, W) -> (B, C, H, W): each head's map for all of its channels."""
        head_of_channel = [channel // (channels // heads) for channel in range(channels)]
        return op.Gather(per_head, op.Constant(value_ints=head_of_channel), axis=1)

    operators = torch.ops.ddf_convert
    return {operators.ddf.default: ddf, operators.filter_norm.default: filter_norm}


_FLOAT = 1  # ONNX's number for float32


def _halves() -> tuple[Any, ...]:
    import onnx_ir

    return onnx_ir.DataType.FLOAT16, onnx_ir.DataType.BFLOAT16
