"""Attributes that code has set on a module: the layer that replaces it takes them over."""

from __future__ import annotations

import inspect
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import nn

_KINDS: dict[type[nn.Module], tuple[int, ...]] = {  # and what their constructors need
    nn.Conv2d: (1, 1, 1),
    nn.ConvTranspose2d: (1, 1, 1),
    nn.Upsample: (),
    nn.PixelShuffle: (1,),
}
# What every module keeps for itself; a compiled call would be that of the old module.
_INTERNAL = {*vars(nn.Module()), "_compiled_call_impl"}


def carry_over_attributes(old: nn.Module, new: nn.Module) -> None:
    """Gives a new layer the plain attributes of the module that it replaces, such as those that a library set on it.

    Values that a subclass of torch's module gives to its class are taken over too, and methods that are bound to the
    module are bound to the layer. Parameters, buffers, submodules and hooks are not plain attributes. What the layer
    has of its own stays: of torch's attributes, such as the sizes of a convolution, it has its own answers.

    Args:
        old: The module that is replaced; it stays as it is.
        new: What replaces it; it changes.
    """
    for name, value in _attributes(old).items():
        if _has_of_its_own(new, name):
            continue
        bound_to_old = isinstance(value, MethodType) and value.__self__ is old
        new.__dict__[name] = MethodType(value.__func__, new) if bound_to_old else value


def attribute_in_the_way(old: nn.Module, new: nn.Module) -> str | None:
    """Why a layer cannot take over what code has set on a module: it needs the name for itself; None if it can."""
    taken = [name for name in _attributes(old) if name not in _made_by_torch(old) and _has_of_its_own(new, name)]
    return f"has an attribute {taken[0]!r}, a name that {type(new).__name__} needs for itself" if taken else None


def _attributes(module: nn.Module) -> dict[str, Any]:
    classes = [kind for kind in type(module).__mro__ if not any(issubclass(each, kind) for each in _KINDS)]
    values = {
        name: value
        for kind in reversed(classes)
        for name, value in vars(kind).items()
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
    }
    return {
        name: value
        for name, value in {**values, **vars(module)}.items()
        if name not in _INTERNAL and name != "_reversed_padding_repeated_twice"
    }


def _made_by_torch(module: nn.Module) -> frozenset[str]:
    """Attributes that the constructor of torch's own class sets."""
    return next((names for kind, names in _constructors() if isinstance(module, kind)), frozenset())


@cache
def _constructors() -> tuple[tuple[type[nn.Module], frozenset[str]], ...]:
    with torch.device("meta"):  # draws no random numbers
        return tuple((kind, frozenset(vars(kind(*arguments)))) for kind, arguments in _KINDS.items())


def _has_of_its_own(layer: nn.Module, name: str) -> bool:
    """Whether a layer needs a name: for a value or a part, or for a method or property that not all modules have."""
    if any(name in names for names in (vars(layer), layer._parameters, layer._buffers, layer._modules)):
        return True
    found = inspect.getattr_static(type(layer), name, None)
    inherited = found is inspect.getattr_static(nn.Module, name, None)
    return not inherited and (callable(found) or hasattr(found, "__get__"))
