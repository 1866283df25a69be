"""Models as users give them: in wrappers, in a mode, with a name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ddf_convert.errors import UsageError


def model_name(model: nn.Module) -> str:
    """Returns a model's timm name, or its class."""
    configuration = getattr(model, "pretrained_cfg", None) or {}
    architecture = configuration.get("architecture") if hasattr(configuration, "get") else None
    return architecture if isinstance(architecture, str) and architecture else type(model).__name__


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts every module of some models into evaluation mode, and restores each one's mode at the end."""
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
    """Returns what ``nn.DataParallel`` wraps, or the model itself.

    Raises:
        UsageError: It is no module, a ScriptModule, or in a wrapper that has taken over its parameters already.
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
