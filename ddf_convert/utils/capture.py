"""What goes into modules and comes out of them while a model runs, captured by forward hooks that are removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.errors import UsageError


class _Stop(BaseException):
    """Ends a forward pass; not an Exception, which the model might catch."""


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """A context in which each module has its hook, ``hook(module, args, output)``."""
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.enter_context(module.register_forward_hook(hook))
        yield


@contextmanager
def forward_pre_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """A context in which each module has its pre-hook, ``hook(module, args)``."""
    with ExitStack() as handles:
        for module, hook in hooks:
            handles.enter_context(module.register_forward_pre_hook(hook))
        yield


@contextmanager
def captured_outputs(*modules: nn.Module) -> Iterator[list[Any]]:
    """A context whose list receives every output of some modules, in the order of the calls."""
    outputs: list[Any] = []
    with forward_hooks((module, lambda _module, _args, output: outputs.append(output)) for module in modules):
        yield outputs


@torch.no_grad()
def first_input(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """The input of a module at its first call; the model runs no further.

    Raises:
        UsageError: The module is not called.
    """

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach())
        raise _Stop

    inputs: list[Tensor] = []
    with forward_pre_hooks([(module, stop)]):
        return _run_until_stopped(model, images, inputs)


@torch.no_grad()
def first_output(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    """The output of a module at its first call; the model runs no further.

    Raises:
        UsageError: The module is not called.
    """

    def stop(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output.detach())
        raise _Stop

    outputs: list[Tensor] = []
    with forward_hooks([(module, stop)]):
        return _run_until_stopped(model, images, outputs)


def _run_until_stopped(model: nn.Module, images: Tensor, captured: list[Tensor]) -> Tensor:
    try:
        model(images)
    except _Stop:
        return captured[0]
    raise UsageError("a replaced layer was not called while the model ran on the images")
