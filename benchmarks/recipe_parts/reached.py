"""Which parameters of the new layers a gradient reaches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ddf_convert.recipes.parameters import new_layers

# Names of a layer's parameters, in words; in the order in which they are shown.
_PARTS = {
    "spatial_branch.0": "spatial filter: its 1x1 convolution",
    "spatial_branch.1.std": "spatial filter: FilterNorm's scale",
    "spatial_branch.1.mean": "spatial filter: FilterNorm's shift",
    "channel_branch.1": "channel filter: squeeze",
    "channel_branch.3": "channel filter: expand",
    "channel_branch.4.std": "channel filter: FilterNorm's scale",
    "channel_branch.4.mean": "channel filter: FilterNorm's shift",
    "mix": "1x1 convolution behind",
    "bias": "bias",
}


def reached(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part of the new layers: tensors with a gradient that is not 0 throughout, and all tensors."""
    counts: dict[str, tuple[int, int]] = {}
    for layer in new_layers(model).values():
        for name, parameter in layer.named_parameters():
            part = part_of(name)
            yes, all_ = counts.get(part, (0, 0))
            gradient = parameter.grad
            counts[part] = yes + int(gradient is not None and bool(gradient.any())), all_ + 1
    return {part: counts[part] for part in _PARTS.values() if part in counts}


def part_of(name: str) -> str:
    """The part that a parameter of a DDF layer belongs to."""
    return next(words for start, words in _PARTS.items() if name.removeprefix("ddf.").startswith(start))


def over_steps(
    model: nn.Module, objective: nn.Module, groups: Iterable[dict], batch: tuple[torch.Tensor, torch.Tensor], steps: int
) -> list[dict[str, tuple[int, int]]]:
    """What is reached at each of the first steps; the model learns."""
    optimizer = torch.optim.AdamW(list(groups))
    model.train()
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        objective(*batch)["loss"].backward()
        found.append(reached(model))
        optimizer.step()
    return found
