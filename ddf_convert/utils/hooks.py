"""Hooks on modules: those that belong to a model are copied with it, those of its user are not.

A hook belongs to a model if the model's own code can reach the code that defines it: libraries register such hooks in
a constructor or at the first forward pass, and rely on them. A user's hook (to log, to collect features) must not be
called when a copy runs.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copy_hooks(module: nn.Module, memo: dict[int, Any], keep_others: bool) -> None:
    """Copies the hooks of a module into the memo of a deep copy: those that belong to it work on the copy.

    With ``keep_others``, a user's hooks stay on the copy, as they are.
    """
    hooked = [hooks for part in module.modules() for kind in _KINDS if (hooks := getattr(part, kind))]
    copies: dict[int, OrderedDict[int, Any]] = {
        id(getattr(part, kind)): OrderedDict() for part in module.modules() for kind in _KINDS
    }
    memo |= copies  # filled below: to copy a hook can copy the modules that have the other ones
    owner = _Owner(module) if hooked else None
    for hooks in hooked:
        for key, hook in hooks.items():
            if owner and owner.owns(hook):
                copies[id(hooks)][key] = _rebound(hook, memo)
            elif keep_others:
                copies[id(hooks)][key] = hook


@contextmanager
def without_global_hooks() -> Iterator[None]:
    """Keeps this thread from calling hooks that are registered for every module."""
    here = threading.get_ident()
    muted: list[tuple[dict[int, Any], int, Any]] = []

    def elsewhere(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if threading.get_ident() == here else hook(*args, **kwargs)

    for kind in _KINDS:
        hooks: dict[int, Any] = getattr(torch_module, f"_global{kind}")
        for key, hook in list(hooks.items()):
            hooks[key] = elsewhere(hook)
            muted.append((hooks, key, hook))
    try:
        yield
    finally:
        for hooks, key, hook in muted:
            if key in hooks:
                hooks[key] = hook


class _Owner:
    """Decides whether hooks belong to a model."""

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._modules = {id(part) for part in parts}
        self._owned = {id(value) for part in parts for value in (part, *vars(part).values())}
        self._classes = {kind for part in parts for kind in type(part).__mro__ if not _is_foreign(kind)}
        self._known: dict[tuple[str, str], bool] = {}  # definitions that were looked for

    def owns(self, hook: Any) -> bool:
        while isinstance(hook, functools.partial):
            hook = hook.func
        if isinstance(hook, MethodType):
            if id(hook.__self__) in self._owned or isinstance(hook.__self__, nn.Module):
                return id(hook.__self__) in self._owned
            hook = hook.__func__
        definition = hook if isinstance(hook, FunctionType) else type(hook)
        if f"{definition.__module__}.".startswith(("torch.nn.", "torch.ao.")):  # spectral_norm, pruning, observers
            return True
        if any(isinstance(value, nn.Module) and id(value) not in self._modules for value in _captured(hook)):
            return False  # it works on a module that is not copied
        name = definition.__module__, definition.__qualname__
        if name not in self._known:
            reached = _reachable(self._classes, definition.__module__.partition(".")[0])
            self._known[name] = any(_defines(each, definition) for each in reached)
        return self._known[name]


def _is_foreign(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in ("torch", "builtins")


def _defines(reached: FunctionType | type, definition: FunctionType | type) -> bool:
    """Whether both are the same, or the code of ``reached`` holds the definition."""
    inside = f"{definition.__qualname__}.".startswith(f"{reached.__qualname__}.")
    return inside and reached.__module__ == definition.__module__


def _reachable(classes: set[type], package: str) -> Iterator[FunctionType | type]:
    """Functions and classes that the methods of some classes name, directly or indirectly, within one package."""
    waiting: list[Any] = list(classes)
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen or getattr(found, "__module__", "").partition(".")[0] != package:
            continue
        seen.add(id(found))
        yield found
        waiting.extend(_named_in(found))


def _named_in(found: FunctionType | type) -> Iterator[Any]:
    if isinstance(found, type):
        for value in vars(found).values():
            for part in (value, *(getattr(value, name, None) for name in ("__func__", "fget", "func"))):
                if isinstance(part, FunctionType):
                    yield part
        return
    yield from (value for value in _captured(found) if isinstance(value, FunctionType | type))
    if isinstance(wrapped := getattr(found, "__wrapped__", None), FunctionType):
        yield wrapped
    for name in _names(found.__code__):
        value = found.__globals__.get(name)
        if isinstance(value, FunctionType | type):
            yield value


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _captured(function: Any) -> Iterator[Any]:
    """What a function's closure holds."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of a hook that works on copies of what it holds: ``deepcopy`` would share a function's closure."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, functools.partial):
        arguments = [_rebound(each, memo) for each in value.args]
        named = {name: _rebound(each, memo) for name, each in value.keywords.items()}
        return functools.partial(_rebound(value.func, memo), *arguments, **named)
    if not isinstance(value, FunctionType):
        tried = dict(memo)  # what fails leaves half a copy behind
        try:
            copied_value = copy.deepcopy(value, tried)
        except Exception:  # a lock, a context variable: the copy shares it
            return value
        memo |= tried
        return copied_value
    if value.__closure__ is None:
        return value
    cells = [memo.setdefault(id(cell), CellType()) for cell in value.__closure__]
    copied = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, tuple(cells))
    copied.__kwdefaults__ = value.__kwdefaults__
    copied.__dict__ |= value.__dict__
    memo[id(value)] = copied
    for cell, old in zip(cells, value.__closure__, strict=True):
        try:
            contents = old.cell_contents
        except ValueError:
            continue
        cell.cell_contents = _rebound(contents, memo)
    return copied
