"""What goes into modules and comes out of them while a model runs, captured by forward hooks that are removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ddf_convert.errors import UsageError


class _Stop(BaseException):
    """Ends a forward pass; not an Exception, which the model might catch."""


Hooks = Iterable[tuple[nn.Module, Callable[..., Any]]]


def forward_hooks(hooks: Hooks) -> AbstractContextManager[None]:
    """A context in which each module has its hook, ``hook(module, args, output)``."""
    return _registered(module.register_forward_hook(hook) for module, hook in hooks)


def forward_pre_hooks(hooks: Hooks) -> AbstractContextManager[None]:
    """A context in which each module has its pre-hook, ``hook(module, args)``."""
    return _registered(module.register_forward_pre_hook(hook) for module, hook in hooks)


@contextmanager
def _registered(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Removes at the end what the iterable registers at the start."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextmanager
def captured_outputs(*modules: nn.Module) -> Iterator[list[Any]]:
    """A context whose list receives every output of some modules, in the order of the calls."""
    outputs: list[Any] = []
    with forward_hooks((module, lambda _module, _args, output: outputs.append(output)) for module in modules):
        yield outputs


@torch.no_grad()
def first_input(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """Returns the input of a module at its first call; the model runs no further.

    Raises:
        UsageError: The module is not called.
    """
    args: tuple[Tensor, ...] = _run_until(module.register_forward_pre_hook, model, images)
    return args[0].detach()


@torch.no_grad()
def first_output(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """Returns the output of a module at its first call; the model runs no further.

    Raises:
        UsageError: The module is not called.
    """
    output: Tensor = _run_until(module.register_forward_hook, model, images)
    return output.detach()


def _run_until(register: Callable[[Callable[..., Any]], RemovableHandle], model: nn.Module, images: Tensor) -> Any:
    """Runs a model until a hook is called, and returns the hook's last argument: the inputs or the output."""
    captured: list[Any] = []

    def stop(*arguments: Any) -> None:
        captured.append(arguments[-1])
        raise _Stop

    with register(stop), suppress(_Stop):
        model(images)
    if not captured:
        raise UsageError("a replaced layer was not called while the model ran on the images")
    return captured[0]
