"""Training and evaluation mode of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


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
