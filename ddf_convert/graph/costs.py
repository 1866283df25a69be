"""What convolutions, and what could take their places, cost over all their calls; and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ddf_convert import accounting
from ddf_convert.accounting import Cost, count_parameters
from ddf_convert.copies import real_copy
from ddf_convert.graph.record import Call
from ddf_convert.graph.sites import Convolution
from ddf_convert.graph.swap import Replaced, prepare, swap
from ddf_convert.latency import device_of, forward_ms
from ddf_convert.machine import called, describe


class Stopwatch:
    """Times modules on one device; they can be on any, the meta device included.

    Args:
        model: Where it is, it is timed, if ``device`` is just True; on the CPU if that is the meta device.
        device: Where else.

    Attributes:
        machine: The device in words.
    """

    def __init__(self, model: nn.Module, device: bool | torch.device | str) -> None:
        own = device_of(model)
        default = torch.device("cpu") if own.type == "meta" else own
        self.device = default if isinstance(device, bool) else torch.device(device)
        self.machine = called(describe(self.device))

    def ms(self, module: nn.Module, *args: Any, **kwargs: Any) -> float:
        """Milliseconds of one forward pass."""
        if next(module.parameters(), None) is None:  # an interpolation: its place would not say where it is to run
            module = _Placed(module)
        return forward_ms(real_copy(module).module.to(self.device), *args, kwargs=kwargs)

    def ms_converted(self, model: nn.Module, steps: Sequence[Replaced], *args: Any, **kwargs: Any) -> float:
        """The same of the model once converted."""
        copied = real_copy(model).module
        return self.ms(swap(copied, prepare(copied, steps)), *args, **kwargs)


class _Placed(nn.Sequential):
    """A module that has no parameters, beside an empty one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.place = nn.Parameter(torch.empty(0))


class Costs:
    """Costs of layers over all the calls of a convolution. Equal layers, of which models have many, run once."""

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        self._stopwatch = stopwatch
        self._measured: dict[tuple[Any, ...], Cost] = {}

    def over_all_calls(self, module: nn.Module, convolution: Convolution) -> Cost:
        """Parameters once; MACs, activations and time for each call, at its shape."""
        total = Cost(params=count_parameters(module), latency_ms=0.0 if self._stopwatch else None)
        for call in convolution.calls:
            total += self._of_one_call(module, call).model_copy(update={"params": 0})
        return total

    def _of_one_call(self, module: nn.Module, call: Call) -> Cost:
        shape = call.input_shape
        dtype = next((parameter.dtype for parameter in module.parameters()), call.dtype)
        key = (type(module), repr(module), dtype, shape)  # the text shows every argument of these classes
        if key not in self._measured:
            image = torch.empty(shape, dtype=dtype, device="meta")
            cost = accounting.measure(module, image)
            if self._stopwatch:
                cost = cost.model_copy(update={"latency_ms": self._stopwatch.ms(module, image)})
            self._measured[key] = cost
        return self._measured[key]
