"""The package's operators in torch's own, for programs that run where ddf_convert is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddf_convert import reference


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """Returns the reference of both operators, for ``ExportedProgram.run_decompositions``."""
    operators = torch.ops.ddf_convert
    return {operators.ddf.default: _ddf, operators.filter_norm.default: _filter_norm}


def _ddf(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    upscale_factor: int = 1,
    norm_scale: float | None = None,
) -> Tensor:
    geometry = reference.Geometry(stride, padding, dilation, combine, upscale_factor)
    return reference.forward(input, channel_filter, spatial_filter, geometry, norm_scale)


def _filter_norm(filters: Tensor, taps: int, scale: float) -> Tensor:
    return reference.filter_norm(filters, taps, scale).to(filters.dtype)
