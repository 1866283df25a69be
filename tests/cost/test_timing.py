"""How long a forward pass takes, and that measuring it leaves no trace."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from torch import nn

import ddf_convert as ddf
from ddf_convert.cost.count import Cost
from ddf_convert.cost.timing import device_of, forward_ms

QUICK = 0.001  # seconds


class Restless(nn.Module):
    """Changes itself, draws random numbers of three kinds and counts, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.BatchNorm2d(8).eval()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.modes: list[bool] = []

    def forward(self, image: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.seen += 1
        self.calls += 1
        self.modes.append(self.training)
        noise = random.random() + numpy.random.rand() + torch.rand(())
        return self.frozen(self.norm(self.conv(image))) * noise * scale


def test_a_time_is_measured_and_the_module_is_as_before() -> None:
    model, image = Restless().train(), torch.randn(2, 3, 16, 16)
    model.frozen.eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randoms = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    assert forward_ms(model, image, seconds=QUICK, kwargs={"scale": 2.0}) > 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.calls, model.modes) == (0, [])
    assert [part.training for part in model.modules()] == [True, True, True, False]
    assert random.getstate() == randoms[0]
    assert numpy.random.get_state()[1].tolist() == randoms[1]
    assert torch.equal(torch.get_rng_state(), randoms[2])
    assert all(parameter.grad is None for parameter in model.parameters())
    model(image).sum().backward()  # nothing of inference mode stays behind


def test_a_converted_layer_is_timed_with_its_own_kernels() -> None:
    assert forward_ms(ddf.layers.DDF2d(8), torch.randn(1, 8, 12, 12), seconds=QUICK) > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_has_no_contents_is_given_some(device: str) -> None:
    conv = nn.Conv2d(3, 8, 3, device=device)
    assert forward_ms(conv, torch.empty(1, 3, 8, 8, device="meta"), seconds=QUICK) > 0


def test_a_forward_pass_that_fails_says_where() -> None:
    with pytest.raises(ddf.DDFError, match="Conv2d does not run on cpu"):
        forward_ms(nn.Conv2d(3, 8, 3), torch.randn(1, 4, 8, 8))


def test_a_module_without_tensors_runs_on_the_cpu() -> None:
    assert device_of(nn.ReLU()) == torch.device("cpu")
    assert device_of(nn.BatchNorm2d(3, affine=False, device="meta")) == torch.device("meta")
    assert forward_ms(nn.ReLU(), torch.randn(4), seconds=QUICK) > 0


def test_times_add_up_where_all_are_known() -> None:
    timed, untimed = Cost(params=1, latency_ms=2.0), Cost(params=1)
    assert timed + timed == Cost(params=2, latency_ms=4.0)
    assert timed - timed == Cost(latency_ms=0.0)
    assert (timed + untimed).latency_ms is None
    assert (untimed - timed).latency_ms is None
    assert sum([timed, timed], Cost()).latency_ms == 4.0
    assert Cost() + Cost() == Cost() - Cost() == Cost()
    assert timed - Cost() == timed
    assert (Cost(latency_ms=0.0) + timed).latency_ms == 2.0
