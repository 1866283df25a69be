"""Example inputs: what a user runs a model on, as arguments of its forward."""

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
    """Returns an example input as positional and keyword arguments of a module's forward."""
    if not isinstance(example_input, Mapping):
        return (tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)), {}
    try:
        inspect.signature(module.forward).bind(**example_input)
    except TypeError:
        return (example_input,), {}
    return (), dict(example_input)


def first_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Returns (C, H, W) of the first tensor, without the batch if it has one; () if there is no tensor."""
    tensor = next((leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    return () if tensor is None else tuple(tensor.shape if tensor.dim() == 3 else tensor.shape[1:])


def in_words(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Returns the sizes of the tensors, for errors: ``3x224x224 and 10``."""
    tensors = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return " and ".join("x".join(map(str, tensor.shape[1:])) or "one number" for tensor in tensors) or "no tensor"
