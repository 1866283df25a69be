"""Inputs and outputs of modules are captured by hooks that are removed again."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from ddf_convert.errors import UsageError
from ddf_convert.utils.capture import captured_outputs, first_input, first_output


class Careful(nn.Module):
    """Calls a layer twice, and hides whatever it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.unused, self.calls = nn.Linear(2, 2), nn.Linear(2, 2), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        try:
            return self.layer(self.layer(x))
        except Exception:
            return x


def test_every_output_is_captured_in_the_order_of_the_calls():
    model, x = Careful(), torch.randn(1, 2)
    with contextlib.suppress(KeyError), captured_outputs(model, model.layer) as outputs:
        result = model(x)
        raise KeyError
    assert len(outputs) == 3
    assert torch.equal(outputs[0], model.layer(x))
    assert outputs[2] is result
    assert not any(module._forward_hooks for module in model.modules())


def test_the_first_call_ends_the_forward_pass():
    model, x = Careful(), torch.randn(1, 2)
    assert torch.equal(first_input(model, model.layer, x), x)
    assert torch.equal(first_output(model, model.layer, x), model.layer(x))
    assert not first_output(model, model.layer, x).requires_grad
    assert model.calls == 3
    with pytest.raises(UsageError, match="was not called"):
        first_input(model, model.unused, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
