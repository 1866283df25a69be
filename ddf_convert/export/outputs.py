"""What a forward returns, as a file can hold it: tensors in dicts, lists and tuples."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree


def tensors_alone(output: Any) -> tuple[Any, tuple[str, ...]]:
    """An output without what is no tensor.

    Args:
        output: What a forward returned.

    Returns:
        The same structure with None for what was left out, so that the others keep their places; dataclasses, named
        tuples and the like become dicts. Then the names of what was left out, with their types: ``output_1 (int)``.
    """
    left: list[str] = []
    return _plain(output, (), left), tuple(left)


def name_of(words: tuple[str, ...]) -> str:
    """``logits`` of a dict, ``output_1`` of a tuple, ``output`` of an output that is a tensor itself."""
    return "_".join(("output", *words) if not words or words[0].isdecimal() else words)


def with_tensors_alone(module: nn.Module, output: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """A module whose forward returns tensors alone; its class becomes one of the same name if that takes a change.

    Args:
        module: Changed in place.
        output: What its forward returned.

    Returns:
        The module, and what is left out, as of :func:`tensors_alone`.
    """
    plain, left = tensors_alone(output)
    if not left and _pytree.tree_structure(plain) == _pytree.tree_structure(output):
        return module, ()
    kind = type(module)
    # A forward that was set on the instance would hide that of the class.
    own = module.__dict__.pop("forward", None)
    original: Any = kind.forward if own is None else own

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        returned = original(self, *args, **kwargs) if own is None else own(*args, **kwargs)
        return tensors_alone(returned)[0]

    if own is None:
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    else:
        module.__dict__["forward"] = functools.wraps(own)(functools.partial(forward, module))
    return module, left


def _plain(value: Any, words: tuple[str, ...], left: list[str]) -> Any:
    if value is None or isinstance(value, Tensor):
        return value
    named = _named(value)
    if named is not None:
        kind = OrderedDict if type(value) is OrderedDict else dict
        return kind((key, _plain(each, (*words, str(key)), left)) for key, each in named.items())
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        parts = [_plain(each, (*words, str(place)), left) for place, each in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    if type(value) in _pytree.SUPPORTED_NODES and not isinstance(value, torch.Size):
        return _pytree.tree_map(lambda leaf: _plain(leaf, words, left), value)
    left.append(f"{name_of(words)} ({type(value).__name__})")
    return None


def _named(value: Any) -> Mapping[Any, Any] | None:
    """What a value holds, by name, if it is one of the kinds that have names."""
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return vars(value) if isinstance(value, SimpleNamespace) else None
