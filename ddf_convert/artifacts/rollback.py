"""Changes to a model that are made whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.utils.fake_copy import tensors_of

_CONTAINERS = (dict, list, set)  # with their subclasses, OrderedDict and defaultdict among them


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """A context in which a model may be changed; if the body raises, the model is as it was before.

    Put back are modules, parameters and buffers with their values, dtypes and gradient flags, classes, hooks, modes,
    and attributes, also in containers. The values are kept on the CPU meanwhile.
    """
    values = [_Value(tensor) for tensor in {id(each): each for each in tensors_of(model)}.values()]
    objects: list[_Object] = []
    containers: dict[int, _Container] = {}
    for part in model.modules():
        objects.append(_Object(part))
        for attribute in vars(part).values():
            _note(attribute, containers)
    try:
        yield
    except BaseException:
        for module in objects:
            module.put_back()
        for container in containers.values():
            container.put_back()
        for value in values:
            value.put_back()
        raise


class _Object:
    """A module's class and attributes."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind, self.attributes = module, type(module), dict(vars(module))

    def put_back(self) -> None:
        object.__setattr__(self.module, "__class__", self.kind)
        own = vars(self.module)
        own.clear()
        own.update(self.attributes)


class _Container:
    """What a container holds, in its order."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self.content = dict(container) if isinstance(container, dict) else list(container)

    def put_back(self) -> None:
        self.container.clear()
        if isinstance(self.container, list):
            self.container.extend(self.content)
        else:
            self.container.update(self.content)


class _Value:
    """A tensor's memory, and what stands in it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.memory, self.learns = tensor, tensor.data, tensor.requires_grad
        plain = tensor.layout is torch.strided and tensor.device.type != "meta"
        self.content = tensor.detach().to("cpu", copy=True) if plain else None

    @torch.no_grad()
    def put_back(self) -> None:
        self.tensor.data = self.memory
        if self.content is not None and not _same_bits(self.memory, self.content):
            self.memory.copy_(self.content)
        if self.tensor.is_leaf and self.tensor.requires_grad != self.learns:
            self.tensor.requires_grad_(self.learns)


def _same_bits(memory: Tensor, content: Tensor) -> bool:
    """Whether nothing was written; what was not is not written again, since not all memory can be (expanded views)."""
    bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (memory.cpu(), content)]
    return torch.equal(*bits)


def _note(value: Any, noted: dict[int, _Container]) -> None:
    if isinstance(value, nn.Module | Tensor | type | ModuleType | FunctionType):
        return
    if not isinstance(value, _CONTAINERS):
        value = getattr(value, "__dict__", None)  # of an object of the user's
    if isinstance(value, _CONTAINERS) and id(value) not in noted:
        noted[id(value)] = _Container(value)
        for inner in value.values() if isinstance(value, dict) else value:
            _note(inner, noted)
