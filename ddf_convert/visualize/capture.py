"""Captures the filters that the DDF layers of a model predict for an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from ddf_convert.errors import UsageError
from ddf_convert.layers import ChannelFilterNorm, DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d, SpatialFilterNorm
from ddf_convert.utils.capture import forward_hooks
from ddf_convert.utils.example_input import ExampleInput, as_arguments
from ddf_convert.utils.modules import evaluating
from ddf_convert.visualize.layer_filters import LayerFilters


def filters(model: nn.Module, image: ExampleInput) -> list[LayerFilters]:
    """Runs a model once, in evaluation mode and without gradients, and returns the filters of its DDF layers.

    The model keeps its modes, hooks and buffers.

    Args:
        model: Any module that contains :class:`~ddf_convert.layers.DDF2d` or :class:`~ddf_convert.layers.DDFUp2d`.
        image: Input of its forward: a batch (B, C, H, W), normalized as the model expects it, or a tuple or dict of
            several inputs. Tensors are moved to the model's device.

    Returns:
        The layers in the order of their calls. Layers that are not called are left out.

    Raises:
        UsageError: The model has no such layers, or calls none of them.
    """
    while isinstance(model, OptimizedModule | nn.DataParallel | DistributedDataParallel):
        model = cast(nn.Module, model._orig_mod if isinstance(model, OptimizedModule) else model.module)
    layers = find_ddf_layers(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no DDF layers: there are no dynamic filters to see; convert it")
    device = next(model.parameters()).device
    image = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), image)
    args, kwargs = as_arguments(model, image)
    # Compiled code does not check for new hooks.
    eager = torch.compiler.set_stance("force_eager")
    with evaluating(model), torch.no_grad(), eager, _capturing(layers) as captured:
        model(*args, **kwargs)
    if not captured:
        raise UsageError(f"{type(model).__name__} called none of its {len(layers)} DDF layers for this input")
    return captured


@dataclass(frozen=True)
class DDFLayer:
    """A DDF layer in a model, with the name and kind that :class:`LayerFilters` has for it."""

    name: str
    kind: str
    layer: DDF2d | DDFUp2d

    @property
    def scale_factor(self) -> int:
        """Scale factor of a DDF-Up layer, else 1."""
        return self.layer.scale_factor if isinstance(self.layer, DDFUp2d) else 1

    def branches(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """Returns the spatial and the channel branches."""
        if isinstance(self.layer, DDF2d):
            return [self.layer.spatial_branch], [self.layer.channel_branch]
        return list(self.layer.spatial_branch), list(self.layer.channel_branch)

    def is_fixed(self) -> bool:
        """Whether all learned scales of FilterNorm are 0."""
        norms = [part for part in self.layer.modules() if isinstance(part, SpatialFilterNorm | ChannelFilterNorm)]
        return self.layer.affine and not any(norm.std is not None and bool(norm.std.detach().any()) for norm in norms)


def find_ddf_layers(model: nn.Module) -> list[DDFLayer]:
    """Returns the DDF layers of a model, in the order of its modules; a shared one once."""
    found: dict[nn.Module, DDFLayer] = {}
    for name, module in model.named_modules():
        layer = (
            module.ddf if isinstance(module, DDFConv2d) else module.up if isinstance(module, DDFUpConv2d) else module
        )
        if isinstance(layer, DDF2d | DDFUp2d) and layer not in found:  # the wrapper comes before the layer inside it
            found[layer] = DDFLayer(name, type(module).__name__, layer)
    return list(found.values())


@contextmanager
def _capturing(layers: Sequence[DDFLayer]) -> Iterator[list[LayerFilters]]:
    """A context in which every call of a layer adds its filters to a list.

    Hooks on the branches also make the layers call them one by one, instead of several at once (see
    ``ddf_convert/layers/fused_branches.py``).
    """
    captured: list[LayerFilters] = []
    calls: Counter[str] = Counter()
    outputs: dict[nn.Module, Tensor] = {}

    def keep_output(branch: nn.Module, _: Any, output: Tensor) -> None:
        detached = output.detach().cpu()
        outputs[branch] = detached if detached.dtype == torch.float64 else detached.float()

    def collect(layer: DDFLayer, *_: Any) -> None:
        calls[layer.name] += 1
        spatial, channel = ([outputs.pop(branch) for branch in branches] for branches in layer.branches())
        captured.append(_layer_filters(layer, spatial, channel, calls[layer.name]))

    hooks: list[tuple[nn.Module, Callable[..., Any]]] = []
    for layer in layers:
        hooks += [(branch, keep_output) for branches in layer.branches() for branch in branches]
        hooks.append((layer.layer, partial(collect, layer)))
    with forward_hooks(hooks):
        yield captured


def _layer_filters(layer: DDFLayer, spatial: list[Tensor], channel: list[Tensor], call: int) -> LayerFilters:
    size, step = layer.layer.kernel_size[0], layer.scale_factor
    maps = torch.stack(spatial, 2)  # (B, G*K*K, N, H, W), as a pixel shuffle takes it
    interleaved = torch.pixel_shuffle(maps.flatten(1, 2), step)
    return LayerFilters(
        name=layer.name,
        kind=layer.kind,
        spatial=interleaved.unflatten(1, (layer.layer.heads, size, size)),
        channel=torch.stack(channel, 1),
        combine=layer.layer.combine,
        scale_factor=step,
        untouched=layer.is_fixed(),
        call=call,
    )
