"""Parameters, MACs and activation bytes: one definition, used by everything that prints a number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ddf_convert.utils.fake_copy import ModelCopy, Watch, check_initialized, run_watched


class Cost(BaseModel):
    """What a module, or a model, costs for one example input.

    Costs can be added and subtracted. A sum has a latency if all of its terms do; ``Cost()`` is the neutral element.

    Attributes:
        params: Parameters; a shared one counts once.
        macs: Multiply-accumulates of convolutions, matrix products, attention and DDF in one forward pass: half of
            what ``torch.utils.flop_counter.FlopCounterMode`` counts. Elementwise operations, pooling and normalization
            are not counted (the papers' "FLOPs").
        activation_bytes: Bytes that autograd keeps for the backward pass, without parameters and buffers. What two
            layers both keep is counted once where both are measured together, so a sum over layers is an estimate.
            Sums of parameters and MACs are exact.
        latency_ms: Milliseconds of one forward pass, on the machine that the report names; None if not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    params: int = 0
    macs: int = 0
    activation_bytes: int = 0
    latency_ms: float | None = None

    def __add__(self, other: Cost) -> Cost:
        nothing = Cost()
        if nothing in (self, other):
            return self if other == nothing else other
        times = self.latency_ms, other.latency_ms
        return Cost(
            params=self.params + other.params,
            macs=self.macs + other.macs,
            activation_bytes=self.activation_bytes + other.activation_bytes,
            latency_ms=None if times[0] is None or times[1] is None else times[0] + times[1],
        )

    def __neg__(self) -> Cost:
        return Cost(
            params=-self.params,
            macs=-self.macs,
            activation_bytes=-self.activation_bytes,
            latency_ms=None if self.latency_ms is None else -self.latency_ms,
        )

    def __sub__(self, other: Cost) -> Cost:
        return self + -other


def count_parameters(module: nn.Module) -> int:
    """Counts the elements of a module's parameters; a shared one counts once.

    Raises:
        UsageError: A parameter is lazy and has no shape yet.
    """
    check_initialized(module)
    return sum(parameter.numel() for parameter in module.parameters())


def measure(module: nn.Module, *args: Any, **kwargs: Any) -> Cost:
    """Counts the costs of one forward pass, from shapes alone where possible; the module stays as it is.

    The pass is in evaluation mode with gradients on, as if every parameter were trained.

    Args:
        module: On any device, the meta device included, of any floating-point dtype.
        *args: Positional arguments of its forward, on any device.
        **kwargs: Keyword arguments of its forward.

    Returns:
        The costs, for the batch as given. A module that runs only unwatched (because it demands that gradients are off,
        for example) has no activations in them, and no MACs if its operations cannot be watched.

    Raises:
        UsageError: The module has lazy parameters, or cannot be copied.
    """
    _, tally = run_watched(module, args, kwargs, counting)
    return tally.cost


class _NoModules:
    """Replaces torch's tracker of modules, whose hooks fail inside autograd functions; only totals are needed."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class Tally:
    """Counts what a copy of a module costs while it runs."""

    def __init__(self, copied: ModelCopy) -> None:
        self.module = copied.module
        self._weights = {_storage(tensor) for tensor in (*self.module.parameters(), *self.module.buffers())}
        self._kept: dict[int, torch.UntypedStorage] = {}
        # Attention on the CPU has an operator of its own, which torch's registry of formulas leaves out.
        attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
        self.flops = FlopCounterMode(display=False, custom_mapping=attention)
        self.flops.mod_tracker = _NoModules()  # type: ignore[assignment]

    def keep(self, tensor: Tensor) -> Tensor:
        """Counts a tensor that autograd keeps, and holds its memory, so that no address is used twice.

        Autograd gets the tensor without its graph: an operation that saves its own output would never be freed.
        """
        self._kept.setdefault(_storage(tensor), tensor.untyped_storage())
        return tensor.detach()

    @property
    def cost(self) -> Cost:
        """The cost of what has run so far."""
        kept = (storage for address, storage in self._kept.items() if address not in self._weights)
        return Cost(
            params=count_parameters(self.module),
            macs=self.flops.get_total_flops() // 2,
            activation_bytes=sum(storage.nbytes() for storage in kept),
        )


@contextmanager
def counting(copied: ModelCopy) -> Iterator[Tally]:
    """Counts what a copy costs that runs in the block, as far as its run mode allows."""
    tally = Tally(copied)
    with ExitStack() as stack:
        if copied.run_mode.watch >= Watch.OPERATIONS:
            stack.enter_context(tally.flops)
        if copied.run_mode.watch >= Watch.EVERYTHING:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(tally.keep, lambda kept: kept))
        yield tally


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    formula: Any = sdpa_flop_count  # torch leaves it untyped
    return int(formula(query, key, value))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
