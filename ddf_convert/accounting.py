"""Parameters, MACs and activation bytes: one definition, used by everything that prints a number."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Cost(BaseModel):
    """What a module, or a model, costs for one example input.

    Attributes:
        params: Parameters, each shared one counted once.
        macs: Multiply-accumulates of convolutions, matrix products, attention and DDF in one forward pass: half of
            what ``torch.utils.flop_counter.FlopCounterMode`` counts. Elementwise operations, pooling and normalisation
            are not counted (the papers' "FLOPs").
        activation_bytes: Bytes that autograd keeps for the backward pass, without parameters and buffers.
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
