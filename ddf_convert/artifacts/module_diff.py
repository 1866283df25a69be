"""Compares everything but weights that makes two modules compute differently: classes, attributes, buffers, sharing."""

from __future__ import annotations

import functools
import reprlib
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, fx, nn

# Switches that change no result: memory for time, and which kernels run.
_RUN_TIME = {"grad_checkpointing", "fused_attn", "_fast_norm", "_compiled_call_impl"}
# timm's descriptions of a model and of the call that built it.
_DESCRIPTIVE = {"pretrained_cfg", "default_cfg", "pretrained_model_args", "_model_args", "_traits"}
_IGNORED = set(vars(nn.Module())) | _RUN_TIME | _DESCRIPTIVE | {"ddf_conversion"}
_PLAIN = (int, float, complex, str, bytes, torch.dtype)
_MAX_REPR = 60  # characters of a module
_ULPS = 16  # computed tables, such as sines, differ by a few between devices


class _Description(str):
    """Describes a value in a difference, instead of the value itself."""

    __slots__ = ()


_ABSENT = _Description("nothing")


@dataclass(frozen=True)
class ModuleDifference:
    """One difference between two modules.

    Attributes:
        path: The submodule.
        attribute: Its attribute, parameter or buffer; "" where the submodules themselves differ.
        first: The value in the first module.
        second: The value in the second module.
    """

    path: str
    attribute: str
    first: Any
    second: Any

    @property
    def name(self) -> str:
        """Returns the path of the attribute."""
        return ".".join(filter(None, (self.path, self.attribute)))

    def describe_values(self) -> tuple[str, str]:
        """Returns both values, each in one short line."""
        return _describe(self.first), _describe(self.second)


@dataclass
class ModuleDiff:
    """The result of a comparison.

    Attributes:
        differences: In the order of the module tree.
        undecided: Names of attributes that cannot be compared: objects whose contents Python cannot see.
        without_values: Names of tensors whose values were not compared, because one is on the meta device.
    """

    differences: list[ModuleDifference] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    without_values: list[str] = field(default_factory=list)


def diff_modules(first: nn.Module, second: nn.Module) -> ModuleDiff:
    """Compares everything that makes two forward passes differ if parameters and persistent buffers are equal.

    That is: the class of every submodule; which submodules and parameters are shared; every instance attribute
    (numbers, texts, containers, functions by their code, other objects by their contents); the values of buffers that a
    state dict does not hold.

    Not compared are training modes, hooks, caches, switches that change no result (``grad_checkpointing``,
    ``fused_attn``), devices, timm's descriptions of a model, and attributes that only the first module has and that no
    code of its classes mentions: a user's notes.
    """
    return _Comparison(first, second).run()


class _Comparison:
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self._first = dict(first.named_modules(remove_duplicate=False))
        self._second = dict(second.named_modules(remove_duplicate=False))
        self._paths = _name_by_id(self._first.items()), _name_by_id(self._second.items())
        self._parameters = tuple(
            _name_by_id(module.named_parameters(remove_duplicate=False)) for module in (first, second)
        )
        self._mentioned = {name for kind in set(map(type, self._first.values())) for name in _names_in_class(kind)}
        self._compared: dict[tuple[int, int], Any] = {}  # holds the objects, so that no id is reused
        self._name = ""  # of the attribute that is being compared
        self._result = ModuleDiff()

    def run(self) -> ModuleDiff:
        for path in dict.fromkeys((*self._first, *self._second)):
            first, second = self._first.get(path), self._second.get(path)
            if first is None or second is None:
                parent = path.rpartition(".")[0]
                if parent in self._first and parent in self._second:  # submodules of a missing module are not reported
                    self._note(path, "", first or _ABSENT, second or _ABSENT)
            elif _class_name(type(first)) != _class_name(type(second)):
                self._note(path, "", first, second)
            else:
                self._compare_sharing(path, first, second)
                self._compare_parts(path, first, second)
        return self._result

    def _note(self, path: str, attribute: str, first: Any, second: Any) -> None:
        self._result.differences.append(ModuleDifference(path, attribute, first, second))

    def _compare_sharing(self, path: str, first: nn.Module, second: nn.Module) -> None:
        kept = [names[id(part)] for names, part in zip(self._paths, (first, second), strict=True)]
        if kept[0] != kept[1]:
            self._note(path, "", *(_Description(f"the module {name}") for name in kept))
        for name in first._parameters.keys() & second._parameters.keys():
            parameters = first._parameters[name], second._parameters[name]
            kept = [names.get(id(each), "") for names, each in zip(self._parameters, parameters, strict=True)]
            if kept[0] != kept[1]:
                self._note(path, name, *(_Description(f"the parameter {name}") for name in kept))

    def _compare_parts(self, path: str, first: nn.Module, second: nn.Module) -> None:
        if isinstance(first, torch.jit.ScriptModule):
            self._result.undecided.append(path)
        elif isinstance(first, fx.GraphModule) and isinstance(second, fx.GraphModule):
            if first.code != second.code:
                self._note(path, "code", first.code, second.code)
        else:
            for name, one, other in (*self._attributes(first, second), *_unsaved_buffers(first, second)):
                self._name = ".".join(filter(None, (path, name)))
                if not self._same(one, other):
                    self._note(path, name, one, other)

    def _attributes(self, first: nn.Module, second: nn.Module) -> Iterator[tuple[str, Any, Any]]:
        mine, theirs = vars(first), vars(second)
        for name in dict.fromkeys((*mine, *theirs)):
            one, other = (each.get(name, getattr(type(first), name, _ABSENT)) for each in (mine, theirs))
            if name in _IGNORED or name.startswith("_ddf_") or _is_cache(name, one, other):
                continue
            if other is not _ABSENT or name in self._mentioned:
                yield name, one, other

    def _same(self, first: Any, second: Any) -> bool:
        if first is second:
            return True
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            return self._same_tensors(first, second)
        if first is None or isinstance(first, _PLAIN):
            return bool(first == second or (first != first and second != second))  # NaN equals NaN
        if (id(first), id(second)) in self._compared:
            return True  # if not, the comparison in progress finds it
        self._compared[id(first), id(second)] = first, second
        if isinstance(first, list | tuple | deque) and isinstance(
            second, list | tuple | deque
        ):  # JSON turns tuples into lists
            return len(first) == len(second) and all(map(self._same, first, second))
        if _class_name(type(first)) != _class_name(type(second)):
            return False
        return self._same_objects(first, second)

    def _same_objects(self, first: Any, second: Any) -> bool:
        """Compares two objects of one class."""
        match first:
            case nn.Module() if id(first) in self._paths[0]:
                return self._paths[0][id(first)] == self._paths[1].get(id(second))
            case Mapping():
                return first.keys() == second.keys() and all(self._same(first[key], second[key]) for key in first)
            case type():
                return _class_name(first) == _class_name(second)
            case FunctionType():
                return self._same(_function_parts(first), _function_parts(second))
            case MethodType():
                return self._same(first.__func__, second.__func__) and self._same(first.__self__, second.__self__)
            case functools.partial():
                parts = [(each.func, each.args, each.keywords) for each in (first, second)]
                return self._same(*parts)
            case weakref.ref():
                return self._same(first(), second())
            case numpy.ndarray():
                return first.dtype == second.dtype and numpy.array_equal(first, second)
            case torch.device():
                return True
        if (contents := _contents(first)) is not None:
            return self._same(contents, _contents(second))
        if first == second:
            return True
        if first.__eq__(second) is NotImplemented:  # its class defines no equality
            self._result.undecided.append(self._name)
            return True
        return False

    def _same_tensors(self, first: Tensor, second: Tensor) -> bool:
        if first.shape != second.shape or first.is_floating_point() != second.is_floating_point():
            return False
        if "meta" in (first.device.type, second.device.type):
            self._result.without_values.append(self._name)
            return True
        with torch.no_grad():
            one = first.detach().cpu().to_dense()
            other = second.detach().cpu().to_dense().to(one.dtype)
            if not one.is_floating_point():
                return torch.equal(one, other)
            finite = other[other.isfinite()].double().abs()
            tolerance = _ULPS * torch.finfo(one.dtype).eps * (finite.max().item() if finite.numel() else 1.0)
            return torch.allclose(one.double(), other.double(), rtol=0.0, atol=tolerance, equal_nan=True)


def _unsaved_buffers(first: nn.Module, second: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Yields buffers that a state dict does not hold."""
    saved = (
        {*first._buffers} - first._non_persistent_buffers_set,
        {*second._buffers} - second._non_persistent_buffers_set,
    )
    for name in dict.fromkeys((*first._buffers, *second._buffers)):
        one, other = first._buffers.get(name), second._buffers.get(name)
        if one is None or other is None or not all(name in names for names in saved):
            yield name, one, other


def _name_by_id(named: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """Returns the first name of every object, by its id."""
    names: dict[int, str] = {}
    for name, value in named:
        names.setdefault(id(value), name)
    return names


def _class_name(kind: type) -> tuple[str, str]:
    """Returns what identifies a class: one that a function defines is a new object at each call."""
    return kind.__module__, kind.__qualname__


def _is_cache(name: str, *values: Any) -> bool:
    return "cache" in name.lower() and not any(isinstance(value, int | float | str) for value in values)


def _function_parts(function: FunctionType) -> tuple[Any, ...]:
    """Returns everything but globals that a function's result can depend on."""
    cells = [cell for cell in function.__closure__ or () if cell != CellType()]  # without the empty ones
    closure = [cell.cell_contents for cell in cells]
    return function.__code__, function.__defaults__, function.__kwdefaults__, closure


def _contents(value: Any) -> dict[str, Any] | None:
    """Returns the attributes of an object; None if it cannot have any."""
    slots = [name for kind in type(value).__mro__ for name in _slot_names(kind)]
    if not slots and not hasattr(value, "__dict__"):
        return None
    found = {name: getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)}
    return {**found, **getattr(value, "__dict__", {})}


def _slot_names(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


@functools.cache
def _names_in_class(kind: type) -> frozenset[str]:
    """Returns all names and strings in the code of a class and its bases."""
    found: set[str] = set()
    for each in kind.__mro__:
        if each in (nn.Module, object):
            continue
        for value in vars(each).values():
            functions = (value, getattr(value, "__func__", None), getattr(value, "fget", None))
            for function in functions:
                if isinstance(code := getattr(function, "__code__", None), CodeType):
                    found |= _names_in_code(code)
    return frozenset(found)


def _names_in_code(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    texts = {constant for constant in code.co_consts if isinstance(constant, str)}
    return {*code.co_names, *texts}.union(*map(_names_in_code, inner))


def _describe(value: Any) -> str:
    if isinstance(value, _Description):
        return value
    if isinstance(value, nn.Module):
        text = type(value).__name__ if any(value.children()) else repr(value)
        return text if len(text) <= _MAX_REPR else type(value).__name__
    if isinstance(value, Tensor):
        return "other values" if value.numel() > 1 else str(value.tolist())
    if isinstance(value, type | FunctionType):
        return value.__qualname__
    return " ".join(reprlib.repr(value).split())
