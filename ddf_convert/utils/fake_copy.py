"""Copies of models to look at, so that the original is never run: on shapes alone where that is possible."""

from __future__ import annotations

import copy
import logging
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from types import GeneratorType, ModuleType
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from ddf_convert.errors import UsageError
from ddf_convert.utils.hooks import copy_hooks, without_global_hooks

Watched = TypeVar("Watched")


class Watch(IntEnum):
    """What of a run can be watched without the run failing."""

    MODULES = 0  # calls of modules, by hooks
    OPERATIONS = 1  # every operation too, by torch's modes
    EVERYTHING = 2  # what autograd keeps, too


@dataclass(frozen=True)
class Way:
    """How a copy of a module runs.

    Attributes:
        words: What is special about it, after "the model ran"; empty where nothing is.
        watch: What is watched.
        grad: The mode of autograd, as a context.
        as_used: Parameters keep their requires_grad, and their memory is not the module's.
        training: Modules keep their training mode.
    """

    words: str = ""
    watch: Watch = Watch.EVERYTHING
    grad: Callable[[], AbstractContextManager[Any]] = torch.enable_grad
    as_used: bool = False
    training: bool = False


_LOOKED_AT = Way()
_AS_USED = (
    Way("with its parameters' own requires_grad", Watch.MODULES, torch.enable_grad, as_used=True),
    Way("without gradients", Watch.MODULES, torch.no_grad, as_used=True),
    Way("in inference mode", Watch.MODULES, torch.inference_mode, as_used=True),
    Way("in training mode", Watch.MODULES, torch.enable_grad, as_used=True, training=True),
)


@dataclass(frozen=True)
class Copy:
    """A copy of a module, in evaluation mode unless its way says otherwise, and the inputs to call it with.

    Attributes:
        module: The copy; every floating-point parameter asks for a gradient, unless its way says otherwise.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        mode: The mode of fake tensors, if neither module nor inputs have contents.
        way: How it runs.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: FakeTensorMode | None
    way: Way = _LOOKED_AT

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context to run the copy in: modes are its way's, whatever the caller's own are; random states stay."""
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(without_global_hooks())
            stack.enter_context(unchanged_random_states())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(self.way.grad())
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=False))
            if self.mode is not None:
                stack.enter_context(self.mode)
            yield

    def run(self) -> Any:
        """Calls the copy."""
        return self.module(*self.args, **self.kwargs)


class SettledError(UsageError):
    """A failure of a forward pass that depends on the shapes of its inputs alone."""


def watch_a_run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: Callable[[Copy], AbstractContextManager[Watched]],
) -> tuple[Copy, Watched]:
    """Runs a copy of a module and watches it: on shapes alone or, if its forward looks at values, on values.

    Some forwards fail because they are watched, or because parameters that are frozen ask for gradients. They run as
    their users run them, and less of them is watched; the copy's ``way`` says how.

    Args:
        module: Any module; it stays as it is.
        args: Positional arguments of its forward; only shapes matter, unless the forward looks at values.
        kwargs: Keyword arguments of its forward.
        watch: Called with the copy, gives the context to run it in; it watches what ``way.watch`` of the copy allows.

    Returns:
        The copy that ran, and what the context gave.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
        SettledError: The watcher raised it: no other way of running the module can succeed.
        Exception: Whatever its forward raises when it runs as its users run it.
    """
    try:
        return _watched(fake_copy(module, args, kwargs), watch)
    except SettledError:
        raise
    except Exception:  # fake tensors refuse what depends on values in many ways; any other fault will recur
        pass
    try:
        return _watched(real_copy(module, args, kwargs), watch)
    except UsageError:
        raise
    except Exception:
        return _watched_as_used(module, args, kwargs, watch)


def _watched_as_used(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: Callable[[Copy], AbstractContextManager[Watched]],
) -> tuple[Copy, Watched]:
    errors: list[Exception] = []
    for way in _AS_USED:
        if way.training and not any(part.training for part in module.modules()):
            continue
        try:
            ran = _watched(real_copy(module, args, kwargs, way), watch)
        except Exception as error:
            errors.append(error)
            continue
        try:
            return _watched(real_copy(module, args, kwargs, replace(way, watch=Watch.OPERATIONS)), watch)
        except Exception:
            return ran
    raise errors[0]


def _watched(copied: Copy, watch: Callable[[Copy], AbstractContextManager[Watched]]) -> tuple[Copy, Watched]:
    with copied.running(), watch(copied) as watched:
        copied.run()
    return copied, watched


def fake_copy(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    mode: FakeTensorMode | None = None,
) -> Copy:
    """Copies a module and its inputs without their contents.

    Every tensor stands on the CPU in the copy, so a module on any device, the meta device included, gives one answer.
    The copy is in evaluation mode because one image is a lawful input there (batch norm in training mode refuses a
    single value per channel).

    Args:
        module: Any module.
        args: Positional arguments of its forward; tensors in them are imitated, anything else is passed on.
        kwargs: Keyword arguments of its forward, likewise.
        mode: The mode to make them in; a new one if None.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet(), mode:
        copied = _copy(module, lambda tensor: _imitate(tensor, "cpu"))
    return Copy(_in_evaluation(copied), in_mode(mode, args), in_mode(mode, kwargs or {}), mode)


def real_copy(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, way: Way = _LOOKED_AT
) -> Copy:
    """Copies a module so that it computes: its parameters are the module's own memory, its buffers are copies.

    What is on the meta device stands on the CPU in the copy, with small random weights.

    Args:
        module: Any module.
        args: Positional arguments of its forward; they are moved to the module's device.
        kwargs: Keyword arguments of its forward, likewise.
        way: How it is to run.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    copied = _copy(module, _clone if way.as_used else _alias)
    if not way.training:
        _in_evaluation(copied)
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))
    moved, named = (_pytree.tree_map_only(Tensor, lambda t: _filled(t).to(device), each) for each in (args, kwargs))
    return Copy(copied, moved, named or {}, None, way)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device, without duplicating a weight on the way.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    return _copy(module, lambda tensor: _imitate(tensor, "meta"))


def empty_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Copy:
    """Copies a module and its inputs to the meta device, to be run without gradients.

    It runs faster than a copy with fake tensors, and fewer modules do: those that make tensors of their own on another
    device do not.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    copied = _in_evaluation(meta_copy(module))
    moved, named = (_pytree.tree_map_only(Tensor, lambda t: _imitate(t, "meta"), each) for each in (args, kwargs))
    return Copy(copied, moved, named, None, Way(grad=torch.no_grad))


def trainable_copy(module: nn.Module) -> nn.Module:
    """A copy as ``copy.deepcopy`` makes it, whose own hooks work on the copy; a user's hooks stay on it as they are.

    What a forward pass left in attributes is copied without the graph of that pass, which ``deepcopy`` refuses.

    Raises:
        Exception: Something in the module cannot be copied.
    """
    with torch.inference_mode(False):  # or the copy could not be trained
        computed = {id(tensor): tensor.detach().clone() for tensor in tensors_of(module) if not tensor.is_leaf}
        return _deep_copy(module, computed, keep_others=True)


def check_initialized(module: nn.Module) -> None:
    """Raises UsageError if parameters or buffers wait for a first forward pass to get their shapes."""
    for tensors in (module.named_parameters(), module.named_buffers()):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise UsageError(
                    f"{type(module).__name__}: {name} is lazy and has no shape yet; run the model once on an example"
                )


def in_mode(mode: FakeTensorMode, values: Any) -> Any:
    """Nested values with fake tensors of this mode in the place of others."""
    with mode:
        return _pytree.tree_map_only(Tensor, lambda tensor: _imitate(tensor.detach(), "cpu"), values)


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Whatever runs in it, the random states of torch, NumPy and Python are as before at the end."""
    python, legacy = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


# --- how modules are copied ---


def _copy(module: nn.Module, like: Callable[[Tensor], Tensor]) -> nn.Module:
    check_initialized(module)
    # deepcopy takes what the memo holds for the copy: shared tensors stay shared, and no weight is ever duplicated.
    tensors: dict[int, Any] = {id(tensor): like(tensor) for tensor in tensors_of(module)}
    try:
        try:
            return _deep_copy(module, dict(tensors), keep_others=False)
        except Exception:  # a lock, a file, a generator
            shared = tensors | _shared(module, tensors)
            return _deep_copy(module, shared, keep_others=False)
    except Exception as error:
        raise UsageError(f"{type(module).__name__} cannot be copied to look at its shapes: {error}") from error


def _deep_copy(module: nn.Module, memo: dict[int, Any], keep_others: bool) -> nn.Module:
    copy_hooks(module, memo, keep_others)
    return copy.deepcopy(module, memo)


def _shared(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """What attributes hold that ``deepcopy`` cannot copy: the copy shares it with the module."""
    parts = {id(part): part for part in module.modules()}
    seen: set[int] = set()
    shared: dict[int, Any] = {}
    for part in parts.values():
        for value in _uncopyable(vars(part), memo | parts, seen):
            shared[id(value)] = _stand_in(value)
    return shared


def _uncopyable(value: Any, memo: dict[int, Any], seen: set[int]) -> list[Any]:
    """The smallest parts of a value that ``deepcopy`` cannot copy."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return [part for inner in _inside(value) for part in _uncopyable(inner, memo, seen)] or [value]
    return []


def _stand_in(value: Any) -> Any:
    """What a copy gets for something that it would change for the module, too."""
    if isinstance(value, GeneratorType):
        return (each for each in tuple[Any, ...]())
    return threading.local() if isinstance(value, threading.local) else value


def _in_evaluation(module: nn.Module) -> nn.Module:
    for part in module.modules():
        part.training = False  # not eval(), which models override to change themselves
    return module


def _imitate(tensor: Tensor, device: str) -> Tensor:
    if tensor.layout is not torch.strided:
        return tensor
    with torch.inference_mode(False):
        empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    return _as_parameter(empty) if isinstance(tensor, nn.Parameter) else empty


def _alias(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        if isinstance(tensor, nn.Parameter):
            return _as_parameter(_filled(tensor).detach())
        return _filled(tensor).clone()


def _clone(tensor: Tensor) -> Tensor:
    """A tensor that a forward pass may change, and that asks for a gradient if the other does."""
    with torch.no_grad():
        cloned = _filled(tensor).detach().clone()
    return nn.Parameter(cloned, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cloned


def _filled(tensor: Tensor) -> Tensor:
    """The tensor, or one with contents in the place of one that has none."""
    if tensor.device.type != "meta":
        return tensor
    filled = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
    # Ones for buffers: running variances divide. Parameters are small, so that sums over channels stay finite.
    if isinstance(tensor, nn.Parameter) and filled.is_floating_point():
        return filled.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return filled.fill_(1)


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex())


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors anywhere in attributes: a detector's anchors, the weight of weight_norm."""
    seen: set[int] = set()
    for part in module.modules():
        yield from (
            tensor for each in (part._parameters, part._buffers) for tensor in each.values() if tensor is not None
        )
        yield from _tensors_in(vars(part), seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) in seen or isinstance(value, nn.Module | type | ModuleType):
        return
    else:
        seen.add(id(value))
        for item in _inside(value):
            yield from _tensors_in(item, seen)


def _inside(value: Any) -> Iterator[Any]:
    """What a container, or an object's attributes, hold."""
    if isinstance(value, type | ModuleType):
        return
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    yield from getattr(value, "__dict__", {}).values()


@contextmanager
def _quiet() -> Iterator[None]:
    """What models warn of belongs to the runs that users ask for; and torch logs at length what fake tensors refuse."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
