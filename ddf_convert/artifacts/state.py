"""State dicts: names and shapes, extra states (``get_extra_state``), shared tensors, and differences in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.errors import UsageError
from ddf_convert.utils.fake_copy import meta_copy

_EXTRA_STATE = "_extra_state"  # torch's key
_MAX_NAMES = 3  # in an error
_MAX_NAME = 80  # characters of a name in an error


def state_shapes(module: nn.Module, extra_states: bool = True) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of a module's state dict, extra states (which have to be tensors) included if wanted."""
    copied, left_out = meta_copy(module), set[str]()
    if not extra_states:
        left_out = extra_state_names(copied)
        for part in copied.modules():  # what computes an extra state may need values that a meta copy does not have
            if _has_extra_state(part):
                vars(part)["get_extra_state"] = lambda: None
    state = {name: value for name, value in copied.state_dict().items() if name not in left_out}
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if odd:
        raise UsageError(f"{type(module).__name__}: {odd[0]} is not a tensor, and only tensors are saved and loaded")
    return {name: tuple(value.shape) for name, value in state.items()}


def describe_difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor] | Mapping[str, tuple[int, ...]]
) -> str:
    """Returns missing names, unexpected names and other shapes in one line; empty if there is no difference."""
    shapes = {name: tuple(value.shape) if isinstance(value, Tensor) else value for name, value in found.items()}
    reshaped = [
        f"{name} is {_format_shape(shapes[name])} and should be {_format_shape(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    missing = [name for name in expected if name not in shapes]
    surplus = [name for name in shapes if name not in expected]
    parts = [("missing", missing), ("not in the model", surplus), ("of another shape", reshaped)]
    return "; ".join(f"{len(names)} {what} ({list_names(names)})" for what, names in parts if names)


def extra_state_names(module: nn.Module) -> set[str]:
    """Returns the names of a module's extra states in its state dict."""
    parts = module.named_modules(remove_duplicate=False)
    return {f"{path}.{_EXTRA_STATE}" if path else _EXTRA_STATE for path, part in parts if _has_extra_state(part)}


def split_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a module's state dict, extra states among them, and the extra states that are JSON.

    Raises:
        UsageError: Something is neither a tensor nor an extra state that survives JSON, or could not be set again.
    """
    state = module.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    extra = {name: value for name, value in state.items() if name not in tensors}
    modules, names = dict(module.named_modules(remove_duplicate=False)), extra_state_names(module)
    for name, value in extra.items():
        if name not in names:
            raise UsageError(f"{type(module).__name__}: {name} is not a tensor, and only tensors are saved and loaded")
        if not _survives_json(value):
            raise UsageError(
                f"{type(module).__name__}: {name} is not a tensor and not JSON (finite numbers, texts, booleans, None,"
                " lists, dicts with text keys), and nothing else is saved"
            )
    for name in names:
        part = modules[name.rpartition(".")[0]]
        if type(part).set_extra_state is nn.Module.set_extra_state:
            raise UsageError(
                f"{type(module).__name__}: {name} could not be loaded again, since {type(part).__name__} has"
                " get_extra_state and no set_extra_state"
            )
    return tensors, extra


def split_shared(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns each distinct tensor once, contiguous, and for every other name the name of the tensor it shares."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise UsageError(
                f"{name} is on the meta device and has no weights to save; build the model on a real device"
            )
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in names:
            shared[name] = names[identity]
        else:
            names[identity] = name
            # A clone: safetensors refuses tensors that are parts of one memory, such as views of a flat buffer.
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            detached = tensor.detach()
            tensors[name] = detached if whole else detached.clone(memory_format=torch.contiguous_format)
    return tensors, shared


def list_names(names: Sequence[str]) -> str:
    """Returns the first few of some names, for an error."""
    return ", ".join(map(printable, names[:_MAX_NAMES])) + (", ..." if len(names) > _MAX_NAMES else "")


def printable(name: str) -> str:
    """Returns a name from a file that can hold anything, shortened and without control characters."""
    text = "".join(letter if letter.isprintable() else "?" for letter in name[:_MAX_NAME])
    return text + ("..." if len(name) > _MAX_NAME else "")


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _survives_json(value: Any) -> bool:
    """Returns whether a value comes back from JSON unchanged; tuples, numbers as keys, and NaN do not."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False


def _format_shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"
