"""Example inputs: what a user gives to look at a model with, as arguments of its forward."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

ExampleInput = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""A tensor alone; a tuple or list of positional arguments; or a dict of keyword arguments. A dict whose keys are not
the names of forward's arguments is one argument itself. Arguments can be tensors or anything else, nested or not."""


def as_arguments(module: nn.Module, example_input: ExampleInput) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a module's forward."""
    if isinstance(example_input, Mapping):
        if _names_arguments(module, example_input):
            return (), dict(example_input)
        return (example_input,), {}
    return (tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)), {}


def first_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """(C, H, W) of the first tensor: without the batch, where there is one; empty if there is no tensor."""
    for value in _pytree.tree_leaves((args, kwargs)):
        if isinstance(value, Tensor):
            return tuple(value.shape if value.dim() == 3 else value.shape[1:])
    return ()


def in_words(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Sizes of the tensors, for errors: ``3x224x224 and 10``."""
    tensors = [value for value in _pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    return " and ".join("x".join(map(str, tensor.shape[1:])) or "one number" for tensor in tensors) or "no tensor"


def _names_arguments(module: nn.Module, mapping: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(module.forward).bind(**mapping)
    except TypeError:
        return False
    return True
