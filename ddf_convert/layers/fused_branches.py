"""Computes branches that read the same feature together: a few large calls instead of many small ones.

This needs branches as their constructors make them, without hooks (see ``has_default_forward``). Results differ from
those of single branches by rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.layers.branches import ChannelBranch, SpatialBranch, has_default_forward
from ddf_convert.layers.filter_norm import SpatialFilterNorm
from ddf_convert.ops import filter_norm

FusableBranch = tuple[nn.Conv2d | None, SpatialBranch]  # the depthwise convolution, None with a guide; the branch


def fused_channel_filters(branches: Sequence[nn.Module], input: Tensor) -> Tensor:
    """Returns the filters of N channel branches, fused where possible: (B, C, H, W) -> (B, N*C, K, K)."""
    fusable = [cast(ChannelBranch, branch) for branch in branches if has_default_forward(branch, ChannelBranch)]
    squeezes: list[nn.Conv2d] = []
    expands: list[nn.Conv2d] = []
    if len(fusable) == len(branches) and all(branch.is_as_built() for branch in fusable):
        squeezes, expands = [branch.squeeze for branch in fusable], [branch.expand for branch in fusable]
    if not _have_one_shape(squeezes) or not _have_one_shape(expands):
        return torch.cat([branch(input) for branch in branches], 1)
    norms = [branch.norm for branch in fusable]
    pooled = input.mean((-2, -1))
    squeezed = F.relu(
        F.linear(pooled, _concatenate(conv.weight.flatten(1) for conv in squeezes), _concatenate_biases(squeezes))
    )
    by_branch = squeezed.unflatten(1, (len(fusable), -1)).transpose(0, 1)
    weights = torch.stack([conv.weight.flatten(1).t() for conv in expands])
    raw = by_branch @ weights + _concatenate_biases(expands).view(len(fusable), 1, -1)
    size = norms[0].kernel_size
    # As in ChannelFilterNorm: to the operator, channels are the heads of an image of one pixel.
    flat = raw.transpose(0, 1).reshape(pooled.shape[0], -1, 1, 1)
    scaled = filter_norm(flat, size**2).flatten(1) * _concatenate(norm.std for norm in norms)
    if norms[0].mean is not None:
        scaled = scaled + _concatenate(cast(Tensor, norm.mean) for norm in norms)
    return scaled.to(flat.dtype).view(pooled.shape[0], -1, size, size)


def fusable_spatial_branches(branches: Iterable[nn.Module], guided: bool) -> list[FusableBranch]:
    """Returns the depthwise convolutions and spatial branches of a DDF-Up layer if they can be fused, else [].

    Args:
        branches: Spatial branches of a :class:`~ddf_convert.layers.DDFUp2d`.
        guided: They read a guide, and have no depthwise convolution (None).
    """
    found: list[FusableBranch] = []
    for module in branches:
        depthwise: nn.Conv2d | None = None
        if not guided:
            if not has_default_forward(module, nn.Sequential) or len(cast(nn.Sequential, module)) != 2:
                return []
            depthwise, module = cast("tuple[nn.Conv2d, nn.Module]", module)
        if not has_default_forward(module, SpatialBranch) or len(cast(SpatialBranch, module)) != 2:
            return []
        branch = cast(SpatialBranch, module)
        if not has_default_forward(branch.norm, SpatialFilterNorm) or (branch.norm.std is None) != (
            branch.norm.mean is None
        ):
            return []
        found.append((depthwise, branch))
    depthwises = [depthwise for depthwise, _ in found if depthwise is not None]
    if depthwises and not _have_one_shape(depthwises, depthwise=True):
        return []
    same_norms = len({branch.norm.std is None for _, branch in found}) == 1
    return found if same_norms and _have_one_shape([branch.conv for _, branch in found]) else []


def _have_one_shape(convs: Sequence[nn.Conv2d], depthwise: bool = False) -> bool:
    """Whether these are convolutions as the constructors make them, one or more, all of one shape."""
    return len(convs) > 0 and all(  # bool(list) is more than torch.compile of torch 2.6 can follow
        has_default_forward(conv, nn.Conv2d)
        and conv.weight.shape == convs[0].weight.shape
        and conv.bias is not None
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == tuple(size // 2 for size in conv.kernel_size)
        and conv.padding_mode == "zeros"
        and (conv.groups == conv.out_channels if depthwise else (conv.groups == 1 and conv.kernel_size == (1, 1)))
        for conv in convs
    )


def fused_spatial_filters(branches: Sequence[FusableBranch], source: Tensor) -> Tensor:
    """Returns the filters of N spatial branches before FilterNorm: (B, C, H, W) -> (B, N*G*K*K, H, W).

    A depthwise convolution and the 1x1 convolution behind it become one dense convolution, whose filters are their
    products. It multiplies more but takes no longer: it writes G*K*K maps a branch, where the depthwise ones write C
    that the backward pass needs again. Costs are those of single branches, since the hooks of counters prevent fusing.
    """
    convs = [branch.conv for _, branch in branches]
    weight, bias = _concatenate(conv.weight for conv in convs), _concatenate_biases(convs)
    depthwises = [depthwise for depthwise, _ in branches if depthwise is not None]
    if not depthwises:
        return F.conv2d(source, weight, bias)
    mixing = weight.unflatten(0, (len(depthwises), -1)).flatten(2)  # (N, G*K*K, C)
    filters = torch.stack([depthwise.weight[:, 0] for depthwise in depthwises])  # (N, C, K, K)
    products = mixing[..., None, None] * filters[:, None]
    bias = bias + (mixing @ _concatenate_biases(depthwises).view(len(depthwises), -1, 1)).flatten()
    return F.conv2d(source, products.flatten(0, 1), bias, padding=depthwises[0].padding)


def normalize_spatial_filters(branches: Sequence[FusableBranch], raw: Tensor) -> Tensor:
    """Applies each branch's FilterNorm to its part of :func:`fused_spatial_filters`."""
    norms = [branch.norm for _, branch in branches]
    taps = norms[0].kernel_size ** 2
    if norms[0].std is None:
        return filter_norm(raw, taps, norms[0].scale)
    scale = _concatenate(cast(Tensor, norm.std) for norm in norms).view(-1, 1, 1)
    shift = _concatenate(cast(Tensor, norm.mean) for norm in norms).view(-1, 1, 1)
    return torch.addcmul(shift, filter_norm(raw, taps), scale).to(raw.dtype)


def _concatenate(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


def _concatenate_biases(convs: Sequence[nn.Conv2d]) -> Tensor:
    return _concatenate(cast(Tensor, conv.bias) for conv in convs)
