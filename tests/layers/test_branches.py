"""FilterNorm, the spatial and the channel branch, and when their shortcuts are taken."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.layer_helpers import ON_CUDA, Doubled, pretend_cuda
from torch import Tensor, nn

from ddf_convert.layers import ChannelBranch, ChannelFilterNorm, DDF2d, SpatialFilterNorm
from ddf_convert.layers.ddf import operator_can_normalize


def test_spatial_filter_norm_standardizes_each_head() -> None:
    norm = SpatialFilterNorm(3, "relu")
    filters = torch.randn(2, 18, 4, 5, dtype=torch.float64) * 7 + 3
    normalized = norm(filters).unflatten(1, (2, 9))
    scale = math.sqrt(2) / 3
    torch.testing.assert_close(normalized.mean(2), torch.zeros(2, 2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(normalized.std(2), torch.full((2, 2, 4, 5), scale, dtype=torch.float64))
    assert not list(norm.state_dict())


def test_channel_filter_norm_scales_and_shifts() -> None:
    norm = ChannelFilterNorm(6, 3, "relu", shift=True).double()
    filters = torch.randn(2, 54, 1, 1, dtype=torch.float64) * 7 + 3
    torch.nn.init.normal_(norm.mean)
    plain = filters.view(2, 6, 9)
    expected = (plain - plain.mean(2, keepdim=True)) / plain.std(2, keepdim=True) * norm.std.view(6, 9)
    torch.testing.assert_close(norm(filters), (expected + norm.mean.view(6, 9)).view(2, 6, 3, 3))
    assert set(norm.state_dict()) == {"std", "mean"}
    assert set(ChannelFilterNorm(6, 3).state_dict()) == {"std"}


def test_the_learned_scale_starts_at_the_base_scale() -> None:
    drawn = ChannelFilterNorm(20_000, 3, "relu").std
    assert drawn.std().item() == pytest.approx(math.sqrt(2) / 3, rel=0.01)
    assert drawn.mean().abs().item() < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_filters_are_normalized_in_float32(dtype: torch.dtype) -> None:
    constant = torch.full((1, 9, 2, 2), 3.0, dtype=dtype)  # deviation 0: in half precision the epsilon would be 0 too
    assert torch.equal(SpatialFilterNorm(3)(constant), torch.zeros_like(constant))
    assert SpatialFilterNorm(3)(torch.randn(1, 9, 2, 2).to(dtype)).dtype == dtype


def test_constant_filters_have_finite_gradients() -> None:
    filters = torch.full((1, 9, 2, 2), 3.0, requires_grad=True)
    SpatialFilterNorm(3)(filters).square().sum().backward()
    assert filters.grad is not None
    assert filters.grad.isfinite().all()


def doubled_forward(branch: nn.Sequential) -> None:
    forward = branch[-1].forward
    branch[-1].forward = lambda filters: 2 * forward(filters)  # as accelerate's hooks do it


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "forward hook": lambda branch: branch[-1].register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward hook of the branch": lambda branch: branch.register_forward_hook(
        lambda module, inputs, output: 2 * output
    ),
    "added module": lambda branch: branch.append(nn.Hardtanh()),
    "own forward": doubled_forward,
    "replaced module": lambda branch: branch.__setitem__(-1, nn.Sequential(branch[-1], nn.Hardtanh())),
}


@pytest.mark.parametrize("change", [*CHANGES, "subclass"])
def test_changed_spatial_branches_take_no_shortcut(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DDF2d(4)
    input = torch.randn(2, 4, 6, 5)
    assert operator_can_normalize(layer.spatial_branch, ON_CUDA)
    assert not operator_can_normalize(layer.spatial_branch, input)
    if change == "subclass":
        layer.spatial_branch[1] = Doubled(3, "relu")
    else:
        CHANGES[change](layer.spatial_branch)
    assert not operator_can_normalize(layer.spatial_branch, ON_CUDA)
    expected = layer(input)
    pretend_cuda(monkeypatch, must_normalize=False)
    assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_spatial_branch_are_called(kind: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DDF2d(4)
    pretend_cuda(monkeypatch, must_normalize=False)
    calls: list[nn.Module] = []
    getattr(layer.spatial_branch[place], f"register_{kind}_hook")(lambda module, *arguments: calls.append(module))
    layer(torch.randn(2, 4, 6, 5, requires_grad=True)).sum().backward()
    assert calls == [layer.spatial_branch[place]]
    assert operator_can_normalize(layer.spatial_branch, ON_CUDA) == (place == 0)


@pytest.mark.parametrize("place", range(5))
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_channel_branch_are_called(kind: str, place: int) -> None:
    branch = ChannelBranch(10, 3)
    branch[2].inplace = False  # torch's own rule for backward hooks
    calls: list[nn.Module] = []
    getattr(branch[place], f"register_{kind}_hook")(lambda module, *arguments: calls.append(module))
    branch(torch.randn(2, 10, 6, 5, requires_grad=True)).sum().backward()
    assert calls == [branch[place]]


def test_hooks_of_all_modules_are_called() -> None:
    layer = DDF2d(4)
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.append(module))
    try:
        assert not operator_can_normalize(layer.spatial_branch, ON_CUDA)
        layer(torch.randn(2, 4, 6, 5))
    finally:
        hook.remove()
    assert set(seen) == set(layer.modules())


@pytest.mark.parametrize(
    ("place", "other"),
    [
        (0, nn.AdaptiveMaxPool2d(1)),
        (0, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2))),
        (1, nn.Conv2d(8, 8, 1, groups=4)),
        (1, nn.Sequential(nn.Conv2d(8, 8, 1), nn.Sigmoid())),
        (1, torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
        (2, nn.GELU()),
        (3, nn.Conv2d(8, 72, 3, padding=1)),
        (4, ChannelFilterNorm(8, 3, shift=True)),
    ],
    ids=str,
)
def test_changed_channel_branches_take_no_shortcut(place: int, other: nn.Module) -> None:
    branch = ChannelBranch(8, 3, se_ratio=1.0)
    input = torch.randn(2, 8, 6, 5) + 1
    usual = branch(input)
    if place == 4:
        nn.init.ones_(other.mean)
    branch[place] = other
    expected: Tensor = input
    for module in branch:
        expected = module(expected)
    torch.testing.assert_close(branch(input), expected)
    assert not torch.allclose(branch(input), usual)


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7)])
def test_channel_branch_launches_six_kernels(sizes: tuple[int, int]) -> None:
    calls: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append(function.name())
            return function(*args, **(kwargs or {}))

    branch, input = ChannelBranch(10, 3), torch.randn(2, 10, *sizes)
    with torch.no_grad(), Watch():
        branch(input)
    launches = [name for name in calls if name not in ("aten::view", "aten::t")]
    assert launches == [
        "aten::mean.dim",
        "aten::addmm",
        "aten::relu_",
        "aten::addmm",
        "ddf_convert::filter_norm",
        "aten::mul.Tensor",
    ]
