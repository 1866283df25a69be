"""Copies of models to look at, so that the original is never run: on shapes alone where that is possible."""

from __future__ import annotations

import copy
import functools
import logging
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parameter import is_lazy
from torch.utils import _pytree

from ddf_convert.errors import UsageError

Watched = TypeVar("Watched")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Copy:
    """A copy of a module, in evaluation mode, and the inputs to call it with.

    Attributes:
        module: The copy; every floating-point parameter asks for a gradient.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        mode: The mode of fake tensors, if neither module nor inputs have contents.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mode: FakeTensorMode | None

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context to run the copy in: gradients on, whatever the caller's own modes are; random states stay."""
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(unchanged_random_states())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda"):
                stack.enter_context(torch.autocast(device, dtype=torch.bfloat16, enabled=False))
            if self.mode is not None:
                stack.enter_context(self.mode)
            yield

    def run(self) -> Any:
        """Calls the copy."""
        return self.module(*self.args, **self.kwargs)


def watch_a_run(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    watch: Callable[[Copy], AbstractContextManager[Watched]],
) -> tuple[Copy, Watched]:
    """Runs a copy of a module and watches it: on shapes alone or, if its forward looks at values, on values.

    Args:
        module: Any module; it stays as it is.
        args: Positional arguments of its forward; only shapes matter, unless the forward looks at values.
        kwargs: Keyword arguments of its forward.
        watch: Called with the copy, gives the context to run it in.

    Returns:
        The copy that ran, and what the context gave.

    Raises:
        UsageError: The module has parameters that are not initialised, or cannot be copied.
        Exception: Whatever its forward raises, on values as on shapes.
    """
    try:
        return _watched(fake_copy(module, args, kwargs), watch)
    except Exception:  # fake tensors refuse what depends on values in many ways; any other fault will recur
        return _watched(real_copy(module, args, kwargs), watch)


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
        UsageError: The module has parameters that are not initialised, or cannot be copied.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet(), mode:
        copied = _copy(module, lambda tensor: _imitate(tensor, "cpu"))
    return Copy(_in_evaluation(copied), in_mode(mode, args), in_mode(mode, kwargs or {}), mode)


def real_copy(module: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Copy:
    """Copies a module so that it computes: its parameters are the module's own memory, its buffers are copies.

    What is on the meta device stands on the CPU in the copy, with small random weights.

    Args:
        module: Any module.
        args: Positional arguments of its forward; they are moved to the module's device.
        kwargs: Keyword arguments of its forward, likewise.

    Raises:
        UsageError: The module has parameters that are not initialised, or cannot be copied.
    """
    copied = _in_evaluation(_copy(module, _alias))
    device = next((parameter.device for parameter in copied.parameters()), torch.device("cpu"))
    moved, named = (_pytree.tree_map_only(Tensor, lambda t: _filled(t).to(device), each) for each in (args, kwargs))
    return Copy(copied, moved, named or {}, None)


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy on the meta device, without duplicating a weight on the way.

    Raises:
        UsageError: The module has parameters that are not initialised, or cannot be copied.
    """
    return _copy(module, lambda tensor: _imitate(tensor, "meta"))


def check_initialised(module: nn.Module) -> None:
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
    check_initialised(module)
    # deepcopy takes what the memo holds for the copy: shared tensors stay shared, and no weight is ever duplicated.
    memo: dict[int, Any] = {id(tensor): like(tensor) for tensor in tensors_of(module)}
    try:
        memo |= {id(hooks): _own_hooks(hooks, module, memo) for hooks in _hooks(module)}
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise UsageError(f"{type(module).__name__} cannot be copied to look at its shapes: {error}") from error


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
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple | set) else ()
        for item in (*inner, *getattr(value, "__dict__", {}).values()):
            yield from _tensors_in(item, seen)


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


def _hooks(module: nn.Module) -> Iterator[OrderedDict[int, Any]]:
    return (getattr(part, kind) for part in module.modules() for kind in _HOOKS)


def _own_hooks(hooks: OrderedDict[int, Any], module: nn.Module, memo: dict[int, Any]) -> OrderedDict[int, Any]:
    """The hooks that are part of the model (timm's features, torch's weight_norm), copied; never those of a user.

    A user's hook would be called with what nobody wanted to see, and tell the user's lists and loggers of it.
    """
    if not hooks:
        return OrderedDict()
    owned = {id(value) for part in module.modules() for value in (part, *vars(part).values())}
    return OrderedDict((key, copy.deepcopy(hook, memo)) for key, hook in hooks.items() if _is_owned(hook, owned))


def _is_owned(hook: Any, owned: set[int]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    if isinstance(hook, MethodType):
        return id(hook.__self__) in owned
    return type(hook).__module__.startswith("torch.nn.utils.")
