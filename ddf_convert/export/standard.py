"""The package's operators in torch's own, for programs that run where ddf_convert is not installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddf_convert import reference


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What ``ExportedProgram.run_decompositions`` takes: the reference, in the place of the three operators."""
    operators = torch.ops.ddf_convert
    return {
        operators.ddf.default: _ddf,
        operators.ddf_normalized.default: _ddf_normalized,
        operators.filter_norm.default: _filter_norm,
    }


def _ddf(input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, *options: Any) -> Tensor:
    return reference.forward(input, channel_filter, spatial_filter, *options)


def _ddf_normalized(
    input: Tensor, channel_filter: Tensor, spatial_filter: Tensor, scale: float, *options: Any
) -> Tensor:
    normalized = reference.filter_norm(spatial_filter, channel_filter.shape[-1] ** 2, scale)
    return reference.forward(input, channel_filter, normalized, *options)


def _filter_norm(filters: Tensor, taps: int, scale: float) -> Tensor:
    return reference.filter_norm(filters, taps, scale).to(filters.dtype)
