"""Extra states of modules (``get_extra_state``), which a state dict holds beside tensors."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor, nn

from ddf_convert.errors import UsageError

_KEY = "_extra_state"  # torch's


def extra_state_names(module: nn.Module) -> set[str]:
    """The names that a module's extra states have in its state dict."""
    parts = module.named_modules(remove_duplicate=False)
    return {f"{path}.{_KEY}" if path else _KEY for path, part in parts if _has_extra_state(part)}


def without_extra_states(module: nn.Module) -> None:
    """Makes every extra state of a copy None: what computes it may need contents that the copy does not have."""
    for part in module.modules():
        if _has_extra_state(part):
            vars(part)["get_extra_state"] = lambda: None


def split_state(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a module's state dict, and its extra states that are JSON; one that is a tensor is a tensor.

    Raises:
        UsageError: Something is neither a tensor nor an extra state that survives JSON; or it cannot be set again.
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


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def _survives_json(value: Any) -> bool:
    """Whether JSON gives the same back: not so for tuples, numbers as keys, and NaN."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError, RecursionError):
        return False
