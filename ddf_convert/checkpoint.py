"""Weights by name: reading foreign checkpoints without running anything in them, and telling what does not fit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import timm.models
from torch import Tensor, nn

from ddf_convert.copies import meta_copy
from ddf_convert.errors import UsageError
from ddf_convert.extra_state import extra_state_names, without_extra_states

_SHOWN = 3  # names in an error


def load_checkpoint(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Loads foreign weights into a model, in place: all of them or, if anything does not fit, none.

    Args:
        model: The model that the weights belong to (before conversion, for weights of the unconverted model).
        file: A safetensors file, or one of torch.save that holds tensors alone. Weights under "state_dict" or "model"
            and names that begin with "module." are understood, as timm's ``load_state_dict`` does; where a checkpoint
            has averaged weights (EMA), those are taken.

    Raises:
        UsageError: There is no such file, it is not a checkpoint, it holds code (which is never run), or its names or
            shapes are not the model's.
    """
    weights = read_checkpoint(file)
    difference = describe_difference(state_of(model), weights)
    if difference:
        raise UsageError(f"{file} does not fit {type(model).__name__}: {difference}")
    model.load_state_dict(weights)


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint.

    Raises:
        UsageError: As for :func:`load_checkpoint`.
    """
    path = os.fspath(file)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: {'is a folder, not a file' if os.path.isdir(path) else 'no such file'}")
    try:
        found = timm.models.load_state_dict(path, device="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail anywhere in zipfile, pickle, safetensors or torch
        if _holds_code(error):
            raise UsageError(
                f"{path} holds code, which is never run, and not weights alone; save the model's state_dict() by itself"
            ) from error
        raise UsageError(
            f"{path} cannot be read as a checkpoint of weights alone: it is damaged, of another kind, or holds code,"
            " which is never run"
        ) from error
    wrong = [name for name, value in _items(found) if not isinstance(name, str) or not isinstance(value, Tensor)]
    if not isinstance(found, Mapping) or not found or wrong:
        what = f"{wrong[0]!r} is not a tensor" if wrong else "it holds no named tensors"
        raise UsageError(f"{path} is not a checkpoint of weights: {what}")
    return dict(found)


def state_of(module: nn.Module, extra_states: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state dict.

    Args:
        module: Any module.
        extra_states: With the modules' extra states, which then have to be tensors.

    Raises:
        UsageError: The state holds something besides tensors.
    """
    copied, left_out = meta_copy(module), set[str]()
    if not extra_states:
        left_out = extra_state_names(copied)
        without_extra_states(copied)
    state = {name: value for name, value in copied.state_dict().items() if name not in left_out}
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UsageError(f"{type(module).__name__}: {odd[0]} is not a tensor, and only tensors are saved and loaded")
    return {name: tuple(value.shape) for name, value in state.items()}


def describe_difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor] | Mapping[str, tuple[int, ...]]
) -> str:
    """What is missing, what is too much, and what has another shape, in one line; empty if all is right."""
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in found.items()}
    reshaped = [
        f"{name} is {_size(shapes[name])} and should be {_size(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    parts = [("missing", missing), ("not in the model", surplus), ("of another shape", reshaped)]
    return "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in parts if names)


def _holds_code(error: BaseException | None) -> bool:
    """Whether torch refused a pickle because it names things that are not on torch's list of harmless ones."""
    while error is not None:
        text = str(error)
        if isinstance(error, pickle.UnpicklingError) and ("Unsupported global" in text or "Unsupported class" in text):
            return True
        error = error.__cause__ or error.__context__
    return False


def _items(found: Any) -> list[tuple[Any, Any]]:
    return list(found.items()) if isinstance(found, Mapping) else []


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _first(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
