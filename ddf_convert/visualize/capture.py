"""The filters that the DDF layers of a model predict for an image, caught while it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from ddf_convert.errors import UsageError
from ddf_convert.layers import (
    ChannelFilterNorm,
    DDF2d,
    DDFConv2d,
    DDFUp2d,
    DDFUpConv2d,
    SpatialFilterNorm,
)
from ddf_convert.utils.example_input import ExampleInput, as_arguments
from ddf_convert.utils.modules import evaluating
from ddf_convert.visualize.dynamics import Dynamics, measure


@dataclass(frozen=True)
class LayerFilters:
    """The filters of one layer, as the operator gets them: after FilterNorm. On the CPU, float32 (or float64).

    Attributes:
        name: Path of the layer in the model, as a plan names it: of a DDF layer with a 1x1 convolution, that of both.
        kind: "DDF2d", "DDFConv2d", "DDFUp2d" or "DDFUpConv2d".
        spatial: (B, G, K, K, Ho, Wo): for every pixel of the layer's output, and every head, one filter. Those of a
            DDF-Up layer are put together from its branches.
        channel: (B, N, C, K, K): for every channel one filter, in each of N branches: 1, or s*s of a DDF-Up layer.
        combine: "mul" or "add": how the two become the filter that is applied.
        scale_factor: s of a DDF-Up layer, else 1.
        untouched: The layer still is what :meth:`~ddf_convert.layers.DDF2d.fix` made of it: a fixed filter, whose
            dynamic parts have scales of 0.
        call: Of a layer that is called several times in a forward pass, which call it was, from 1.
    """

    name: str
    kind: str
    spatial: Tensor = field(repr=False)
    channel: Tensor = field(repr=False)
    combine: str
    scale_factor: int = 1
    untouched: bool = False
    call: int = 1

    @property
    def title(self) -> str:
        """Its name, with the number of the call if that is not the first."""
        return self.name if self.call == 1 else f"{self.name} (call {self.call})"

    @property
    def kernel_size(self) -> int:
        """K."""
        return self.spatial.shape[2]

    @property
    def heads(self) -> int:
        """G."""
        return self.spatial.shape[1]

    @property
    def channels(self) -> int:
        """C."""
        return self.channel.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """(Ho, Wo) of the layer's output."""
        return self.spatial.shape[4], self.spatial.shape[5]

    def by_branch(self) -> Tensor:
        """The spatial filters, (B, N, G, K*K, P): branch by branch, P pixels of the input each."""
        step = self.scale_factor
        cells: Tensor = (
            self.spatial.flatten(2, 3).unflatten(-1, (-1, step)).unflatten(-3, (-1, step))
        )  # (..., H, s, W, s)
        return cells.movedim((4, 6), (1, 2)).flatten(1, 2).flatten(-2)

    @cached_property
    def dynamics(self) -> Dynamics:
        """How dynamic the filters are, on these images."""
        return measure(self.by_branch(), self.channel.flatten(3), self.combine)


def filters(model: nn.Module, image: ExampleInput) -> list[LayerFilters]:
    """Runs a model once, in evaluation mode and without gradients, and returns the filters of its DDF layers.

    The model is left as it was: its modes, its hooks, its buffers.

    Args:
        model: Anything with :class:`~ddf_convert.layers.DDF2d` or :class:`~ddf_convert.layers.DDFUp2d` in it.
        image: What its forward takes: a batch (B, C, H, W), normalized as the model expects it; a tuple or a dict of
            several inputs. Tensors are moved to the model's device.

    Returns:
        The layers in the order in which they were called. Layers that are not called are not in it.

    Raises:
        UsageError: The model has no such layers, or calls none of them.
    """
    while isinstance(model, OptimizedModule | nn.DataParallel | DistributedDataParallel):
        model = cast(nn.Module, model._orig_mod if isinstance(model, OptimizedModule) else model.module)
    layers = ddf_layers(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no DDF layers: there are no dynamic filters to see; convert it")
    first = next(model.parameters())
    image = _pytree.tree_map(lambda value: value.to(first.device) if isinstance(value, Tensor) else value, image)
    args, kwargs = as_arguments(model, image)
    # Compiled code does not look whether there are new hooks.
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(model), torch.no_grad(), eager, _watching(layers) as found:
        model(*args, **kwargs)
    if not found:
        raise UsageError(f"{type(model).__name__} called none of its {len(layers)} DDF layers for this input")
    return found


@dataclass(frozen=True)
class Place:
    """A DDF layer in a model.

    Attributes:
        name: As of :class:`LayerFilters`.
        kind: The same.
        layer: What makes the filters.
    """

    name: str
    kind: str
    layer: DDF2d | DDFUp2d


def ddf_layers(model: nn.Module) -> list[Place]:
    """The DDF layers of a model, in the order of its modules; a shared one once."""
    found: dict[nn.Module, Place] = {}
    for name, module in model.named_modules():
        layer = (
            module.ddf if isinstance(module, DDFConv2d) else module.up if isinstance(module, DDFUpConv2d) else module
        )
        if isinstance(layer, DDF2d | DDFUp2d) and layer not in found:  # those around come before those inside
            found[layer] = Place(name, type(module).__name__, layer)
    return list(found.values())


@contextmanager
def _watching(places: Sequence[Place]) -> Iterator[list[LayerFilters]]:
    """A context in which every call of a layer adds its filters to a list.

    Hooks on the branches also see to it that the layers call them, where they would else calculate several at once
    (see ``ddf_convert/layers/branches.py``).
    """
    found: list[LayerFilters] = []
    calls: dict[str, int] = {}
    caught: dict[nn.Module, Tensor] = {}
    handles: list[Any] = []

    def keep(branch: nn.Module, _: Any, output: Tensor) -> None:
        detached = output.detach().cpu()
        caught[branch] = detached if detached.dtype == torch.float64 else detached.float()

    def watch(place: Place) -> None:
        spatial, channel = _branches(place.layer)

        def finish(*_: Any) -> None:
            calls[place.name] = calls.get(place.name, 0) + 1
            taken = [[caught.pop(branch) for branch in branches] for branches in (spatial, channel)]
            found.append(_joined(place, taken[0], taken[1], calls[place.name]))

        handles.extend(branch.register_forward_hook(keep) for branch in (*spatial, *channel))
        handles.append(place.layer.register_forward_hook(finish))

    try:
        for place in places:
            watch(place)
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _branches(layer: DDF2d | DDFUp2d) -> tuple[list[nn.Module], list[nn.Module]]:
    if isinstance(layer, DDF2d):
        return [layer.spatial_branch], [layer.channel_branch]
    return list(layer.spatial_branch), list(layer.channel_branch)


def _joined(place: Place, spatial: list[Tensor], channel: list[Tensor], call: int) -> LayerFilters:
    layer = place.layer
    size, step = layer.kernel_size[0], layer.scale_factor if isinstance(layer, DDFUp2d) else 1
    maps = torch.stack(spatial, 2)  # (B, G*K*K, N, H, W), which a pixel shuffle takes
    whole = torch.pixel_shuffle(maps.flatten(1, 2), step)
    return LayerFilters(
        name=place.name,
        kind=place.kind,
        spatial=whole.unflatten(1, (layer.heads, size, size)),
        channel=torch.stack(channel, 1),
        combine=layer.combine,
        scale_factor=step,
        untouched=layer.affine and not any(bool(norm.std.detach().any()) for norm in _norms(layer)),
        call=call,
    )


def _norms(layer: nn.Module) -> list[Any]:
    """The FilterNorms that learn a scale."""
    norms = (SpatialFilterNorm, ChannelFilterNorm)
    return [module for module in layer.modules() if isinstance(module, norms) and module.std is not None]
