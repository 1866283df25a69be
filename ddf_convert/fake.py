"""Weightless copies of modules: they run on shapes alone, so nothing is computed and the original is never touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy

from ddf_convert.errors import UsageError


@dataclass(frozen=True)
class FakeCopy:
    """A copy of a module whose tensors have shapes and no contents.

    Attributes:
        module: The copy, in evaluation mode, every floating-point parameter asking for a gradient.
        inputs: The example inputs, weightless too.
        mode: The mode under which both run.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    mode: FakeTensorMode

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context to run the copy in: gradients on, whatever the caller's own modes are."""
        autocast_off = torch.autocast("cpu", enabled=False)
        with torch.inference_mode(False), torch.enable_grad(), autocast_off, self.mode:
            yield


def fake_copy(module: nn.Module, inputs: tuple[Any, ...]) -> FakeCopy:
    """Copies a module and its inputs without their contents.

    Every tensor stands on the CPU in the copy, so a module on any device, the meta device included, gives one answer.
    The copy is in evaluation mode because one image is a lawful input there (batch norm in training mode refuses a
    single value per channel).

    Args:
        module: Any module.
        inputs: What its forward takes; tensors are imitated, anything else is passed on.

    Raises:
        UsageError: The module has parameters that are not initialised, or cannot be copied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        copied = _copy(module, "cpu")
        fakes = tuple(_imitate(value.detach(), "cpu") if isinstance(value, Tensor) else value for value in inputs)
    for part in copied.modules():
        part.training = False
    return FakeCopy(copied, fakes, mode)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device, without duplicating a weight on the way.

    Raises:
        UsageError: The module has parameters that are not initialised, or cannot be copied.
    """
    return _copy(module, "meta")


def check_initialised(module: nn.Module) -> None:
    """Raises UsageError if parameters or buffers wait for a first forward pass to get their shapes."""
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise UsageError(
                    f"{type(module).__name__}: {name} is lazy and has no shape yet; run the model once on an example"
                )


def _copy(module: nn.Module, device: str) -> nn.Module:
    check_initialised(module)
    # deepcopy takes what the memo holds for the copy: shared tensors stay shared, and no weight is ever duplicated.
    memo: dict[int, Any] = {id(tensor): _imitate(tensor, device) for tensor in _tensors(module)}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UsageError(f"{type(module).__name__} cannot be copied to look at its shapes: {error}") from error


def _imitate(tensor: Tensor, device: str) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    with torch.inference_mode(False):
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=empty.is_floating_point() or empty.is_complex())
    return empty


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors kept as plain attributes (as weight_norm keeps the weight that it computes)."""
    for part in module.modules():
        for values in (part._parameters, part._buffers, vars(part)):
            yield from (value for value in values.values() if isinstance(value, Tensor))
