"""Parameters, MACs and activation bytes: one definition, used by everything that prints a number."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ddf_convert.fake import check_initialised, fake_copy


class Cost(BaseModel):
    """What a module, or a model, costs for one example input.

    Attributes:
        params: Parameters, each shared one counted once.
        macs: Multiply-accumulates of convolutions, matrix products, attention and DDF in one forward pass: half of
            what ``torch.utils.flop_counter.FlopCounterMode`` counts. Elementwise operations, pooling and normalisation
            are not counted (the papers' "FLOPs").
        activation_bytes: Bytes that autograd keeps for the backward pass, without parameters and buffers. What two
            layers both keep is counted once where both are measured together; so is the sum of layers measured alone
            an estimate for the model, while that of parameters and MACs is exact.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    params: int = 0
    macs: int = 0
    activation_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            params=self.params + other.params,
            macs=self.macs + other.macs,
            activation_bytes=self.activation_bytes + other.activation_bytes,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            params=self.params - other.params,
            macs=self.macs - other.macs,
            activation_bytes=self.activation_bytes - other.activation_bytes,
        )


def count_parameters(module: nn.Module) -> int:
    """Elements of a module's parameters, each shared one counted once.

    Raises:
        UsageError: A parameter is lazy and has no shape yet.
    """
    check_initialised(module)
    return sum(parameter.numel() for parameter in module.parameters())


def measure(module: nn.Module, *inputs: Any) -> Cost:
    """Costs of one forward pass, from shapes alone: nothing is computed and nothing in the module changes.

    The pass is that of evaluation mode with gradients on, as if every parameter were trained.

    Args:
        module: On any device, the meta device included, of any floating-point dtype.
        *inputs: What its forward takes, on any device.

    Returns:
        The costs, for the batch as given.

    Raises:
        UsageError: The module has lazy parameters, or cannot be copied.
    """
    fake = fake_copy(module, inputs)
    weights = {_storage(tensor) for tensors in (fake.module.parameters(), fake.module.buffers()) for tensor in tensors}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)  # the tensor itself is held, so that no address is used twice
        return tensor

    # Attention on the CPU has an operator of its own, which torch's registry of formulas leaves out.
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with fake.running(), counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fake.module(*fake.inputs)
    activations = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)
    return Cost(params=count_parameters(module), macs=counter.get_total_flops() // 2, activation_bytes=activations)


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> int:
    formula: Any = sdpa_flop_count  # torch leaves it untyped
    return int(formula(query, key, value))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
