"""The reference is the specification: it is held against the definition, written out."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddf_convert import reference
from ddf_convert.ops import output_size


def by_definition(
    input: Tensor, channel: Tensor, spatial: Tensor, stride: int, padding: int, dilation: int, combine: str
) -> Tensor:
    """Every window unfolded, every combined filter stored: what the package itself never does."""
    batch, channels = input.shape[:2]
    size = channel.shape[-1]
    height, width = spatial.shape[-2:]
    windows = F.unfold(input, size, dilation, padding, stride).view(batch, channels, size**2, height, width)
    heads = spatial.shape[1] // size**2
    per_pixel = spatial.view(batch, heads, size**2, height, width).repeat_interleave(channels // heads, 1)
    per_channel = channel.view(batch, channels, size**2, 1, 1)
    filters = per_channel * per_pixel if combine == "mul" else per_channel + per_pixel
    return (windows * filters).sum(2)


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("size", [1, 3, 5])
def test_reference_is_the_definition(combine: str, size: int) -> None:
    torch.manual_seed(0)
    for stride, dilation, heads, padding in itertools.product((1, 2, 3), (1, 2), (1, 4), (0, size // 2, size)):
        rows, columns = (output_size(side, size, stride, padding, dilation) for side in (9, 11))
        tensors = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in ((2, 8, 9, 11), (2, 8, size, size), (2, heads * size**2, rows, columns))
        ]
        geometry = reference.Geometry(stride, padding, dilation, combine)
        expected = by_definition(*tensors, *geometry[:4])
        torch.testing.assert_close(reference.forward(*tensors, geometry), expected)
        grad = torch.randn_like(expected)
        gradients = reference.backward(grad, *tensors, geometry, (True, True, True))
        for ours, theirs in zip(gradients, torch.autograd.grad(expected, tensors, grad), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("taps", [9, 25])
def test_filter_norm_is_the_definition(taps: int, heads: int) -> None:
    torch.manual_seed(0)
    filters = (torch.randn(2, heads * taps, 3, 4, dtype=torch.float64) * 7 + 3).requires_grad_()
    by_head = filters.unflatten(1, (heads, taps))
    deviation = by_head.std(2, keepdim=True)
    expected = (0.7 * (by_head - by_head.mean(2, keepdim=True)) / (deviation + 1e-10)).flatten(1, 2)
    torch.testing.assert_close(reference.filter_norm(filters, taps, 0.7), expected)
    grad, cotangent = torch.randn_like(filters), torch.randn_like(filters)
    (by_autograd,) = torch.autograd.grad(expected, filters, grad, create_graph=True)
    torch.testing.assert_close(reference.filter_norm_backward(grad, filters, taps, 0.7), by_autograd)
    (second,) = torch.autograd.grad(by_autograd, filters, cotangent)
    ours = reference.filter_norm_second_backward(cotangent, grad, filters, taps, 0.7)
    torch.testing.assert_close(ours, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e-3, 12345.6, 1e-30])
def test_filters_of_equal_taps_are_zeros(value: float, dtype: torch.dtype) -> None:
    """Whatever rounding the mean of nine equal numbers would have: divided by their deviation, it would be noise."""
    filters = torch.full((1, 9, 2, 2), value, dtype=dtype)
    grad, cotangent = torch.randn(2, 1, 9, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(reference.filter_norm(filters, 9, 1.0), torch.zeros(1, 9, 2, 2).to(reference_dtype(dtype)))
    gradient = reference.filter_norm_backward(grad, filters, 9, 1.0)
    centered = grad.to(gradient.dtype) - grad.to(gradient.dtype).mean(1, keepdim=True)
    torch.testing.assert_close(gradient, centered * 1e10)
    assert reference.filter_norm_second_backward(cotangent, grad, filters, 9, 1.0).isfinite().all()


def reference_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype is torch.bfloat16 else dtype


def test_special_cases_of_the_paper() -> None:
    torch.manual_seed(0)
    input, channel = torch.randn(2, 6, 8, 8).double(), torch.randn(2, 6, 3, 3).double()
    ones = torch.ones(2, 9, 8, 8).double()
    # A spatial filter of ones: a depthwise convolution with weights of each image's own.
    output = reference.forward(input, channel, ones, reference.Geometry(padding=1))
    for image in range(2):
        expected = F.conv2d(input[image : image + 1], channel[image, :, None], padding=1, groups=6)
        torch.testing.assert_close(output[image : image + 1], expected)
    # A channel filter of ones: every channel of a head sees the same filter at a pixel.
    spatial = torch.randn(2, 9, 8, 8).double()
    same = input[:, :1].expand(2, 6, 8, 8)
    output = reference.forward(same, torch.ones_like(channel), spatial, reference.Geometry(padding=1))
    torch.testing.assert_close(output, output[:, :1].expand_as(output))
