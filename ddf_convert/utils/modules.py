"""Models inside wrappers: looked through where that is safe, refused with what to do where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddf_convert.errors import UsageError


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """A context in which every module of some models is in evaluation mode; at its end each is as it was."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False  # not eval(), which models override to change themselves
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


_TOO_LATE = {
    "DistributedDataParallel": "convert its .module first, and wrap the converted model",
    "FullyShardedDataParallel": "convert the model first, and shard the converted one",
    "OptimizedModule": "convert its ._orig_mod first, and compile the converted model",
}


def bare(model: nn.Module) -> nn.Module:
    """The model itself: what ``nn.DataParallel`` wraps, if it is wrapped.

    Raises:
        UsageError: It is no module, a ScriptModule, or wrapped in what has taken its parameters over already.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "a ScriptModule has no Python modules to replace: convert the model first, and then compile it with"
            " torch.jit"
        )
    for kind in type(model).__mro__:
        if kind.__name__ in _TOO_LATE and kind.__module__.startswith("torch."):
            raise UsageError(f"the model is wrapped in {kind.__name__}: {_TOO_LATE[kind.__name__]}")
    return bare(model.module) if isinstance(model, nn.DataParallel) else model
