"""DDFUp2d: guides, fixed filters, fused branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.layer_helpers import LAYOUTS, Doubled, forward_and_backward, pretend_cuda, with_hooks
from support.tolerances import far
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from ddf_convert import ops
from ddf_convert.layers import DDFUp2d, SpatialFilterNorm


def one_by_one(layer: DDFUp2d, input: Tensor, guide: Tensor | None = None) -> Tensor:
    """DDF-Up as the paper draws it: each branch by itself, then pixel shuffle."""
    padding = layer.dilation[0] * (layer.kernel_size[0] - 1) // 2
    maps = [
        ops.ddf(
            input,
            channel(input),
            spatial(input if guide is None else guide),
            padding=padding,
            dilation=layer.dilation[0],
            combine=layer.combine,
        )
        for channel, spatial in zip(layer.channel_branch, layer.spatial_branch, strict=True)
    ]
    return F.pixel_shuffle(torch.stack(maps, 2).flatten(1, 2), layer.scale_factor)


OPTIONS = [
    {},
    {"scale_factor": 3, "kernel_size": 5, "heads": 2, "combine": "add", "bias": True},
    {"guide_channels": 5, "dilation": 2},
    {"affine": True, "padding_mode": "replicate", "se_ratio": 1.0},
    {"affine": True, "guide_channels": 3, "heads": 4, "combine": "add"},
]


def inputs(layer: DDFUp2d, dtype: torch.dtype = torch.float64, layout: Any = torch.contiguous_format) -> list[Any]:
    input = torch.randn(2, layer.in_channels, 5, 6).to(dtype, memory_format=layout)
    guide = None if layer.guide_channels is None else torch.randn(2, layer.guide_channels, 5, 6).to(dtype)
    return [input, guide]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_branches_equal_single_branches(
    options: dict, inside: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DDFUp2d(8, **options, dtype=torch.float64)
    made = inputs(layer, layout=layout)
    expected = forward_and_backward(with_hooks(layer), *made)
    if not options.get("bias") and "padding_mode" not in options:
        torch.testing.assert_close(expected[0], one_by_one(layer, *made))
    if inside and not options.get("affine"):
        pretend_cuda(monkeypatch)
    for ours, theirs in zip(forward_and_backward(layer, *made), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_gradcheck(combine: str) -> None:
    layer = DDFUp2d(2, combine=combine, guide_channels=3, dtype=torch.float64)
    made = [torch.randn(1, channels, 3, 2, dtype=torch.float64, requires_grad=True) for channels in (2, 3)]
    assert gradcheck(layer, made, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.long), {"guide_channels": 3, "affine": True}], ids=str
)
def test_compiles_without_graph_breaks(options: dict) -> None:
    layer = DDFUp2d(4, **options)
    made = inputs(layer, torch.float32)
    compiled = torch.compile(layer, fullgraph=True)
    for ours, theirs in zip(forward_and_backward(compiled, *made), forward_and_backward(layer, *made), strict=True):
        torch.testing.assert_close(ours, theirs, **far(torch.float32, theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"affine": True, "padding_mode": "replicate", "guide_channels": 3}], ids=str)
def test_half_types_train(options: dict, dtype: torch.dtype) -> None:
    layer = DDFUp2d(8, **options)
    made = inputs(layer, torch.float32)
    exact = layer(*made)
    with torch.autocast("cpu", dtype):
        mixed = layer(*made)
    assert mixed.dtype == dtype
    assert (mixed.float() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()  # the layer rounds four times
    mixed.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    pure = layer.to(dtype)(*(None if tensor is None else tensor.to(dtype) for tensor in made))
    assert pure.dtype == dtype
    assert (pure.float() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def interpolation(factor: int, mode: str, size: int) -> Tensor:
    """The (s*s, 1, K, K) filters of an interpolation: its answers to single pixels."""
    pixels = torch.eye(size * size, dtype=torch.float64).view(size * size, 1, size, size)
    middle = size // 2 * factor
    cell = F.interpolate(pixels, scale_factor=factor, mode=mode)[
        :, 0, middle : middle + factor, middle : middle + factor
    ]
    return cell.flatten(1).t().reshape(factor**2, 1, size, size)


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize(("mode", "factor", "size"), [("nearest", 2, 3), ("bilinear", 3, 3), ("bicubic", 2, 5)])
def test_fixed_filters_are_an_interpolation(mode: str, factor: int, size: int, combine: str) -> None:
    options = {"affine": True, "combine": combine, "padding_mode": "replicate", "dtype": torch.float64}
    layer = DDFUp2d(4, factor, size, **options)
    layer.fix(interpolation(factor, mode, size).expand(-1, 4, -1, -1))
    input = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(input), F.interpolate(input, scale_factor=factor, mode=mode))
    with pytest.raises(ValueError, match="affine=True can be fixed"):
        DDFUp2d(4).fix(torch.zeros(4, 4, 3, 3))


def test_a_fixed_layer_learns() -> None:
    layer = DDFUp2d(4, affine=True, se_ratio=4.0)  # wide enough that no squeeze is all zeros after its ReLU
    layer.fix(torch.randn(4, 4, 3, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    input, target = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 10, 10)
    losses = []
    for _ in range(3):
        loss = (layer(input) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())


def test_stacked_layers_reach_large_factors() -> None:
    output = nn.Sequential(*(DDFUp2d(2) for _ in range(4)))(torch.randn(1, 2, 3, 2))
    assert output.shape == (1, 2, 48, 32)
    assert output.isfinite().all()


def test_output_size_resizes_to_the_nearest_pixel() -> None:
    layer, input = DDFUp2d(3), torch.randn(1, 3, 13, 4)
    whole = layer(input)
    assert torch.equal(layer(input, output_size=(26, 8)), whole)
    resized = layer(input, output_size=(25, 7))
    assert torch.equal(resized, F.interpolate(whole, size=(25, 7)))


def test_flops_are_those_of_single_branches() -> None:
    layer, input = DDFUp2d(8), torch.randn(1, 8, 5, 6)
    with FlopCounterMode(display=False) as counter:
        layer(input)
    depthwise, pointwise = 4 * 9 * 8 * 30, 4 * 8 * 9 * 30
    channel = 4 * (8 * 4 + 4 * 72)
    operator = 9 * 8 * 120
    assert counter.get_total_flops() == 2 * (depthwise + pointwise + channel + operator)


CHANGES: dict[str, Callable[[DDFUp2d], object]] = {
    "another depthwise conv": lambda layer: layer.spatial_branch[1].__setitem__(0, nn.Conv2d(4, 4, 3, padding=1)),
    "a dilated depthwise conv": lambda layer: layer.spatial_branch[1].__setitem__(
        0, nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4)
    ),
    "no bias": lambda layer: layer.spatial_branch[0][1].__setitem__(0, nn.Conv2d(4, 9, 1, bias=False)),
    "another norm": lambda layer: layer.spatial_branch[2][1].__setitem__(1, Doubled(3)),
    "a longer branch": lambda layer: layer.spatial_branch[3].append(nn.Hardtanh()),
    "a hook": lambda layer: layer.spatial_branch[3][1].register_forward_hook(lambda m, i, output: 2 * output),
    "an affine norm": lambda layer: layer.spatial_branch[0][1].__setitem__(1, SpatialFilterNorm(3, affine=True)),
    "a narrower squeeze": lambda layer: (
        layer.channel_branch[0].__setitem__(1, nn.Conv2d(4, 2, 1)),
        layer.channel_branch[0].__setitem__(3, nn.Conv2d(2, 36, 1)),
    ),
    "a hook of a channel branch": lambda layer: layer.channel_branch[2].register_forward_hook(
        lambda m, i, output: 2 * output
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_branches_are_not_fused(change: str) -> None:
    layer, input = DDFUp2d(4), torch.randn(2, 4, 6, 5)
    CHANGES[change](layer)
    torch.testing.assert_close(layer(input), one_by_one(layer, input))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "heads must divide in_channels"),
        ({"heads": 3}, "got 3 heads and 8 channels"),
        ({"scale_factor": 1}, "whole number from 2 on, got 1"),
        ({"scale_factor": 2.5}, "whole number from 2 on, got 2.5"),
        ({"guide_channels": 0}, "guide_channels must be 1 or more"),
        ({"kernel_size": 4}, "odd kernel size of 3 or more, got 4"),
        ({"dilation": 0}, "dilation must be 1 or more"),
        ({"combine": "max"}, "one of mul, add, got 'max'"),
        ({"padding_mode": "mirror"}, "got 'mirror'"),
        ({"se_ratio": 0}, "se_ratio must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDFUp2d(**{"in_channels": 8, **options})


def test_wrong_guides_are_refused() -> None:
    input, guide = torch.randn(1, 4, 5, 6), torch.randn(1, 3, 5, 6)
    with pytest.raises(ValueError, match="takes no guide"):
        DDFUp2d(4)(input, guide)
    layer = DDFUp2d(4, guide_channels=3)
    with pytest.raises(ValueError, match="needs a guide of 3 channels"):
        layer(input)
    with pytest.raises(ValueError, match=r"guide must be .*\(1, 3, 5, 6\).*got \(1, 3, 10, 12\)"):
        layer(input, torch.randn(1, 3, 10, 12))
