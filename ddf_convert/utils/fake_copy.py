"""Copies of models to run, so that the original never is: on shapes alone where that is possible."""

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
from ddf_convert.utils.logging import logger_level

Watched = TypeVar("Watched")


class Watch(IntEnum):
    """What of a run can be watched without the run failing."""

    MODULES = 0  # calls of modules, by hooks
    OPERATIONS = 1  # every operation too, by torch's modes
    EVERYTHING = 2  # what autograd keeps, too


@dataclass(frozen=True)
class RunMode:
    """How a copy of a module runs.

    Attributes:
        note: What is special about it, after "the model ran"; empty where nothing is.
        watch: What is watched.
        grad: The mode of autograd, as a context.
        as_used: Parameters keep their requires_grad, and do not share the module's memory.
        training: Modules keep their training mode.
    """

    note: str = ""
    watch: Watch = Watch.EVERYTHING
    grad: Callable[[], AbstractContextManager[Any]] = torch.enable_grad
    as_used: bool = False
    training: bool = False


_DEFAULT_MODE = RunMode()
_MODES_AS_USED = (
    RunMode("with its parameters' own requires_grad", Watch.MODULES, torch.enable_grad, as_used=True),
    RunMode("without gradients", Watch.MODULES, torch.no_grad, as_used=True),
    RunMode("in inference mode", Watch.MODULES, torch.inference_mode, as_used=True),
    RunMode("in training mode", Watch.MODULES, torch.enable_grad, as_used=True, training=True),
)


@dataclass(frozen=True)
class ModelCopy:
    """A copy of a module, in evaluation mode unless its run mode says otherwise, and the inputs to call it with.

    Attributes:
        module: The copy; its floating-point parameters require gradients unless the run mode says otherwise.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        fake_mode: The mode of fake tensors, if neither module nor inputs have contents.
        run_mode: How it runs.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    fake_mode: FakeTensorMode | None
    run_mode: RunMode = _DEFAULT_MODE

    @contextmanager
    def running(self) -> Iterator[None]:
        """Sets the modes that the copy runs in, whatever the caller's are, and keeps random states as they are."""
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(without_global_hooks())
            stack.enter_context(unchanged_random_states())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(self.run_mode.grad())
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=False))
            if self.fake_mode is not None:
                stack.enter_context(self.fake_mode)
            yield

    def run(self) -> Any:
        """Calls the copy."""
        return self.module(*self.args, **self.kwargs)


class InputShapeError(UsageError):
    """A forward pass failed for the shapes of its inputs alone: no other way of running it can succeed."""


_Watcher = Callable[[ModelCopy], AbstractContextManager[Watched]]


def run_watched(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: _Watcher[Watched]
) -> tuple[ModelCopy, Watched]:
    """Runs a copy of a module and watches it: on shapes alone or, if its forward depends on values, on values.

    Some forwards fail because they are watched, or because frozen parameters require gradients in the copy. They run
    as their users run them, and less of them is watched: see ``run_mode`` of the copy.

    Args:
        module: Any module; it stays as it is.
        args: Positional arguments of its forward; only shapes matter, unless the forward depends on values.
        kwargs: Keyword arguments of its forward.
        watch: Returns the context to run a copy in, which watches what ``run_mode.watch`` allows.

    Returns:
        The copy that ran, and what the context yielded.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
        InputShapeError: The watcher raised it.
        Exception: Whatever its forward raises when it runs as its users run it.
    """
    try:
        return _run(fake_copy(module, args, kwargs), watch)
    except InputShapeError:
        raise
    except Exception:  # fake tensors refuse what depends on values in many ways; any other fault will recur
        pass
    try:
        return _run(real_copy(module, args, kwargs), watch)
    except UsageError:
        raise
    except Exception:
        return _run_as_used(module, args, kwargs, watch)


def _run_as_used(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], watch: _Watcher[Watched]
) -> tuple[ModelCopy, Watched]:
    errors: list[Exception] = []
    for mode in _MODES_AS_USED:
        if mode.training and not any(part.training for part in module.modules()):
            continue
        try:
            ran = _run(real_copy(module, args, kwargs, mode), watch)
        except Exception as error:
            errors.append(error)
            continue
        try:
            return _run(real_copy(module, args, kwargs, replace(mode, watch=Watch.OPERATIONS)), watch)
        except Exception:
            return ran
    raise errors[0]


def _run(copied: ModelCopy, watch: _Watcher[Watched]) -> tuple[ModelCopy, Watched]:
    with copied.running(), watch(copied) as watched:
        copied.run()
    return copied, watched


# --- kinds of copies --------------------------------------------------------------------------------------------------


def fake_copy(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    mode: FakeTensorMode | None = None,
) -> ModelCopy:
    """Copies a module and its inputs without their contents.

    Every tensor of the copy is on the CPU, so the result does not depend on the module's device. The copy is in
    evaluation mode because batch norm in training mode refuses a single value per channel.

    Args:
        module: Any module.
        args: Positional arguments of its forward; tensors in them become fake.
        kwargs: Keyword arguments of its forward.
        mode: The mode to make them in; a new one if None.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet(), mode:
        copied = _copy(module, lambda tensor: _empty_like(tensor, "cpu"))
    return ModelCopy(_eval(copied), in_mode(mode, args), in_mode(mode, kwargs or {}), mode)


def real_copy(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    run_mode: RunMode = _DEFAULT_MODE,
) -> ModelCopy:
    """Copies a module so that it computes: parameters share the module's memory, buffers are copied.

    What is on the meta device is on the CPU in the copy, with small random weights.

    Args:
        module: Any module.
        args: Positional arguments of its forward; they are moved to the module's device.
        kwargs: Keyword arguments of its forward, which are moved too.
        run_mode: How the copy is to run.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    copied = _copy(module, _clone if run_mode.as_used else _alias)
    if not run_mode.training:
        _eval(copied)
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))
    args, kwargs = _pytree.tree_map_only(Tensor, lambda tensor: _filled(tensor).to(device), (args, kwargs or {}))
    return ModelCopy(copied, args, kwargs, None, run_mode)


def meta_copy(module: nn.Module) -> nn.Module:
    """Copies a module to the meta device, without duplicating a weight on the way.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    return _copy(module, lambda tensor: _empty_like(tensor, "meta"))


def empty_copy(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCopy:
    """Copies a module and its inputs to the meta device, to be run without gradients.

    It runs faster than a copy with fake tensors, but modules that make tensors on another device fail in it.

    Raises:
        UsageError: The module has parameters that are not initialized, or cannot be copied.
    """
    copied = _eval(meta_copy(module))
    args, kwargs = _pytree.tree_map_only(Tensor, lambda tensor: _empty_like(tensor, "meta"), (args, kwargs))
    return ModelCopy(copied, args, kwargs, None, RunMode(grad=torch.no_grad))


def trainable_copy(module: nn.Module) -> nn.Module:
    """Copies a module as ``copy.deepcopy`` does, with its own hooks bound to the copy; a user's hooks stay on it.

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
    """Replaces the tensors in nested values by fake tensors of this mode."""
    with mode:
        return _pytree.tree_map_only(Tensor, lambda tensor: _empty_like(tensor.detach(), "cpu"), values)


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Restores the random states of torch, NumPy and Python at the end of a block."""
    python, legacy = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)


# --- how modules are copied -------------------------------------------------------------------------------------------


def _copy(module: nn.Module, like: Callable[[Tensor], Tensor]) -> nn.Module:
    check_initialized(module)
    # deepcopy takes what the memo holds for the copy: shared tensors stay shared, and no weight is ever duplicated.
    tensors: dict[int, Any] = {id(tensor): like(tensor) for tensor in tensors_of(module)}
    try:
        try:
            return _deep_copy(module, dict(tensors), keep_others=False)
        except Exception:  # a lock, a file, a generator
            return _deep_copy(module, tensors | _uncopyable_attributes(module, tensors), keep_others=False)
    except Exception as error:
        raise UsageError(f"{type(module).__name__} cannot be copied to look at its shapes: {error}") from error


def _deep_copy(module: nn.Module, memo: dict[int, Any], keep_others: bool) -> nn.Module:
    copy_hooks(module, memo, keep_others)
    return copy.deepcopy(module, memo)


def _uncopyable_attributes(module: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """What attributes hold that ``deepcopy`` cannot copy, by id: the copy shares it with the module."""
    parts = {id(part): part for part in module.modules()}
    seen: set[int] = set()
    values = [value for part in parts.values() for value in _uncopyable(vars(part), memo | parts, seen)]
    return {id(value): _shared(value) for value in values}


def _uncopyable(value: Any, memo: dict[int, Any], seen: set[int]) -> list[Any]:
    """The smallest parts of a value that ``deepcopy`` cannot copy."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return [part for inner in _contents(value) for part in _uncopyable(inner, memo, seen)] or [value]
    return []


def _shared(value: Any) -> Any:
    """What the copy gets: the value itself, unless running the copy would change it for the module."""
    if isinstance(value, GeneratorType):
        return (each for each in tuple[Any, ...]())
    return threading.local() if isinstance(value, threading.local) else value


def _eval(module: nn.Module) -> nn.Module:
    for part in module.modules():
        part.training = False  # not eval(), which models override to change themselves
    return module


def _empty_like(tensor: Tensor, device: str) -> Tensor:
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
    """A tensor that a forward pass may change, and that requires a gradient if the other does."""
    with torch.no_grad():
        cloned = _filled(tensor).detach().clone()
    return nn.Parameter(cloned, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cloned


def _filled(tensor: Tensor) -> Tensor:
    """The tensor, or one on the CPU with contents if it is on the meta device."""
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
    """Yields parameters, buffers, and tensors anywhere in attributes: a detector's anchors, weight_norm's weight."""
    seen: set[int] = set()
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            yield from (tensor for tensor in tensors.values() if tensor is not None)
        yield from _tensors_in(vars(part), seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and not isinstance(value, nn.Module | type | ModuleType):
        seen.add(id(value))
        for item in _contents(value):
            yield from _tensors_in(item, seen)


def _contents(value: Any) -> Iterator[Any]:
    """What a container, or an object's attributes, hold; pytree would see neither objects nor sets."""
    if isinstance(value, type | ModuleType):
        return
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value
    yield from getattr(value, "__dict__", {}).values()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides what models warn of, which belongs to users' own runs, and what torch logs where fake tensors refuse."""
    with warnings.catch_warnings(), logger_level(logging.CRITICAL, "torch._subclasses.fake_tensor"):
        warnings.simplefilter("ignore")
        yield
