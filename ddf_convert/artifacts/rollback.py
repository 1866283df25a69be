"""Restores a model when a change to it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.utils.fake_copy import tensors_of

_CONTAINERS = (dict, list, set)  # and subclasses, such as OrderedDict and defaultdict


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Restores a model to its previous state if the body raises.

    That is: modules, parameters and buffers with their values, dtypes and gradient flags, classes, hooks, training
    modes, and attributes, including the contents of containers. Copies of the values are kept on the CPU meanwhile.
    """
    tensors = [_TensorSnapshot(tensor) for tensor in {id(each): each for each in tensors_of(model)}.values()]
    modules: list[_ModuleSnapshot] = []
    containers: dict[int, _ContainerSnapshot] = {}
    for part in model.modules():
        modules.append(_ModuleSnapshot(part))
        for attribute in vars(part).values():
            _snapshot_containers(attribute, containers)
    try:
        yield
    except BaseException:
        snapshots: list[_ModuleSnapshot | _ContainerSnapshot | _TensorSnapshot]
        snapshots = [*modules, *containers.values(), *tensors]
        for snapshot in snapshots:
            snapshot.restore()
        raise


class _ModuleSnapshot:
    """A module's class and attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.attributes = module, type(module), dict(vars(module))

    def restore(self) -> None:
        object.__setattr__(self.module, "__class__", self.kind)
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)


class _ContainerSnapshot:
    """The content of a container, in its order."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.content = dict(container) if isinstance(container, dict) else list(container)

    def restore(self) -> None:
        self.container.clear()
        if isinstance(self.container, list):
            self.container.extend(self.content)
        else:
            self.container.update(self.content)


class _TensorSnapshot:
    """A tensor's memory, and the values in it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.memory, self.requires_grad = tensor, tensor.data, tensor.requires_grad
        dense = tensor.layout is torch.strided and tensor.device.type != "meta"
        self.values = tensor.detach().to("cpu", copy=True) if dense else None

    @torch.no_grad()
    def restore(self) -> None:
        self.tensor.data = self.memory
        # Only what was written: some memory, such as that of expanded views, cannot be.
        if self.values is not None and not _same_bits(self.memory, self.values):
            self.memory.copy_(self.values)
        if self.tensor.is_leaf and self.tensor.requires_grad != self.requires_grad:
            self.tensor.requires_grad_(self.requires_grad)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    bits = [each.cpu().contiguous().reshape(-1).view(torch.uint8) for each in (one, other)]
    return torch.equal(*bits)


def _snapshot_containers(value: Any, snapshots: dict[int, _ContainerSnapshot]) -> None:
    """Adds a container and those inside it, by id; for an object of the user's, its attributes."""
    if isinstance(value, nn.Module | Tensor | type | ModuleType | FunctionType):
        return
    if not isinstance(value, _CONTAINERS):
        value = getattr(value, "__dict__", None)
    if isinstance(value, _CONTAINERS) and id(value) not in snapshots:
        snapshots[id(value)] = _ContainerSnapshot(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _snapshot_containers(inner, snapshots)
