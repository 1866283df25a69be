"""Registers gradients and batching rules of operators, so that ``torch.func`` can transform them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def register_autograd(
    library: torch.library.Library,
    operator: str,
    backward: Callable[..., tuple[Tensor | None, ...]],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
) -> None:
    """Registers a gradient as ``torch.library.register_autograd`` does, also for ``torch.func.grad``.

    The function of torch 2.14 and older raises under ``torch.func.grad``. Here, as in torch's own operators, each
    transform records what it differentiates and passes the call on to the next one.
    """
    overload = getattr(torch.ops.ddf_convert, operator).default
    defaults = [argument.default_value for argument in overload._schema.arguments]

    def next_kernel(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Differentiated(_SingleLevelFunction):
        """The operator at one level of differentiation."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *arguments, keyset = inputs
            with torch.enable_grad():  # torch turned gradients off here; inner transforms need them
                output = next_kernel(keyset, tuple(arguments))
            # The dispatcher leaves out arguments that equal their defaults.
            setup_context(ctx, (*arguments, *defaults[len(arguments) :]), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *gradients), None

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Any:
            raise NotImplementedError(
                f"ddf_convert::{operator} has no forward-mode derivative; use reverse mode: torch.func.grad or jacrev"
            )

    def kernel(keyset: Any, *arguments: Any) -> Any:
        # Also in forward mode, where the tangents would be lost without an error.
        forward_mode = forward_ad._current_level >= 0
        if forward_mode or (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            with enable_single_level_autograd_function():
                return Differentiated.apply(*arguments, keyset)  # type: ignore[attr-defined]
        return next_kernel(keyset, arguments)

    library.impl(operator, kernel, "Autograd", with_keyset=True)


def register_vmap(operator: str, tensors: int, check: Callable[..., object]) -> None:
    """Registers the batching rule of an operator: the mapped dimension becomes part of the batch.

    Args:
        operator: Its name without the namespace.
        tensors: How many of its arguments, the first ones, are (B, ...) tensors.
        check: Raises unless the arguments of one sample fit.
    """
    overload = getattr(torch.ops.ddf_convert, operator)

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        size, dims, options = info.batch_size, in_dims[:tensors], arguments[tensors:]
        stacked = [
            tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments, dims, strict=False)
        ]
        check(*[tensor[0] for tensor in stacked], *options)
        output = overload(*[tensor.flatten(0, 1) for tensor in stacked], *options)
        shape = stacked[0].shape[:2]
        if isinstance(output, Tensor):
            return output.unflatten(0, shape), 0
        # A gradient that is not needed has no elements and no batch.
        wanted = [gradient.dim() > 1 for gradient in output]
        unfolded = (
            gradient.unflatten(0, shape) if each else gradient for gradient, each in zip(output, wanted, strict=True)
        )
        return tuple(unfolded), tuple(0 if each else None for each in wanted)

    torch.library.register_vmap(f"ddf_convert::{operator}", rule)
