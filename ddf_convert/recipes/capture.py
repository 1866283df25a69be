"""What goes into a module, or comes out of it, while a model runs as far as that module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddf_convert.errors import UsageError


class _Seen(BaseException):
    """Ends a forward pass that has shown what was wanted; not an Exception, which the model might catch."""


@torch.no_grad()
def input_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """The input of a module at its first call; the model runs no further."""
    seen: list[Tensor] = []
    with _stopping(module.register_forward_pre_hook(lambda _, args: _keep(seen, args[0]))):
        model(images)
    return _first(seen)


@torch.no_grad()
def output_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """The output of a module at its first call; the model runs no further."""
    seen: list[Tensor] = []
    with _stopping(module.register_forward_hook(lambda _, args, output: _keep(seen, output))):
        model(images)
    return _first(seen)


@torch.no_grad()
def run_to(model: nn.Module, module: nn.Module | None, images: Tensor) -> None:
    """Runs a model as far as the first call of a module; None is the end."""
    if module is None:
        model(images)
    else:
        input_of(model, module, images)


@contextmanager
def _stopping(handle: RemovableHandle) -> Iterator[None]:
    try:
        yield
    except _Seen:
        pass
    finally:
        handle.remove()


def _keep(seen: list[Tensor], tensor: Tensor) -> None:
    seen.append(tensor.detach())
    raise _Seen


def _first(seen: list[Tensor]) -> Tensor:
    if not seen:
        raise UsageError("a replaced layer was not called while the model ran on the images")
    return seen[0]
