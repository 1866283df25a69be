"""One forward pass: the structure of its output, and how many convolutions and DDF operators ran."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class ForwardResult:
    """What a forward pass did.

    Attributes:
        output: Types, dtypes and shapes of all that it returned.
        convolutions: Number of 2D convolutions that ran, also transposed and functional ones.
        ddf: Number of DDF operators that ran.
    """

    output: str
    convolutions: int
    ddf: int


class _OperatorCounter(TorchDispatchMode):
    """Counts below autograd, where every kind of call of a convolution is the same operator."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0
        self.ddf = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default and args[1].dim() == 4:
            self.convolutions += 1
        elif func is torch.ops.ddf_convert.ddf.default:
            self.ddf += 1
        return func(*args, **(kwargs or {}))


def on_shapes(model: nn.Module, inputs: tuple[Any, ...]) -> ForwardResult:
    """Runs a copy without computing anything; without ddf_convert, whose results are checked with this."""
    copied = copy.deepcopy(model)  # models keep tensors for the next call, and these would have no contents
    device = device_of(model)
    if device.type == "meta":  # a quarter of the time of fake tensors
        with device:
            return _run(copied, inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        return _run(copied, inputs)


def for_real(model: nn.Module, inputs: tuple[Any, ...]) -> ForwardResult:
    """Runs the model itself, if shapes depend on values; the first size of its outputs counts as unknown."""
    return _run(model, inputs, first="n")


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...], first: str | None = None) -> ForwardResult:
    with _OperatorCounter() as counter:
        output = model(*inputs)
    return ForwardResult(structure(output, first), counter.convolutions, counter.ddf)


def structure(value: Any, first: str | None = None) -> str:
    """Describes a value: types, and dtypes and shapes of tensors, with ``first`` instead of the first size."""
    if isinstance(value, Tensor):
        sizes = [first if first and place == 0 else str(size) for place, size in enumerate(value.shape)]
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(sizes)}]"
    kind = type(value).__name__
    if isinstance(value, Mapping):
        return f"{kind}({', '.join(f'{key}={structure(item, first)}' for key, item in value.items())})"
    if isinstance(value, tuple | list):
        return f"{kind}({', '.join(structure(item, first) for item in value)})"
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{kind}({structure(fields, first)})"
    return kind


def tensors(value: Any) -> list[Tensor]:
    """Returns every tensor in a value, always in the same order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [tensor for item in value for tensor in tensors(item)] if isinstance(value, tuple | list) else []
