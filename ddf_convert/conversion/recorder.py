"""One run of a model, watched: the calls of every convolution, what goes through its parts, and what it all costs."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ddf_convert.conversion.interpolate_hook import INTERPOLATE, stands_for_a_call
from ddf_convert.conversion.registry import replacing_layers
from ddf_convert.cost.count import Cost, counting
from ddf_convert.errors import UsageError, first_line
from ddf_convert.utils.example_input import in_words
from ddf_convert.utils.fake_copy import Copy, SettledError, Watch, in_mode, watch_a_run

UPSAMPLING = (nn.Upsample, nn.PixelShuffle)  # sites too, where upsampling is asked for
FUNCTIONS = {torch.conv2d: "conv2d", torch.conv_transpose2d: "conv_transpose2d"}  # F.conv2d is torch.conv2d
UPSAMPLING_FUNCTIONS = {F.interpolate: "interpolate", torch.pixel_shuffle: "pixel_shuffle"}
ARGUMENTS = {
    torch.conv2d: ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch.conv_transpose2d: ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
}
# What torch says of maps that got too small on their way through a model.
_TOO_SMALL = re.compile(
    r"Kernel size can't be greater than actual input size|[Oo]utput size is too small"
    r"|Padding size should be less than the corresponding input dimension|Padding value causes wrapping around"
    r"|Expected more than 1 (value per channel|spatial element)|sizes should be greater than 0"
    r"|(to have|has|with) non-zero (size|dimensions)|negative dimension|input (image )?is too small"
)
OPTIONS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}  # and their defaults


@dataclass(frozen=True)
class Function:
    """What a convolution that is called as a function was called with, beside its input.

    Attributes:
        weight: Shape of the weight.
        dtype: Of the weight.
        parameters: Paths of those of its weight and bias that are the model's own parameters.
        params: Elements of these parameters.
        computed: The forward pass computes its weight or bias.
        transposed: It is ``F.conv_transpose2d``.
        bias: There is a bias.
        options: ``stride``, ``padding``, ``dilation`` and ``groups``.
    """

    weight: tuple[int, ...]
    dtype: torch.dtype
    parameters: tuple[str, ...]
    params: int
    computed: bool
    transposed: bool
    bias: bool
    options: dict[str, Any]


@dataclass(frozen=True)
class Upsampled:
    """What an upsampling that is called as a function was called with, beside its input.

    Attributes:
        function: "interpolate" or "pixel_shuffle".
        mode: Of the interpolation.
        align_corners: Of the interpolation.
        antialias: Of the interpolation.
        of_parameter: What is interpolated is a parameter: a position embedding.
    """

    function: str
    mode: str = ""
    align_corners: bool = False
    antialias: bool = False
    of_parameter: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a convolution, or of an upsampling, during the forward pass.

    Attributes:
        name: The module's path; for a function, the path of the module that calls it, and ``conv2d()``.
        input_shape: (B, C, H, W).
        output_shape: (B, C, H, W).
        function: Its arguments, if it is a convolution that is called as a function.
        upsampled: Its arguments, if it is an upsampling that is called as a function.
        dtype: Of the input.
        arguments: How many a module was called with.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    function: Function | None = None
    upsampled: Upsampled | None = None
    dtype: torch.dtype = torch.float32
    arguments: int = 1


@dataclass(frozen=True)
class Entry:
    """One call of a module that holds convolutions; all tensors are fake."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Recording:
    """What one run of a model showed.

    Attributes:
        copied: The copy that ran: on shapes alone (it has a mode), or on values.
        mode: That of the fake tensors in ``entries``.
        calls: Every call of a convolution, in order.
        entries: The calls of every module that holds convolutions, by its path.
        read_directly: Paths of the convolutions whose parameters are used outside of their own forward.
        uses: How often each parameter is used as an argument outside of a convolution's forward, by path.
        cost: Of the whole model.
        kinds: The modules that are sites.
    """

    copied: Copy
    mode: FakeTensorMode
    calls: tuple[Call, ...]
    entries: dict[str, list[Entry]]
    read_directly: frozenset[str]
    uses: Counter[str]
    cost: Cost
    kinds: tuple[type[nn.Module], ...]

    @property
    def on_values(self) -> bool:
        """Whether the model had to run on values, since its forward depends on them."""
        return self.copied.mode is None


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, upsample: bool = False
) -> Recording:
    """Runs a copy of a model and records it.

    Args:
        model: Any module; it stays as it is.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        name: What to call the model in errors.
        upsample: Note upsampling too.

    Raises:
        UsageError: The model cannot be copied, or does not accept the input.
    """
    failed: dict[int, _Recorder] = {}
    kinds = site_kinds(upsample)

    @contextmanager
    def watch(copied: Copy) -> Iterator[_Recorder]:
        recorder = _Recorder(copied, kinds)
        try:
            with counting(copied) as tally, recorder.listening():
                yield recorder
        except Exception as error:
            failed[id(error)] = recorder
            if _TOO_SMALL.search(str(error)):
                raise SettledError(str(recorder.refusal(name, in_words(args, kwargs), error))) from error
            raise
        recorder.cost = tally.cost

    try:
        copied, recorder = watch_a_run(model, args, kwargs, watch)
    except UsageError:
        raise
    except Exception as error:  # forward is the user's code: anything can come out of it
        raise failed[id(error)].refusal(name, in_words(args, kwargs), error) from error
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


def site_kinds(upsample: bool = True) -> tuple[type[nn.Module], ...]:
    """The modules that are sites: convolutions, what took their places, and, unless it is left out, upsampling."""
    return (nn.Conv2d, nn.ConvTranspose2d, *replacing_layers(), *(UPSAMPLING if upsample else ()))


def is_site(module: nn.Module, kinds: tuple[type[nn.Module], ...] | None = None) -> bool:
    """Whether a module is a site: one of these kinds, and no upsampling that its author gave parts of its own."""
    return isinstance(module, kinds or site_kinds()) and not (isinstance(module, UPSAMPLING) and any(module.children()))


@dataclass
class _Running:
    """A module whose forward has begun and not ended."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    functions: Counter[str] = field(default_factory=Counter)  # called in it so far


class _Recorder(TorchFunctionMode):
    """Notes calls of modules by hooks, and calls of functions by being torch's mode for them."""

    def __init__(self, copied: Copy, kinds: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.mode = copied.mode or FakeTensorMode(allow_non_fake_inputs=True)
        self.calls: list[Call] = []
        self.entries: dict[str, list[Entry]] = {}
        self.read_directly: set[str] = set()
        self.uses: Counter[str] = Counter()
        self.cost = Cost()
        self._model = copied.module
        self._way = copied.way
        self._running: list[_Running] = []
        self._parameters = {id(parameter): path for path, parameter in copied.module.named_parameters()}
        self._upsample = nn.Upsample in kinds
        convolutions = {path for path, module in copied.module.named_modules() if path and is_site(module, kinds)}
        self._convolutions = {path for path in convolutions if not _is_below(path, convolutions)}
        self._holders = {"", *(above for path in self._convolutions for above in _above(path))}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which modules and functions are noted."""
        hooks = []
        for path, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks, and holds no Python modules
            enter, leave = self._hooks_of(path)
            hooks.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
        try:
            with self if self._way.watch >= Watch.OPERATIONS else nullcontext():
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
            self._note_module(left, output)

        return enter, leave

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_inside_convolution() or getattr(func, "namespace", "") == "prim":  # autograd asks for devices so
            return func(*args, **kwargs)
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, tuple | list) else (value,):
                if isinstance(item, nn.Parameter):
                    self._note_use(item)
        result = func(*args, **kwargs)
        if func in FUNCTIONS and isinstance(result, Tensor):
            self._note_function(func, args, kwargs, result)
        elif self._upsample and func in UPSAMPLING_FUNCTIONS and isinstance(result, Tensor):
            self._note_upsampling(func, args, kwargs, result)
        return result

    def _note_module(self, left: _Running, output: Any) -> None:
        if left.path in self._convolutions:
            input = left.args[0] if left.args else next(iter(left.kwargs.values()), None)
            if isinstance(input, Tensor) and isinstance(output, Tensor) and not self._is_inside_convolution():
                arguments = len(left.args) + len(left.kwargs)
                shapes = tuple(input.shape), tuple(output.shape)
                self.calls.append(Call(left.path, *shapes, dtype=input.dtype, arguments=arguments))
                if self._running and stands_for_a_call(left.path):
                    self._running[-1].functions["interpolate"] += 1  # the next call keeps its number
        elif left.path in self._holders:
            args, kwargs, output = in_mode(self.mode, (left.args, left.kwargs, output))
            self.entries.setdefault(left.path, []).append(Entry(args, kwargs, output))

    def _is_inside_convolution(self) -> bool:
        return any(running.path in self._convolutions for running in self._running)

    def _note_use(self, parameter: nn.Parameter) -> None:
        path = self._parameters.get(id(parameter))
        if path is None:
            return
        self.uses[path] += 1
        holder = path.rpartition(".")[0]
        if holder in self._convolutions:
            self.read_directly.add(holder)

    def _note_function(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        given = dict(zip(ARGUMENTS[func], args, strict=False)) | kwargs
        input, weight, bias = given["input"], given["weight"], given.get("bias")
        tensors = [tensor for tensor in (weight, bias) if tensor is not None]
        owned = [tensor for tensor in tensors if id(tensor) in self._parameters]
        function = Function(
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

    def _note_upsampling(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        word = UPSAMPLING_FUNCTIONS[func]
        input = args[0] if args else kwargs["input"]
        if word == "interpolate":
            given = dict(zip(INTERPOLATE, args, strict=False)) | kwargs
            align_corners, antialias = (bool(given.get(flag)) for flag in ("align_corners", "antialias"))
            of_parameter = isinstance(input, nn.Parameter)
            upsampled = Upsampled(word, given.get("mode", "nearest"), align_corners, antialias, of_parameter)
        else:
            upsampled = Upsampled(word)
        shapes = tuple(input.shape), tuple(result.shape)
        self.calls.append(Call(self._name_of(func), *shapes, upsampled=upsampled, dtype=input.dtype))

    def _name_of(self, func: Any) -> str:
        owner = self._running[-1] if self._running else _Running("", self._model, (), {})
        return function_name(owner.path, func, owner.functions)

    def refusal(self, name: str, sizes: str, error: Exception) -> UsageError:
        """The error of a run that failed, in words."""
        place = ""
        if self._running:
            failed = self._running[-1]
            place = f"{failed.path or 'its forward'} ({type(failed.module).__name__}) failed: "
        advice = self._advice(error) or "so does the model itself with this input"
        return UsageError(f"{name} does not accept an input of {sizes}: {place}{first_line(error)}; {advice}")

    def _advice(self, error: Exception) -> str:
        """What to do about an error, where its cause is known."""
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


def function_name(owner: str, func: Any, called: Counter[str]) -> str:
    """The name of a convolution that is called as a function: ``block.conv2d()``, the next one ``block.conv2d_1()``.

    Args:
        owner: Path of the module whose forward calls it.
        func: One of ``FUNCTIONS`` or ``UPSAMPLING_FUNCTIONS``.
        called: What this call of the module has called so far; it is counted up.
    """
    word = FUNCTIONS.get(func) or UPSAMPLING_FUNCTIONS[func]
    number = called[word]
    called[word] += 1
    return f"{owner}{'.' if owner else ''}{word}{f'_{number}' if number else ''}()"


def _above(path: str) -> Iterator[str]:
    """Paths of the modules that hold a module."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _is_below(path: str, others: set[str]) -> bool:
    return any(above in others for above in _above(path))
