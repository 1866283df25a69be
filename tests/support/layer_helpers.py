"""What tests of the DDF layers share: golden cases, hooks, the decisions made for CUDA tensors."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ddf_convert import ops, reference
from ddf_convert.layers import SpatialFilterNorm, base, ddf_up
from ddf_convert.layers import ddf as ddf_module
from ddf_convert.layers.ddf import operator_can_normalize
from support.paths import DATA

LAYOUTS = [torch.contiguous_format, torch.channels_last]
ON_CUDA = SimpleNamespace(is_cuda=True)  # stands for a tensor
_GOLDEN = DATA / "golden"


class Doubled(SpatialFilterNorm):
    """A FilterNorm of another class."""

    def forward(self, filters: Tensor) -> Tensor:
        return 2 * super().forward(filters)


def golden_cases(module: str) -> list[dict[str, Any]]:
    """Outputs of the authors' implementation of a layer."""
    return [case for case in json.loads((_GOLDEN / "index.json").read_text()) if case["module"] == module]


def golden_layer(layer: type[nn.Module], case: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    """The layer with the authors' weights, its input, and their output."""
    tensors = load_file(_GOLDEN / case["file"])
    made = layer(**case["kwargs"], dtype=torch.float64)
    weights = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    made.load_state_dict(weights, strict=True)
    return made, tensors["input.0"], tensors["output"]


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets layers call the reference instead of the kernels."""

    def by_reference(*tensors: Tensor, norm_scale: None, **options: Any) -> Tensor:
        return reference.forward(*tensors, reference.Geometry(**options))

    for module in (base, ddf_up):
        monkeypatch.setattr(module, "ddf", by_reference)


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, must_normalize: bool = True) -> None:
    """Lets layers decide as for CUDA tensors.

    Args:
        monkeypatch: Undoes it.
        must_normalize: Calls whose FilterNorm is not left to the operator fail.
    """

    def normalized_ddf(*tensors: Tensor, norm_scale: float | None, **options: Any) -> Tensor:
        assert norm_scale is not None
        return ops.ddf(*tensors, norm_scale=norm_scale, **options)

    for module in (ddf_module, ddf_up):
        monkeypatch.setattr(
            module, "operator_can_normalize", lambda branch, input: operator_can_normalize(branch, ON_CUDA)
        )
    if must_normalize:
        for module in (base, ddf_up):
            monkeypatch.setattr(module, "ddf", normalized_ddf)


def with_hooks(layer: nn.Module) -> nn.Module:
    """A copy with hooks everywhere, whose branches therefore run module by module."""
    layer = copy.deepcopy(layer)
    for module in layer.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    return layer


def forward_and_backward(layer: nn.Module, *inputs: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of inputs (those that are not None) and parameters."""
    tensors = [input.detach().requires_grad_() for input in inputs if input is not None]
    output = layer(*tensors)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, [*tensors, *layer.parameters()], grad)]
