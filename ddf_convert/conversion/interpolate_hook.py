"""Layers that answer ``F.interpolate`` calls, while the calling module keeps its class and methods.

There is no module to swap, and a GraphModule would cost the model its class. So the calling module gets a subclass of
its own class, as torch's parametrizations do, whose forward answers some of the calls by layers in the module. Calls
outside of the forward (in a closure that activation checkpointing repeats) are not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from ddf_convert.conversion.sites import ARGUMENTS

_NUMBERS = (int, float, torch.SymInt)
_subclasses: dict[type, type[nn.Module]] = {}  # that intercept, by the class that each derives from


def intercept(module: nn.Module, layers: Mapping[str, nn.Module] | None = None) -> None:
    """Answers calls of ``F.interpolate`` in a module's forward by layers; in place.

    Calls are numbered in the order in which one run of the forward makes them, as ``sites.call_name`` does. A
    call without a layer, or with another factor than the layer's, goes to torch. Without any layers, the module's calls
    are merely not counted as those of an intercepted module around it.

    Args:
        module: The module whose forward makes the calls; it has no :func:`obstacle_to_intercepting`.
        layers: By attribute: "ddf_interpolate_1" answers "interpolate_1()".
    """
    for attribute, layer in (layers or {}).items():
        module.add_module(attribute, layer)
    if not is_intercepting(type(module)):
        module.__class__ = _intercepting_subclass(type(module))


def obstacle_to_intercepting(module: nn.Module) -> str | None:
    """Says why calls in a module's forward cannot be answered; None if they can."""
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule):
        return f"inside a {'GraphModule' if isinstance(module, fx.GraphModule) else 'ScriptModule'}"
    if "forward" in vars(module):
        return f"called in a forward that replaces that of {class_of(module).__name__}"
    return None


def class_of(module: nn.Module) -> type[nn.Module]:
    """Returns a module's class as its author wrote it, whether its calls are intercepted or not."""
    kind = type(module)
    return kind.__mro__[1] if is_intercepting(kind) else kind


def is_intercepting(kind: type) -> bool:
    """Whether calls of a class's modules are answered by layers, or counted apart."""
    return "_ddf_intercepts" in vars(kind)


def _intercepting_subclass(kind: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass that intercepts, under the same name; one for each class."""
    if kind not in _subclasses:
        _subclasses.setdefault(kind, _make_subclass(kind))
    return _subclasses[kind]


def _make_subclass(kind: type[nn.Module]) -> type[nn.Module]:
    original: Callable[..., Any] = kind.forward

    @functools.wraps(original)  # with its signature, which torch.fx and others read
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _Calls(self):
            return original(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # By its name, pickle would find the class that it derives from.
        reduced: tuple[Any, ...] = kind.__reduce_ex__(self, protocol)  # type: ignore[assignment]
        made_by, arguments, *rest = reduced
        plain = tuple(kind if argument is type(self) else argument for argument in arguments)
        return _unpickle, (kind, made_by, plain), *rest

    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**names, "_ddf_intercepts": True, "forward": forward, "__reduce_ex__": reduce})


def _unpickle(kind: type[nn.Module], made_by: Callable[..., nn.Module], arguments: tuple[Any, ...]) -> nn.Module:
    module = made_by(*arguments)
    module.__class__ = _intercepting_subclass(kind)
    return module


class _Calls(TorchFunctionMode):
    """One run of a module's forward: the state belongs to that run, and so to one thread."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.number = 0
        self.covered = False  # the call comes from a module inside, which counts it

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.interpolate or self.covered:
            return func(*args, **kwargs)
        attribute = f"ddf_interpolate_{self.number}" if self.number else "ddf_interpolate"  # as sites.layer_path
        self.number += 1
        layer = self.module._modules.get(attribute)
        around = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Calls) and not mode.covered]
        for mode in around:
            mode.covered = True
        try:
            if layer is None:
                return func(*args, **kwargs)
            return _answer(layer, func, args, kwargs)
        finally:
            for mode in around:
                mode.covered = False


def _answer(layer: nn.Module, func: Any, args: Any, kwargs: Any) -> Any:
    """The layer's output, or torch's if the call asks for another factor."""
    given = dict(zip(ARGUMENTS[F.interpolate], args, strict=False)) | kwargs
    input, size, factor = given["input"], given.get("size"), given.get("scale_factor")
    if isinstance(input, Tensor) and input.dim() != 4:
        return func(*args, **kwargs)  # of sequences or volumes, which DDF-Up does not take
    scale: Any = layer.scale_factor
    if size is None:
        factors = factor if isinstance(factor, tuple | list) else (factor,)
        same = all(each == scale for each in factors if isinstance(each, _NUMBERS))
        return layer(input) if same else func(*args, **kwargs)
    sizes = size if isinstance(size, tuple | list) else (size, size) if isinstance(size, _NUMBERS) else None
    if sizes is not None and isinstance(input, Tensor) and not _is_multiple(sizes, input, scale):
        return func(*args, **kwargs)
    return layer(input, output_size=size if sizes is None else sizes)


def _is_multiple(sizes: Sequence[Any], input: Tensor, scale: int) -> bool:
    """Whether a size is a multiple of the input's, give or take what odd sizes lose on the way down.

    What a tracer passes instead of a number is taken for what was recorded.
    """
    pairs: Any = zip(sizes, input.shape[-2:], strict=False)
    return not any(abs(wanted - scale * there) >= scale for wanted, there in pairs if isinstance(wanted, _NUMBERS))
