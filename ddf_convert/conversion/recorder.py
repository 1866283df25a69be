"""Recording: one run of a model, with the calls of every site, what goes through its parts, and what it costs."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ddf_convert.conversion.sites import (
    ARGUMENTS,
    FUNCTIONS,
    OPTIONS,
    UPSAMPLING_FUNCTIONS,
    answers_interpolate,
    call_name,
    is_site,
    owner_of,
    site_kinds,
)
from ddf_convert.cost.count import Cost, counting
from ddf_convert.errors import UsageError, first_line
from ddf_convert.utils.example_input import in_words
from ddf_convert.utils.fake_copy import InputShapeError, ModelCopy, Watch, in_mode, run_watched

# Torch's errors about maps that got too small on their way through a model.
_TOO_SMALL = re.compile(
    r"Kernel size can't be greater than actual input size|[Oo]utput size is too small"
    r"|Padding size should be less than the corresponding input dimension|Padding value causes wrapping around"
    r"|Expected more than 1 (value per channel|spatial element)|sizes should be greater than 0"
    r"|(to have|has|with) non-zero (size|dimensions)|negative dimension|input (image )?is too small"
)


@dataclass(frozen=True)
class FunctionalConv:
    """The arguments of a functional convolution."""

    weight: tuple[int, ...]  # its shape
    dtype: torch.dtype  # of the weight
    parameters: tuple[str, ...]  # paths of weight and bias, where they are the model's own
    params: int  # elements of these
    computed: bool  # the forward pass computes the weight or bias
    transposed: bool  # it is F.conv_transpose2d
    bias: bool
    options: dict[str, Any]  # stride, padding, dilation, groups


@dataclass(frozen=True)
class FunctionalUpsample:
    """The arguments of a functional upsampling."""

    function: str  # "interpolate" or "pixel_shuffle"
    mode: str = ""
    align_corners: bool = False
    antialias: bool = False
    of_parameter: bool = False  # its input is a parameter, such as a position embedding


@dataclass(frozen=True)
class Call:
    """One call of a site during the forward pass."""

    name: str  # of the site
    input_shape: tuple[int, ...]  # (B, C, H, W)
    output_shape: tuple[int, ...]  # (B, C, H, W)
    function: FunctionalConv | None = None  # of a functional convolution
    upsampled: FunctionalUpsample | None = None  # of a functional upsampling
    dtype: torch.dtype = torch.float32  # of the input
    arguments: int = 1  # how many a module was called with


@dataclass(frozen=True)
class Entry:
    """One call of a module that holds sites; all tensors are fake."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Recording:
    """The record of one run of a model."""

    copied: ModelCopy  # what ran, on shapes alone or on values
    mode: FakeTensorMode  # of the fake tensors in entries
    calls: tuple[Call, ...]  # of sites, in order
    entries: dict[str, list[Entry]]  # the calls of every module that holds sites, by its path
    read_directly: frozenset[str]  # sites whose parameters are used outside of their own forward
    uses: Counter[str]  # of each parameter outside of a site's forward, by path
    cost: Cost  # of the whole model
    kinds: tuple[type[nn.Module], ...]  # the classes of modules that are sites

    @property
    def on_values(self) -> bool:
        """Whether the model had to run on values, since its forward depends on them."""
        return self.copied.fake_mode is None


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, upsample: bool = False
) -> Recording:
    """Runs a copy of a model and records it; raises UsageError if it cannot be copied or does not accept the input."""
    failed: dict[int, _Recorder] = {}
    kinds = site_kinds(upsample)

    @contextmanager
    def watch(copied: ModelCopy) -> Iterator[_Recorder]:
        recorder = _Recorder(copied, kinds)
        try:
            with counting(copied) as tally, recorder.recording():
                yield recorder
        except Exception as error:
            failed[id(error)] = recorder
            if _TOO_SMALL.search(str(error)):
                raise InputShapeError(str(recorder.explain(name, in_words(args, kwargs), error))) from error
            raise
        recorder.cost = tally.cost

    try:
        copied, recorder = run_watched(model, args, kwargs, watch)
    except UsageError:
        raise
    except Exception as error:  # forward is the user's code: anything can come out of it
        if id(error) not in failed:  # it did not come to a run
            raise UsageError(f"{name} cannot be copied to look at its shapes: {first_line(error)}") from error
        raise failed[id(error)].explain(name, in_words(args, kwargs), error) from error
    return Recording(
        copied=copied,
        mode=recorder.mode,
        calls=tuple(recorder.calls),
        entries=recorder.entries,
        read_directly=frozenset(recorder.read_directly),
        uses=recorder.uses,
        cost=recorder.cost,
        kinds=kinds,
    )


@dataclass
class _Running:
    """A module whose forward has begun and not ended."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functions: Counter[str] = field(default_factory=Counter)  # called in it so far


class _Recorder(TorchFunctionMode):
    """Records calls of modules by hooks, and calls of functions as a torch function mode."""

    def __init__(self, copied: ModelCopy, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.mode = copied.fake_mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.calls: list[Call] = []
        self.entries: dict[str, list[Entry]] = {}
        self.read_directly: set[str] = set()
        self.uses: Counter[str] = Counter()
        self.cost = Cost()
        self._model = copied.module
        self._watch = copied.run_mode.watch
        self._running: list[_Running] = []
        self._parameters = {id(parameter): path for path, parameter in copied.module.named_parameters()}
        self._upsample = nn.Upsample in kinds
        sites = {path for path, module in copied.module.named_modules() if path and is_site(module, kinds)}
        self._sites = {path for path in sites if not _is_below(path, sites)}
        self._holders = {"", *(above for path in self._sites for above in _above(path))}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Records modules and functions that are called in the block."""
        hooks = []
        for path, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and holds no Python modules
            enter, leave = self._hooks_of(path)
            hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
        try:
            with self if self._watch >= Watch.OPERATIONS else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks_of(self, path: str) -> tuple[Any, Any]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(_Running(path, module, args, kwargs))

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            while (left := self._running.pop()).path != path:
                pass  # modules that an exception left, which the forward pass caught
            self._record_module(left, output)

        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_inside_site() or getattr(func, "namespace", "") == "prim":  # autograd asks for devices so
            return func(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, nn.Parameter):
                    self._record_use(item)
        result = func(*args, **kwargs)
        if func in FUNCTIONS and isinstance(result, Tensor):
            self._record_function(func, args, kwargs, result)
        elif self._upsample and func in UPSAMPLING_FUNCTIONS and isinstance(result, Tensor):
            self._record_upsampling(func, args, kwargs, result)
        return result

    def _record_module(self, left: _Running, output: Any) -> None:
        if left.path in self._sites:
            input = left.args[0] if left.args else next(iter(left.kwargs.values()), None)
            if isinstance(input, Tensor) and isinstance(output, Tensor) and not self._is_inside_site():
                arguments = len(left.args) + len(left.kwargs)
                shapes = tuple(input.shape), tuple(output.shape)
                self.calls.append(Call(left.path, *shapes, dtype=input.dtype, arguments=arguments))
                if self._running and answers_interpolate(left.path):
                    self._running[-1].functions["interpolate"] += 1  # the next call keeps its number
        elif left.path in self._holders:
            args, kwargs, output = in_mode(self.mode, (left.args, left.kwargs, output))
            self.entries.setdefault(left.path, []).append(Entry(args, kwargs, output))

    def _is_inside_site(self) -> bool:
        return any(running.path in self._sites for running in self._running)

    def _record_use(self, parameter: nn.Parameter) -> None:
        path = self._parameters.get(id(parameter))
        if path is None:
            return
        self.uses[path] += 1
        holder = owner_of(path)
        if holder in self._sites:
            self.read_directly.add(holder)

    def _record_function(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        given = dict(zip(ARGUMENTS[func], args, strict=False)) | kwargs
        input, weight, bias = given["input"], given["weight"], given.get("bias")
        tensors = [tensor for tensor in (weight, bias) if tensor is not None]
        owned = [tensor for tensor in tensors if id(tensor) in self._parameters]
        function = FunctionalConv(
            weight=tuple(weight.shape),
            dtype=weight.dtype,
            parameters=tuple(self._parameters[id(tensor)] for tensor in owned),
            params=sum(tensor.numel() for tensor in owned),
            computed=len(owned) < len(tensors),
            transposed=func is torch.conv_transpose2d,
            bias=bias is not None,
            options={name: given.get(name, default) for name, default in OPTIONS.items()},
        )
        shapes = tuple(input.shape), tuple(result.shape)
        self.calls.append(Call(self._name_of(func), *shapes, function, dtype=input.dtype))

    def _record_upsampling(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        word = UPSAMPLING_FUNCTIONS[func]
        input = args[0] if args else kwargs["input"]
        if word == "interpolate":
            given = dict(zip(ARGUMENTS[func], args, strict=False)) | kwargs
            align_corners, antialias = (bool(given.get(flag)) for flag in ("align_corners", "antialias"))
            of_parameter = isinstance(input, nn.Parameter)
            upsampled = FunctionalUpsample(word, given.get("mode", "nearest"), align_corners, antialias, of_parameter)
        else:
            upsampled = FunctionalUpsample(word)
        shapes = tuple(input.shape), tuple(result.shape)
        self.calls.append(Call(self._name_of(func), *shapes, upsampled=upsampled, dtype=input.dtype))

    def _name_of(self, func: Any) -> str:
        owner = self._running[-1] if self._running else _Running("", self._model, (), {})
        return call_name(owner.path, func, owner.functions)

    def explain(self, name: str, sizes: str, error: Exception) -> UsageError:
        """Returns the error of a run that failed, for a user."""
        place = ""
        if self._running:
            failed = self._running[-1]
            place = f"{failed.path or 'its forward'} ({type(failed.module).__name__}) failed: "
        advice = self._advice(error) or "so does the model itself with this input"
        return UsageError(f"{name} does not accept an input of {sizes}: {place}{first_line(error)}; {advice}")

    def _advice(self, error: Exception) -> str:
        """What to do about an error whose cause is known."""
        if _TOO_SMALL.search(str(error)):
            return "try a larger --input-size"
        if not self._running:
            return ""
        failed = self._running[-1]
        module, input = failed.module, failed.args[0] if failed.args else None
        if not failed.path and isinstance(error, TypeError) and not _fits_signature(failed):
            return "the example input is a tuple of all arguments of forward, or a dict of them by name"
        if isinstance(module, nn.Conv2d | nn.Linear) and isinstance(input, Tensor) and input.is_floating_point():
            if input.dtype != module.weight.dtype:
                return f"it takes {module.weight.dtype} and was given {input.dtype}"
            if isinstance(module, nn.Linear) and input.dim() and input.shape[-1] != module.in_features:
                return f"it takes {module.in_features} features and was given {input.shape[-1]}"
            if isinstance(module, nn.Conv2d) and input.dim() == 4 and input.shape[1] != module.in_channels:
                return f"it takes {module.in_channels} channels and was given {input.shape[1]}"
        return ""


def _fits_signature(running: _Running) -> bool:
    try:
        inspect.signature(running.module.forward).bind(*running.args, **running.kwargs)
    except TypeError:
        return False
    return True


def _above(path: str) -> Iterator[str]:
    """Paths of the modules that hold a module."""
    while path:
        path = owner_of(path)
        yield path


def _is_below(path: str, others: set[str]) -> bool:
    return any(above in others for above in _above(path))
