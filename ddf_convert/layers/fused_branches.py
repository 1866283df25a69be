"""Branches that read the same feature, computed together: a few large calls in the place of many small ones.

It is done only where nobody could tell the difference: with branches as their constructors make them, that nothing
watches (see direct.py). Results differ from those of the single branches by rounding.
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


def channel_filters(branches: Sequence[nn.Module], input: Tensor) -> Tensor:
    """What N channel branches make of one input: (B, C, H, W) -> (B, N*C, K, K)."""
    alike = [cast(ChannelBranch, branch) for branch in branches if has_default_forward(branch, ChannelBranch)]
    whole = len(alike) == len(branches) and all(branch.is_as_built() for branch in alike)
    squeezes, expands = (
        ([branch.squeeze for branch in alike], [branch.expand for branch in alike]) if whole else ([], [])
    )
    if not _match(squeezes) or not _match(expands):
        return torch.cat([branch(input) for branch in branches], 1)
    norms = [branch.norm for branch in alike]
    pooled = input.mean((-2, -1))
    squeezed = F.relu(F.linear(pooled, _joined(conv.weight.flatten(1) for conv in squeezes), _biases(squeezes)))
    by_branch = squeezed.unflatten(1, (len(alike), -1)).transpose(0, 1)
    weights = torch.stack([conv.weight.flatten(1).t() for conv in expands])
    raw = by_branch @ weights + _biases(expands).view(len(alike), 1, -1)
    size = norms[0].kernel_size
    # As in ChannelFilterNorm: to the operator, channels are the heads of an image of one pixel.
    flat = raw.transpose(0, 1).reshape(pooled.shape[0], -1, 1, 1)
    scaled = filter_norm(flat, size**2).flatten(1) * _joined(norm.std for norm in norms)
    if norms[0].mean is not None:
        scaled = scaled + _joined(cast(Tensor, norm.mean) for norm in norms)
    return scaled.to(flat.dtype).view(pooled.shape[0], -1, size, size)


def alike_spatial_branches(branches: Iterable[nn.Module], guided: bool) -> list[tuple[nn.Conv2d | None, SpatialBranch]]:
    """The parts of spatial branches, if they can be computed together; an empty list if not.

    Args:
        branches: Of a :class:`~ddf_convert.layers.DDFUp2d`.
        guided: Whether they read a guide; else each begins with a depthwise convolution.
    """
    found: list[tuple[nn.Conv2d | None, SpatialBranch]] = []
    for module in branches:
        first: nn.Conv2d | None = None
        if not guided:
            if not has_default_forward(module, nn.Sequential) or len(cast(nn.Sequential, module)) != 2:
                return []
            first, module = cast("tuple[nn.Conv2d, nn.Module]", module)
        if not has_default_forward(module, SpatialBranch) or len(cast(SpatialBranch, module)) != 2:
            return []
        branch = cast(SpatialBranch, module)
        if not has_default_forward(branch.norm, SpatialFilterNorm) or (branch.norm.std is None) != (
            branch.norm.mean is None
        ):
            return []
        found.append((first, branch))
    firsts = [first for first, _ in found if first is not None]
    if firsts and not _match(firsts, depthwise=True):
        return []
    same_norms = len({branch.norm.std is None for _, branch in found}) == 1
    return found if same_norms and _match([branch.conv for _, branch in found]) else []


def _match(convs: Sequence[nn.Conv2d], depthwise: bool = False) -> bool:
    """Whether these are convolutions as the constructors make them, all of one shape."""
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


def raw_spatial_filters(branches: Sequence[tuple[nn.Conv2d | None, SpatialBranch]], read: Tensor) -> Tensor:
    """What N spatial branches make of one feature, before FilterNorm: (B, C, H, W) -> (B, N*G*K*K, H, W).

    A depthwise convolution and the 1x1 convolution behind it are one dense convolution, whose filters are their
    products. It multiplies more, and takes no longer: it writes G*K*K maps a branch, where the depthwise ones write C
    that the backward pass needs again. Costs are counted of the branches one by one, which counters' hooks bring about.
    """
    convs = [branch.conv for _, branch in branches]
    weight, bias = _joined(conv.weight for conv in convs), _biases(convs)
    firsts = [first for first, _ in branches if first is not None]
    if not firsts:
        return F.conv2d(read, weight, bias)
    mixing = weight.unflatten(0, (len(firsts), -1)).flatten(2)  # (N, G*K*K, C)
    depthwise = torch.stack([first.weight[:, 0] for first in firsts])  # (N, C, K, K)
    products = mixing[..., None, None] * depthwise[:, None]
    bias = bias + (mixing @ _biases(firsts).view(len(firsts), -1, 1)).flatten()
    return F.conv2d(read, products.flatten(0, 1), bias, padding=firsts[0].padding)


def normalized(branches: Sequence[tuple[nn.Conv2d | None, SpatialBranch]], raw: Tensor) -> Tensor:
    """FilterNorm of what :func:`raw_spatial_filters` made, each branch's part by its own."""
    norms = [branch.norm for _, branch in branches]
    taps = norms[0].kernel_size ** 2
    if norms[0].std is None:
        return filter_norm(raw, taps, norms[0].scale)
    scale = _joined(cast(Tensor, norm.std) for norm in norms).view(-1, 1, 1)
    shift = _joined(cast(Tensor, norm.mean) for norm in norms).view(-1, 1, 1)
    return torch.addcmul(shift, filter_norm(raw, taps), scale).to(raw.dtype)


def _joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


def _biases(convs: Sequence[nn.Conv2d]) -> Tensor:
    return _joined(cast(Tensor, conv.bias) for conv in convs)
