"""FilterNorm, the branches, DDF2d and DDFConv2d."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

from ddf_convert import reference
from ddf_convert.layers import ChannelFilterNorm, DDF2d, DDFConv2d, SpatialFilterNorm
from ddf_convert.layers import ddf as ddf_module

GOLDEN = Path(__file__).parent / "data" / "golden"
CASES = [case for case in json.loads((GOLDEN / "index.json").read_text()) if case["module"] == "DDF2d"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_reference(input: Tensor, channel: Tensor, spatial: Tensor, **options: object) -> Tensor:
    return reference.forward(input, channel, spatial, *(options[name] for name in options))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_golden(case: dict, backend: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr(ddf_module, "ddf", by_reference)
    tensors = load_file(GOLDEN / case["file"])
    layer = DDF2d(**case["kwargs"], dtype=torch.float64)
    weights = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    layer.load_state_dict(weights, strict=True)
    output = layer(tensors["input.0"].to(memory_format=layout))
    assert (output - tensors["output"]).abs().max() <= 1e-10


def test_three_golden_cases_are_there() -> None:
    assert len(CASES) == 3


def test_spatial_filter_norm() -> None:
    norm = SpatialFilterNorm(3, "relu")
    filters = torch.randn(2, 18, 4, 5, dtype=torch.float64) * 7 + 3
    normalised = norm(filters).unflatten(1, (2, 9))
    scale = math.sqrt(2) / 3
    torch.testing.assert_close(normalised.mean(2), torch.zeros(2, 2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(normalised.std(2), torch.full((2, 2, 4, 5), scale, dtype=torch.float64))
    assert not list(norm.state_dict())


def test_channel_filter_norm() -> None:
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
def test_filters_are_normalised_in_float32(dtype: torch.dtype) -> None:
    constant = torch.full((1, 9, 2, 2), 3.0, dtype=dtype)  # deviation 0: in half precision the epsilon would be 0 too
    assert torch.equal(SpatialFilterNorm(3)(constant), torch.zeros_like(constant))
    assert SpatialFilterNorm(3)(torch.randn(1, 9, 2, 2).to(dtype)).dtype == dtype


def test_constant_filters_have_finite_gradients() -> None:
    filters = torch.full((1, 9, 2, 2), 3.0, requires_grad=True)
    SpatialFilterNorm(3)(filters).square().sum().backward()
    assert filters.grad is not None
    assert filters.grad.isfinite().all()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 7, 20, 33])
def test_any_channel_count(channels: int) -> None:
    layer = DDF2d(channels)
    assert layer.channel_branch[1].out_channels == max(1, int(channels * 0.2))
    output = layer(torch.randn(2, channels, 6, 5, requires_grad=True))
    output.sum().backward()
    assert output.shape == (2, channels, 6, 5)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


SHAPES = list(itertools.product((1, 2, 3, 4), (None, 0, 1, 3, "same"), (1, 2), (3, 5)))


@pytest.mark.parametrize(("stride", "padding", "dilation", "size"), SHAPES, ids=str)
def test_sizes_are_those_of_a_convolution(stride: int, padding: int | str | None, dilation: int, size: int) -> None:
    layer = DDF2d(4, size, stride, padding, dilation)
    if padding == "same":
        conv: nn.Module = Conv2dSame(4, 4, size, stride, dilation=dilation)
    else:
        pixels = dilation * (size // 2) if padding is None else padding
        conv = nn.Conv2d(4, 4, size, stride, pixels, dilation)
    for sides in ((9, 9), (10, 13), (11, 16)):
        input = torch.randn(1, 4, *sides)
        assert layer(input).shape == conv(input).shape


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_filters_stay_at_their_pixels_whatever_the_padding(stride: int) -> None:
    """Less padding crops the output, more surrounds it: the spatial filter of a pixel is still predicted there."""
    layers = [DDF2d(4, stride=stride, padding=padding) for padding in (1, 1 + stride)]
    layers[1].load_state_dict(layers[0].state_dict())
    input = torch.randn(1, 4, 12, 15)
    usual, more = (layer(input) for layer in layers)
    torch.testing.assert_close(more[:, :, 1 : 1 + usual.shape[2], 1 : 1 + usual.shape[3]], usual)
    if stride == 1:
        none = DDF2d(4, padding=0)
        none.load_state_dict(layers[0].state_dict())
        torch.testing.assert_close(none(input), usual[:, :, 1:-1, 1:-1])


def test_same_padding_is_tensorflows() -> None:
    """On even sizes with stride 2, SAME pads below and to the right only: as padding by hand, then none."""
    layer, bare = DDF2d(4, stride=2, padding="same"), DDF2d(4, stride=2, padding=1)
    bare.load_state_dict(layer.state_dict())
    input = torch.randn(1, 4, 8, 10)
    channel = layer.channel_branch(input)
    spatial = layer.spatial_branch[1](
        nn.functional.conv2d(input[:, :, 1:, 1:], *layer.spatial_branch[0].parameters(), 2)
    )
    padded = nn.functional.pad(input, (0, 1, 0, 1))
    torch.testing.assert_close(layer(input), reference.forward(padded, channel, spatial, 2, 0, 1, "mul"))
    assert not torch.allclose(layer(input), bare(input))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    layer, zeros = DDF2d(4, padding_mode=mode), DDF2d(4)
    zeros.load_state_dict(layer.state_dict())
    input = torch.randn(1, 4, 6, 7)
    padded = nn.functional.pad(input, (1, 1, 1, 1), mode=mode)
    expected = reference.forward(padded, layer.channel_branch(input), layer.spatial_branch(input), 1, 0, 1, "mul")
    torch.testing.assert_close(layer(input), expected)
    torch.testing.assert_close(layer(input)[:, :, 1:-1, 1:-1], zeros(input)[:, :, 1:-1, 1:-1])


def test_bias() -> None:
    layer, without = DDF2d(4, bias=True), DDF2d(4)
    assert set(layer.state_dict()) - set(without.state_dict()) == {"bias"}
    nn.init.normal_(layer.bias)
    without.load_state_dict(layer.state_dict(), strict=False)
    input = torch.randn(1, 4, 6, 7)
    torch.testing.assert_close(layer(input), without(input) + layer.bias.view(1, -1, 1, 1))


def test_ddf_conv_mixes_channels() -> None:
    layer = DDFConv2d(8, 12, stride=2, groups=2, bias=True, se_ratio=0.5)
    assert layer(torch.randn(2, 8, 7, 7)).shape == (2, 12, 4, 4)
    assert (layer.in_channels, layer.out_channels) == (8, 12)
    assert {name.split(".")[0] for name in layer.state_dict()} == {"ddf", "mix"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = DDF2d(8).to(dtype)
    input = torch.randn(2, 8, 7, 7).to(dtype)
    output = layer(input)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), layer.double()(input.double()), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    layer = DDF2d(8)
    with torch.autocast("cpu", dtype):
        output = layer(torch.randn(2, 8, 7, 7))
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_channels_last_stays() -> None:
    layer = DDF2d(8).to(memory_format=torch.channels_last)
    output = layer(torch.randn(2, 8, 7, 7).to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    layer = DDF2d(8, stride=2)
    input = torch.randn(2, 8, 9, 9, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input))
    compiled(input).sum().backward()
    assert input.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "heads must divide in_channels"),
        ({"heads": 3}, "heads must divide in_channels, got 3 heads and 8 channels"),
        ({"kernel_size": 4}, "odd kernel size of 3 or more, got 4"),
        ({"kernel_size": 1}, "odd kernel size of 3 or more, got 1"),
        ({"stride": 0}, "stride and dilation must be 1 or more"),
        ({"padding": -1}, "must not be negative"),
        ({"padding": "valid"}, "number of pixels, None or 'same', got 'valid'"),
        ({"combine": "max"}, "one of mul, add, got 'max'"),
        ({"padding_mode": "mirror"}, "got 'mirror'"),
        ({"se_ratio": 0}, "se_ratio must be above 0"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDF2d(**{"in_channels": 8, **options})
