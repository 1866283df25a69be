"""Whether a module may be computed directly, without being called: only where nobody could tell the difference."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module does what ``kind.forward`` does and nothing else.

    It does not if the module is of another class (torch's parametrisations make one), has a forward of its own, or if
    a hook waits for the call: its own, or one for all modules.
    """
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__  # vars(module) is more than torch.compile of torch 2.6 can follow
        and not any_global_hook()
    )


def any_global_hook() -> bool:
    """Whether a hook waits for the calls of all modules."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )
