"""A DDF layer with one of its two filters alone, as in the paper's table 3: the other one is 1 everywhere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddf_convert.layers import DDF2d


class OnesForPixels(nn.Module):
    """In the place of a spatial branch."""

    def __init__(self, layer: DDF2d) -> None:
        super().__init__()
        self.taps = layer.heads * layer.kernel_size[0] ** 2
        self.stride = layer.stride[0]

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G*K*K, ceil(H / stride), ceil(W / stride)) ones."""
        rows, columns = (-(-size // self.stride) for size in input.shape[-2:])
        return input.new_ones(len(input), self.taps, rows, columns)


class OnesForChannels(nn.Module):
    """In the place of a channel branch."""

    def __init__(self, layer: DDF2d) -> None:
        super().__init__()
        self.shape = layer.in_channels, *layer.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, K, K) ones."""
        return input.new_ones(len(input), *self.shape)


@torch.no_grad()
def spatial_alone(model: nn.Module) -> None:
    """Leaves every DDF layer its spatial filter."""
    for layer in _layers(model):
        layer.channel_branch = OnesForChannels(layer)


@torch.no_grad()
def channel_alone(model: nn.Module) -> None:
    """Leaves every DDF layer its channel filter."""
    for layer in _layers(model):
        layer.spatial_branch = OnesForPixels(layer)


def _layers(model: nn.Module) -> list[DDF2d]:
    found = [module for module in model.modules() if isinstance(module, DDF2d)]
    if not found or any(layer.combine != "mul" for layer in found):
        raise ValueError("there must be DDF layers, and they must multiply: 1 is the other filter's nothing")
    return found
