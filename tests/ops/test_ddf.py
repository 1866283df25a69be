"""The operator's contract: registration, gradients, compile, autocast, layouts, arguments."""

from __future__ import annotations

import itertools
import sys
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import ddf_convert
from ddf_convert import ops, reference
from ddf_convert.ops.ddf import BACKENDS
from ddf_convert.reference import Geometry

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def tensors(
    size: int = 3,
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    heads: int = 1,
    shape: tuple[int, int, int, int] = (2, 8, 7, 9),
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    grad: bool = False,
    upscale: int = 1,
) -> list[Tensor]:
    batch, channels, *sides = shape
    rows, columns = (ops.output_size(side, size, stride, padding, dilation) for side in sides)
    made = [
        torch.randn(shape).to(dtype, memory_format=LAYOUTS[layout]),
        torch.randn(batch, upscale**2 * channels, size, size).to(dtype),
        torch.randn(batch, upscale**2 * heads * size**2, rows, columns).to(dtype, memory_format=LAYOUTS[layout]),
    ]
    return [tensor.requires_grad_(grad) for tensor in made]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


# What a result may differ from the float64 reference, relative to its norm: rounding of the type, of sums in float32.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_like_reference(made: list[Tensor], geometry: Geometry) -> None:
    output = torch.ops.ddf_convert.ddf(*made, *geometry)
    layout = ops.memory_format(made[0])
    grad = torch.randn(output.shape).to(output.dtype, memory_format=layout)
    gradients = torch.ops.ddf_convert.ddf_backward(grad, *made, [True] * 3, *geometry)
    for map in (output, gradients[0], gradients[2]):
        assert map.is_contiguous(memory_format=layout)
    exact = [tensor.double() for tensor in made]
    expected = [reference.forward(*exact, geometry)]
    expected += reference.backward(grad.double(), *exact, geometry, (True, True, True))
    for ours, theirs in zip((output, *gradients), expected, strict=True):
        assert ours.dtype == made[0].dtype
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error <= TOLERANCES[ours.dtype], (float(error), geometry, [tuple(tensor.shape) for tensor in made])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, pytest.param(7, marks=pytest.mark.long)])
def test_cpu_kernels_match_the_reference(size: int, dtype: torch.dtype, layout: str) -> None:
    sides = ((7, 7), (1, 1), (10, 33))
    strides = (1, 2, 3) if dtype is torch.float64 else (1, 2)
    for stride, dilation, heads, shape in itertools.product(strides, (1, 2), (1, 4), sides):
        # Alternated, not multiplied: 12 channels of 4 heads leave vectors half filled, 64 of one head fill them.
        combine = ("mul", "add")[(stride + dilation + heads) % 2]
        channels = 12 if heads > 1 else (12, 32)[stride % 2]
        for padding in {dilation * (size - 1) // 2, 0, size}:
            if min(ops.output_size(side, size, stride, padding, dilation) for side in shape) > 0:
                made = tensors(size, stride, padding, dilation, heads, (2, channels, *shape), dtype, layout)
                assert_like_reference(made, Geometry(stride, padding, dilation, combine))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_cpu_kernels_match_the_reference_at_real_sizes(combine: str, layout: str) -> None:
    for shape, heads, stride in (
        ((1, 256, 56, 56), 1, 1),
        ((2, 600, 14, 14), 2, 2),
        ((1, 8, 113, 57), 8, 1),
        ((1, 240, 5, 400), 1, 1),
    ):
        made = tensors(3, stride, 1, 1, heads, shape, torch.float32, layout)
        assert_like_reference(made, Geometry(stride, 1, 1, combine))


# (size, upscale, stride, padding, dilation, heads, shape)
UPSCALED = [
    (3, 2, 1, 1, 1, 1, (2, 8, 5, 6)),
    (5, 3, 1, 2, 1, 2, (1, 6, 7, 9)),
    (3, 2, 1, 2, 2, 4, (2, 32, 13, 17)),
    (3, 4, 1, 1, 1, 1, (1, 40, 6, 33)),
    (3, 2, 2, 1, 1, 1, (1, 3, 9, 8)),
    (3, 2, 1, 0, 1, 1, (2, 16, 4, 41)),
    (1, 2, 1, 0, 1, 1, (1, 1, 1, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_upscaling_cpu_kernels_match_the_reference(dtype: torch.dtype, layout: str) -> None:
    for number, (size, upscale, stride, padding, dilation, heads, shape) in enumerate(UPSCALED):
        made = tensors(size, stride, padding, dilation, heads, shape, dtype, layout, upscale=upscale)
        assert_like_reference(made, Geometry(stride, padding, dilation, ("mul", "add")[number % 2], upscale))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upscaling_is_each_filter_by_itself_then_pixel_shuffle(layout: str) -> None:
    input, channel, spatial = tensors(heads=2, layout=layout, upscale=3)
    each = [
        ops.ddf(input, *filters, padding=1)
        for filters in zip(channel.chunk(9, 1), (part.contiguous() for part in spatial.chunk(9, 1)), strict=True)
    ]
    expected = torch.pixel_shuffle(torch.stack(each, 2).flatten(1, 2), 3)
    torch.testing.assert_close(ops.ddf(input, channel, spatial, padding=1, upscale_factor=3), expected)
    torch.testing.assert_close(reference.unshuffle(reference.shuffle(channel, 3), 3), channel)


@pytest.mark.slow
@pytest.mark.parametrize(("combine", "layout"), [("mul", "contiguous"), ("add", "channels_last")])
def test_upscaling_has_gradients_to_any_order(combine: str, layout: str) -> None:
    made = tensors(heads=2, shape=(1, 2, 3, 2), layout=layout, grad=True, upscale=2)

    def call(*tensors: Tensor) -> Tensor:
        return ops.ddf(*tensors, padding=1, combine=combine, upscale_factor=2)

    assert gradcheck(call, made)
    assert gradgradcheck(call, made)

    def normalized(*tensors: Tensor) -> Tensor:
        return ops.ddf(*tensors, norm_scale=0.7, padding=1, combine=combine, upscale_factor=2)

    assert gradcheck(normalized, made, fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_gradcheck(size: int, combine: str, layout: str) -> None:
    for stride, dilation, heads in itertools.product((1, 2, 3), (1, 2), (1, 4)):
        padding = dilation * (size - 1) // 2
        made = tensors(size, stride, padding, dilation, heads, (1, 4, 5, 3), layout=layout, grad=True)

        def call(*tensors: Tensor, options: tuple[Any, ...] = (stride, padding, dilation, combine)) -> Tensor:
            return torch.ops.ddf_convert.ddf(*tensors, *options)

        assert gradcheck(call, made, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_gradients_of_gradients(combine: str, layout: str) -> None:
    made = tensors(3, 2, 1, 1, 2, (1, 4, 5, 3), layout=layout, grad=True)
    assert gradgradcheck(lambda *tensors: ops.ddf(*tensors, stride=2, padding=1, combine=combine), made)


def opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    """Schema, autograd registration, fake tensors, and AOTAutograd with dynamic shapes."""
    dtype = arguments[0].dtype
    # Eager and compiled gradients of half types are compared with their rounding.
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype in (torch.float16, torch.bfloat16) else {}
    assert set(torch.library.opcheck(operator, arguments, **tolerance).values()) == {"SUCCESS"}


# Every dtype and every layout, in two pairs each: what torch checks does not depend on their combination.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "contiguous"),
        (torch.bfloat16, "channels_last"),
        (torch.float64, "channels_last"),
        (torch.float16, "contiguous"),
    ],
    ids=str,
)
def test_opcheck(dtype: torch.dtype, layout: str) -> None:
    operators = torch.ops.ddf_convert
    for geometry, heads, scale in (
        (Geometry(padding=1), 1, None),
        (Geometry(2, 1, 1, "add"), 4, 0.7),
        (Geometry(padding=1, upscale_factor=2), 2, None),
        (Geometry(padding=1, upscale_factor=2), 2, 0.7),
    ):
        made = tensors(3, *geometry[:3], heads, dtype=dtype, layout=layout, grad=True, upscale=geometry.upscale_factor)
        opcheck(operators.ddf, (*made, *geometry, scale))
        if scale is None:
            grad = torch.randn_like(operators.ddf(*made, *geometry).detach()).requires_grad_()
            for needs in ([True, True, True], [True, False, False], [False, True, False]):
                opcheck(operators.ddf_backward, (grad, *made, needs, *geometry))
    grad = torch.randn_like(made[2]).requires_grad_()
    opcheck(operators.filter_norm, (made[2], 9, 0.7))
    opcheck(operators.filter_norm_backward, (grad, made[2], 9, 0.7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("combine", "layout", "scale"),
    [("mul", "contiguous", None), ("add", "channels_last", None), ("mul", "channels_last", 0.7)],
)
def test_compiles_whole_forward_and_backward(combine: str, layout: str, scale: float | None) -> None:
    def call(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return ops.ddf(input.relu(), channel, spatial.sigmoid(), padding=1, combine=combine, norm_scale=scale) * 2

    compiled = torch.compile(call, fullgraph=True)
    made = tensors(dtype=torch.float32, layout=layout, grad=True)
    eager, ours = call(*made), compiled(*made)
    torch.testing.assert_close(ours, eager)
    assert ours.is_contiguous(memory_format=LAYOUTS[layout])
    grad = torch.randn_like(eager)
    for expected, gradient in zip(
        torch.autograd.grad(eager, made, grad), torch.autograd.grad(ours, made, grad), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_current_dtype(dtype: torch.dtype) -> None:
    made = tensors(dtype=torch.float32, grad=True)
    with torch.autocast("cpu", dtype):
        output = ops.ddf(*made, padding=1)
        mixed = ops.ddf(made[0].to(dtype), *made[1:], padding=1)
        exact = ops.ddf(*(tensor.double() for tensor in made), padding=1)
    assert output.dtype == mixed.dtype == dtype
    assert exact.dtype == torch.float64  # as PyTorch's own convolutions
    assert (output.double() - exact).norm() <= 2 * torch.finfo(
        dtype
    ).eps * exact.norm()  # inputs and output are rounded
    output.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in made)


@pytest.mark.parametrize("normalized", [False, True])
def test_flop_counter_counts_the_taps(normalized: bool) -> None:
    made = tensors(5, 2, 2, 1, 2, (2, 8, 9, 11), grad=True)
    with FlopCounterMode(display=False) as counter:
        if normalized:
            output = torch.ops.ddf_convert.ddf(*made, 2, 2, 1, "mul", 1, 0.5)
        else:
            output = torch.ops.ddf_convert.ddf(*made, 2, 2, 1, "mul")
    assert counter.get_total_flops() == 2 * 25 * output.numel()
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 25 * output.numel()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_the_memory_format(layout: str, dtype: torch.dtype) -> None:
    made = tensors(dtype=dtype, layout=layout, grad=True)
    output = ops.ddf(*made, padding=1)
    assert output.is_contiguous(memory_format=LAYOUTS[layout])
    input_grad, _, spatial_grad = torch.autograd.grad(output.sum(), made)
    assert input_grad.is_contiguous(memory_format=LAYOUTS[layout])
    assert spatial_grad.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("shape", [(0, 8, 7, 9), (3, 1, 1, 1), (1, 1, 5, 5), (1, 1, 1, 40), (2, 3, 40, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unusual_shapes(shape: tuple[int, int, int, int], layout: str) -> None:
    made = tensors(shape=shape, layout=layout, grad=True)
    output = ops.ddf(*made, padding=1)
    torch.testing.assert_close(output, reference.forward(*made, Geometry(padding=1)))
    output.sum().backward()
    assert [tensor.grad.shape for tensor in made if tensor.grad is not None] == [tensor.shape for tensor in made]


def test_strided_and_expanded_inputs() -> None:
    whole = torch.randn(2, 12, 10, 14).double()
    odd = [
        whole[:, ::2, 1:8, 2:11],
        torch.randn(1, 1, 3, 3).double().expand(2, 6, 3, 3),
        torch.randn(2, 7, 9, 9).double().permute(0, 3, 1, 2)[:, :, :, :],
    ]
    for transposed in (False, True):
        made = [tensor.transpose(2, 3) if transposed else tensor for tensor in odd]
        plain = [tensor.contiguous() for tensor in made]
        torch.testing.assert_close(ops.ddf(*made, padding=1), ops.ddf(*plain, padding=1))
        grad = torch.ones(1, dtype=torch.float64).expand(made[0].shape)  # as sum() gives it
        gradients = torch.ops.ddf_convert.ddf_backward(grad, *made, [True] * 3, 1, 1, 1, "mul")
        expected = reference.backward(grad, *plain, Geometry(padding=1), (True,) * 3)
        for ours, theirs in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_gradients_only_where_needed(needed: int) -> None:
    made = tensors()
    made[needed].requires_grad_()
    calls: list[list[bool]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.ddf_convert.ddf_backward.default:
                calls.append(args[4])
            return function(*args, **(kwargs or {}))

    with Watch():
        ops.ddf(*made, padding=1).sum().backward()
    assert calls == [[place == needed for place in range(3)]]
    assert [tensor.grad is not None for tensor in made] == calls[0]


@pytest.mark.parametrize("operator", ["ddf", "ddf_backward", "filter_norm", "filter_norm_backward"])
def test_other_devices_take_the_reference(operator: str) -> None:
    table = torch._C._dispatch_dump_table(f"ddf_convert::{operator}")
    kinds = dict(line.split(":", 1) for line in table.splitlines())
    assert "default backend kernel" in kinds["XPU"]
    assert "default backend kernel" in kinds["MPS"]
    assert "default backend kernel" not in kinds["CUDA"]
    assert ("default backend kernel" in kinds["CPU"]) == operator.startswith("filter_norm")
    made = [tensor.to("meta") for tensor in tensors()]
    assert torch.ops.ddf_convert.ddf(*made, 1, 1, 1, "mul").shape == made[0].shape


def replaced(position: int, value: Any) -> dict[str, Any]:
    return {"position": position, "value": value}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"combine": "max"}, ValueError, "combine must be 'mul' or 'add', got 'max'"),
        ({}, {"stride": 0}, ValueError, "stride >= 1"),
        ({}, {"padding": -1}, ValueError, "padding >= 0"),
        ({}, {"upscale_factor": 0}, ValueError, "upscale_factor must be 1 or more, got 0"),
        ({}, {"upscale_factor": 2}, ValueError, r"channel_filter must be \(B, 2\*2\*C, K, K\) = \(2, 32, K, K\)"),
        (replaced(0, torch.randn(8, 7, 9)), {}, ValueError, r"input must be \(B, C, H, W\)"),
        (replaced(1, torch.randn(2, 8, 2, 2)), {}, ValueError, "K odd"),
        (replaced(1, torch.randn(2, 7, 3, 3)), {}, ValueError, r"channel_filter must be .*\(2, 8, K, K\)"),
        (replaced(2, torch.randn(2, 9, 6, 9)), {}, ValueError, r"spatial_filter must be .*G\*9, 7, 9"),
        (replaced(2, torch.randn(2, 27, 7, 9)), {}, ValueError, "G dividing 8 channels"),
        (replaced(1, torch.randn(2, 8, 3, 3).half()), {}, TypeError, "of one dtype"),
        ({}, {"dilation": 9}, ValueError, "too small for kernel 3"),
        (replaced(2, torch.randn(2, 9, 7, 9, device="meta")), {}, ValueError, "on one device, got cpu, cpu, meta"),
    ],
)
def test_wrong_arguments_are_refused(
    change: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = tensors(dtype=torch.float32)
    if change:
        made[change["position"]] = change["value"]
    with pytest.raises(error, match=message):
        ops.ddf(*made, **{"padding": 1, **options})


def test_wrong_gradient_is_refused() -> None:
    made = tensors()
    with pytest.raises(ValueError, match="grad_output must be"):
        torch.ops.ddf_convert.ddf_backward(torch.randn(2, 8, 6, 9).double(), *made, [True] * 3, 1, 1, 1, "mul")


# --- FilterNorm, and DDF with FilterNorm inside -----------------------------------------------------------------------


def assert_normalized_like_its_parts(made: list[Tensor], geometry: Geometry) -> None:
    """Forward and backward against FilterNorm and DDF in float64."""
    made = [tensor.detach().requires_grad_() for tensor in made]
    output = torch.ops.ddf_convert.ddf(*made, *geometry, 0.7)
    grad = torch.randn(output.shape).to(output.dtype)
    gradients = torch.autograd.grad(output, made, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in made]
    normalized = reference.filter_norm(exact[2], made[1].shape[-1] ** 2, 0.7)
    whole = reference.forward(*exact[:2], normalized, geometry)
    expected = (whole, *torch.autograd.grad(whole, exact, grad.double()))
    for ours, theirs in zip((output, *gradients), expected, strict=True):
        assert ours.dtype == made[0].dtype
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error <= 2 * TOLERANCES[ours.dtype], float(error)  # half types: the normalized filter is rounded too


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [3, 5])
def test_normalized_is_filter_norm_and_ddf(size: int, dtype: torch.dtype, layout: str) -> None:
    for combine, stride, dilation, heads in (("mul", 1, 1, 1), ("add", 2, 1, 2), ("mul", 1, 2, 4)):
        padding = dilation * (size - 1) // 2
        made = tensors(size, stride, padding, dilation, heads, (2, 8, 9, 11), dtype, layout)
        assert_normalized_like_its_parts(made, Geometry(stride, padding, dilation, combine))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_reference_does_not_round_normalized_filters(dtype: torch.dtype) -> None:
    made = tensors(dtype=dtype)
    exact = [tensor.double() for tensor in made]
    expected = reference.forward(*exact[:2], reference.filter_norm(exact[2], 9, 0.7), Geometry(padding=1))
    output = reference.forward(*made, Geometry(padding=1), norm_scale=0.7)
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("combine", "layout"), [("mul", "contiguous"), ("add", "channels_last")])
@pytest.mark.parametrize("size", [3, 5])
def test_normalized_gradients(size: int, combine: str, layout: str) -> None:
    made = tensors(size, 1, size // 2, 1, 2, (1, 4, 3, 4), layout=layout, grad=True)

    def call(*tensors: Tensor) -> Tensor:
        return ops.ddf(*tensors, norm_scale=0.7, padding=size // 2, combine=combine)

    assert gradcheck(call, made)
    assert gradgradcheck(call, made, fast_mode=size == 5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("taps", [9, 25])
def test_filter_norm_gradients(taps: int, layout: str) -> None:
    filters = torch.randn(2, 2 * taps, 3, 2, dtype=torch.float64).to(memory_format=LAYOUTS[layout]).requires_grad_()
    grad = torch.randn_like(filters).requires_grad_()

    def gradient(*tensors: Tensor) -> Tensor:
        return torch.ops.ddf_convert.filter_norm_backward(*tensors, taps, 0.7)

    assert gradcheck(lambda filters: ops.filter_norm(filters, taps, 0.7), [filters])
    assert gradgradcheck(lambda filters: ops.filter_norm(filters, taps, 0.7), [filters], fast_mode=taps == 25)
    assert gradgradcheck(gradient, [grad, filters], fast_mode=True)  # the third derivative


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_filter_norm_keeps_dtype_and_memory_format(dtype: torch.dtype, layout: str) -> None:
    filters = torch.randn(2, 18, 5, 4).to(dtype, memory_format=LAYOUTS[layout]).requires_grad_()
    output = ops.filter_norm(filters, 9, 0.7)
    exact = reference.filter_norm(filters.detach().double(), 9, 0.7)
    torch.testing.assert_close(output.double(), exact, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    (gradient,) = torch.autograd.grad(output, filters, torch.randn(output.shape).to(dtype))
    for result in (output, gradient):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=LAYOUTS[layout])
    cut = torch.randn(2, 20, 6, 4).to(dtype)[:, 1:19, ::2]  # neither layout
    assert torch.equal(ops.filter_norm(cut, 9), ops.filter_norm(cut.contiguous(), 9))
    assert ops.filter_norm(torch.empty(0, 9, 3, 3), 9).shape == (0, 9, 3, 3)


def test_normalized_under_autocast() -> None:
    made = tensors(dtype=torch.float32, grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.ddf(made[0], made[1], made[2].bfloat16(), norm_scale=0.7, padding=1)
        exact = ops.ddf(*(tensor.double() for tensor in made), norm_scale=0.7, padding=1)
    assert (output.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    assert (output.double() - exact).norm() <= 4 * torch.finfo(
        torch.bfloat16
    ).eps * exact.norm()  # and so is FilterNorm
    output.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in made)


def test_normalized_gradients_only_where_needed() -> None:
    made = tensors()
    made[0].requires_grad_()
    ops.ddf(*made, norm_scale=0.7, padding=1).sum().backward()
    assert [tensor.grad is not None for tensor in made] == [True, False, False]


@pytest.mark.parametrize(
    ("filters", "taps", "error", "message"),
    [
        (torch.randn(2, 9, 3), 9, ValueError, r"\(B, G\*9, H, W\), got \(2, 9, 3\)"),
        (torch.randn(2, 12, 3, 3), 9, ValueError, r"\(B, G\*9, H, W\)"),
        (torch.randn(2, 9, 3, 3), 1, ValueError, "2 taps or more, got 1"),
        (torch.ones(2, 9, 3, 3, dtype=torch.int32), 9, TypeError, "float32, float64, float16 or bfloat16"),
    ],
)
def test_wrong_filters_are_refused(filters: Tensor, taps: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.filter_norm(filters, taps)


def test_normalized_refuses_what_its_parts_refuse() -> None:
    with pytest.raises(ValueError, match="2 taps or more"):
        ops.ddf(*tensors(1, padding=0), norm_scale=1.0)
    with pytest.raises(ValueError, match="combine must be"):
        ops.ddf(*tensors(), norm_scale=1.0, padding=1, combine="max")
    with pytest.raises(ValueError, match="grad_output must be"):
        torch.ops.ddf_convert.filter_norm_backward(torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 3), 9, 1.0)


# --- torch.func -------------------------------------------------------------------------------------------------------


def samples(upscale: int = 1, count: int = 3) -> list[Tensor]:
    """The operator's tensors, and a gradient of its output, for several samples: (N, B, ...)."""
    each = [tensors(heads=2, shape=(2, 4, 4, 5), upscale=upscale) for _ in range(count)]
    input, channel, spatial = (torch.stack(list(tensor)) for tensor in zip(*each, strict=True))
    return [input, channel, spatial, torch.randn(count, 2, 4, upscale * 4, upscale * 5).double()]


def the_operators(combine: str, upscale: int) -> dict[str, Any]:
    """Every operator as a function of (input, channel_filter, spatial_filter, gradient of the output)."""
    options = (1, 1, 1, combine, upscale)

    def backward(needs: list[bool]) -> Any:
        def call(input: Tensor, channel: Tensor, spatial: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            gradients = torch.ops.ddf_convert.ddf_backward(grad, input, channel, spatial, needs, *options)
            return tuple(gradient for gradient, needed in zip(gradients, needs, strict=True) if needed)

        return call

    return {
        "ddf": lambda *made: torch.ops.ddf_convert.ddf(*made[:3], *options),
        "ddf, normalized": lambda *made: torch.ops.ddf_convert.ddf(*made[:3], *options, 0.7),
        "ddf_backward": backward([True] * 3),
        "ddf_backward, of some": backward([False, True, False]),
        "filter_norm": lambda *made: ops.filter_norm(made[2], 9, 0.7),
        "filter_norm_backward": lambda *made: torch.ops.ddf_convert.filter_norm_backward(
            made[2].flip(1), made[2], 9, 0.7
        ),
    }


def in_a_loop(call: Any, made: list[Tensor], mapped: tuple[bool, ...]) -> Any:
    """What ``vmap`` should give."""
    results = [
        call(*(tensor[index] if each else tensor for tensor, each in zip(made, mapped, strict=True)))
        for index in range(3)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(list(each)) for each in zip(*results, strict=True))


@pytest.mark.parametrize("name", the_operators("mul", 1))
@pytest.mark.parametrize(("combine", "upscale"), [("mul", 1), ("add", 2)])
def test_vmap_is_a_loop(combine: str, upscale: int, name: str) -> None:
    call, whole = the_operators(combine, upscale)[name], samples(upscale)
    for mapped in itertools.product((True, False), repeat=4):
        if not mapped[2]:  # by which all operators are mapped
            continue
        made = [tensor if each else tensor[0] for tensor, each in zip(whole, mapped, strict=True)]
        expected = in_a_loop(call, made, mapped)
        torch.testing.assert_close(torch.vmap(call, tuple(0 if each else None for each in mapped))(*made), expected)
        for dim in (1, -1):
            moved = [tensor.movedim(0, dim) if each else tensor for tensor, each in zip(made, mapped, strict=True)]
            in_dims = tuple(dim if each else None for each in mapped)
            torch.testing.assert_close(torch.vmap(call, in_dims)(*moved), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_vmap(layout: str) -> None:
    input, channel, spatial, _ = samples()
    input = input.flatten(0, 1).to(memory_format=LAYOUTS[layout]).unflatten(0, (3, 2))
    other = torch.randn(2, 3, *channel.shape[1:]).double()

    def call(*made: Tensor) -> Tensor:
        return ops.ddf(*made, padding=1)

    both = torch.vmap(torch.vmap(call, (0, 0, 0)), (None, 0, None))(input, other, spatial)
    for outer, inner in itertools.product(range(2), range(3)):
        torch.testing.assert_close(both[outer, inner], call(input[inner], other[outer, inner], spatial[inner]))
    empty = torch.vmap(call)(input[:, :0], channel[:, :0], spatial[:, :0])
    assert empty.shape == (3, 0, 4, 4, 5)


@pytest.mark.parametrize("name", ["ddf", "ddf, normalized", "filter_norm"])
@pytest.mark.parametrize(("combine", "upscale"), [("mul", 1), ("add", 2)])
def test_gradients_of_samples_are_those_of_a_loop(combine: str, upscale: int, name: str) -> None:
    call, made = the_operators(combine, upscale)[name], samples(upscale)

    def loss(*one: Tensor) -> Tensor:
        return call(*one).sin().sum()

    def slope(*one: Tensor) -> Tensor:
        return sum(gradient.cos().sum() for gradient in torch.func.grad(loss, (0, 1, 2))(*one))

    for function in (loss, slope):  # the second one's gradients are of second order
        gradients = torch.vmap(torch.func.grad(function, (0, 1, 2)))(*made)
        for index in range(3):
            one = [tensor[index].clone().requires_grad_() for tensor in made[:3]]
            value = loss(*one, made[3][index])
            if function is slope:
                first = torch.autograd.grad(value, one, create_graph=True, materialize_grads=True)
                value = sum(gradient.cos().sum() for gradient in first)
            expected = torch.autograd.grad(value, one, materialize_grads=True)
            for ours, theirs in zip(gradients, expected, strict=True):
                torch.testing.assert_close(ours[index], theirs)


def test_jacobians_by_torch_func() -> None:
    made = tensors(heads=2, shape=(1, 2, 2, 3))
    for place in range(3):
        call = lambda *each: ops.ddf(*each, padding=1)  # noqa: E731
        expected = torch.autograd.functional.jacobian(call, tuple(made))[place]
        torch.testing.assert_close(torch.func.jacrev(call, place)(*made), expected)


@pytest.mark.parametrize("name", ["ddf", "ddf, normalized", "filter_norm"])
def test_forward_mode_is_refused_and_not_zero(name: str) -> None:
    made = [*tensors(heads=2, shape=(2, 4, 4, 5)), torch.empty(0)]
    call = the_operators("mul", 1)[name]
    with pytest.raises(
        NotImplementedError, match=f"ddf_convert::{name.partition(',')[0]} has no forward-mode derivative.*jacrev"
    ):
        torch.func.jvp(lambda spatial: call(*made[:2], spatial), (made[2],), (made[2],))
    with torch.autograd.forward_ad.dual_level():  # which alone changes nothing
        torch.testing.assert_close(call(*made), call(*[tensor.clone() for tensor in made]))


def test_vmap_refuses_in_words_of_one_sample() -> None:
    input, channel, spatial, _ = samples()
    with pytest.raises(ValueError, match=r"input must be \(B, C, H, W\), got shape \(4, 4, 5\)"):
        torch.vmap(lambda *made: ops.ddf(*made, padding=1))(input[:, 0], channel, spatial)


def test_vmap_of_gradients_compiles() -> None:
    def gradients(*made: Tensor) -> tuple[Tensor, ...]:
        return torch.vmap(torch.func.grad(lambda *one: ops.ddf(*one, padding=1).sin().sum(), (0, 1, 2)))(*made)

    made = samples()[:3]
    torch.testing.assert_close(torch.compile(gradients, backend="aot_eager")(*made), gradients(*made))


# --- the way to the CUDA kernels, without a GPU -----------------------------------------------------------------------


class Kernels(ModuleType):
    """Stands for ``ddf_convert.cuda``: notes how it is called, and answers by the reference."""

    def __init__(self, runs: bool) -> None:
        super().__init__("ddf_convert.cuda")
        self.runs = runs
        self.calls: list[tuple[Any, ...]] = []

    def usable(self, tensor: Tensor) -> bool:
        return self.runs

    def __getattr__(self, name: str) -> Any:
        if name not in ("forward", "backward", "filter_norm", "filter_norm_backward"):
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            self.calls.append((name, *(each for each in arguments if not isinstance(each, Tensor))))
            return getattr(reference, name)(*arguments)

        return call


def on_cuda(operator: str) -> Any:
    """What torch calls for CUDA tensors; its arguments may be on the CPU here."""
    module = sys.modules["ddf_convert.ops.filter_norm" if "norm" in operator else "ddf_convert.ops.ddf"]
    return partial(module._backward if "backward" in operator else module._forward, BACKENDS["CUDA"])


@pytest.mark.parametrize("runs", [True, False])
def test_cuda_tensors_go_to_the_kernels_that_can_run(runs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(runs)
    monkeypatch.setitem(sys.modules, "ddf_convert.cuda", kernels)
    monkeypatch.setattr(ddf_convert, "cuda", kernels, raising=False)
    made = tensors(3, 2, 1, 1, 2, layout="channels_last")
    geometry = Geometry(2, 1, 1, "add")
    grad, needs = torch.randn(2, 8, 4, 5).double(), [True, False, True]
    normalized = reference.filter_norm(made[2], 9, 0.7)
    outputs = [
        (on_cuda("ddf")(*made, *geometry), reference.forward(*made, geometry)),
        (on_cuda("ddf")(*made, *geometry, 0.7), reference.forward(*made[:2], normalized, geometry)),
        (on_cuda("filter_norm")(made[2], 9, 0.7), normalized),
        (
            on_cuda("filter_norm_backward")(normalized, made[2], 9, 0.7),
            reference.filter_norm_backward(normalized, made[2], 9, 0.7),
        ),
    ]
    gradients = on_cuda("ddf_backward")(grad, *made, needs, *geometry)
    for ours, theirs in zip(gradients, reference.backward(grad, *made, geometry, tuple(needs)), strict=True):
        outputs.append((ours, torch.empty(0, dtype=ours.dtype) if theirs is None else theirs))
    for ours, theirs in outputs:
        torch.testing.assert_close(ours, theirs)
        assert ours.dim() < 4 or ours.is_contiguous(memory_format=torch.channels_last)
    expected = [
        ("forward", geometry, None),
        ("forward", geometry, 0.7),
        ("filter_norm", 9, 0.7),
        ("filter_norm_backward", 9, 0.7),
        ("backward", geometry, tuple(needs)),
    ]
    assert kernels.calls == (expected if runs else [])


def test_arguments_are_checked_before_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(True)
    monkeypatch.setitem(sys.modules, "ddf_convert.cuda", kernels)
    monkeypatch.setattr(ddf_convert, "cuda", kernels, raising=False)
    made = tensors()
    for call in (
        lambda: on_cuda("ddf")(*made, 0, 1, 1, "mul"),
        lambda: on_cuda("ddf")(*made, 0, 1, 1, "mul", 1, 0.7),
        lambda: on_cuda("ddf_backward")(made[0][:1], *made, [True] * 3, 1, 1, 1, "mul"),
        lambda: on_cuda("filter_norm")(made[2], 7, 0.7),
        lambda: on_cuda("filter_norm_backward")(made[0], made[2], 9, 0.7),
    ):
        with pytest.raises(ValueError, match=r"ddf|filter_norm"):
            call()
    assert kernels.calls == []
