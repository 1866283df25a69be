"""The operator's contract: registration, gradients, compile, autocast, layouts, arguments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from ddf_convert import ops, reference

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
) -> list[Tensor]:
    batch, channels, *sides = shape
    rows, columns = (ops.output_size(side, size, stride, padding, dilation) for side in sides)
    made = [
        torch.randn(shape).to(dtype, memory_format=LAYOUTS[layout]),
        torch.randn(batch, channels, size, size).to(dtype),
        torch.randn(batch, heads * size**2, rows, columns).to(dtype, memory_format=LAYOUTS[layout]),
    ]
    return [tensor.requires_grad_(grad) for tensor in made]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


# What a result may differ from the float64 reference, relative to its norm: rounding of the type, of sums in float32.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_like_reference(made: list[Tensor], options: tuple[Any, ...]) -> None:
    output = torch.ops.ddf_convert.ddf(*made, *options)
    grad = torch.randn(output.shape).to(output.dtype, memory_format=ops.memory_format(made[0]))
    gradients = torch.ops.ddf_convert.ddf_backward(grad, *made, *options, [True] * 3)
    exact = [tensor.double() for tensor in made]
    expected = [reference.forward(*exact, *options)]
    expected += reference.backward(grad.double(), *exact, *options, (True, True, True))
    for ours, theirs in zip((output, *gradients), expected, strict=True):
        assert ours.dtype == made[0].dtype
        error = (ours.double() - theirs).norm() / theirs.norm().clamp_min(1e-3)
        assert error <= TOLERANCES[ours.dtype], (float(error), options, [tuple(tensor.shape) for tensor in made])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, 7])
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
                assert_like_reference(made, (stride, padding, dilation, combine))


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
        assert_like_reference(made, (stride, 1, 1, combine))


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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_gradients_of_gradients(combine: str, layout: str) -> None:
    made = tensors(3, 2, 1, 1, 2, (1, 4, 5, 3), layout=layout, grad=True)
    assert gradgradcheck(lambda *tensors: ops.ddf(*tensors, stride=2, padding=1, combine=combine), made)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("combine", "stride", "dilation", "heads"), [("mul", 1, 1, 1), ("add", 2, 1, 4), ("mul", 3, 2, 1)]
)
def test_opcheck(combine: str, stride: int, dilation: int, heads: int, dtype: torch.dtype, layout: str) -> None:
    made = tensors(3, stride, dilation, dilation, heads, dtype=dtype, layout=layout, grad=True)
    options = (stride, dilation, dilation, combine)
    # Schema, autograd registration, fake tensors, and AOTAutograd with dynamic shapes. Eager and compiled gradients of
    # half types are compared with their rounding.
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype in (torch.float16, torch.bfloat16) else {}
    assert set(torch.library.opcheck(torch.ops.ddf_convert.ddf, (*made, *options), **tolerance).values()) == {"SUCCESS"}
    grad = torch.randn_like(torch.ops.ddf_convert.ddf(*made, *options).detach()).requires_grad_()
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        arguments = (grad, *made, *options, needs)
        results = torch.library.opcheck(torch.ops.ddf_convert.ddf_backward, arguments, **tolerance)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("combine", ["mul", "add"])
def test_compiles_whole_forward_and_backward(combine: str, layout: str) -> None:
    def call(input: Tensor, channel: Tensor, spatial: Tensor) -> Tensor:
        return ops.ddf(input.relu(), channel, spatial.sigmoid(), padding=1, combine=combine) * 2

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
    torch.testing.assert_close(output.double(), exact, atol=0.15, rtol=0.05)
    output.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in made)


def test_flop_counter_counts_the_taps() -> None:
    made = tensors(5, 2, 2, 1, 2, (2, 8, 9, 11), grad=True)
    with FlopCounterMode(display=False) as counter:
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
    torch.testing.assert_close(output, reference.forward(*made, 1, 1, 1, "mul"))
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
        gradients = torch.ops.ddf_convert.ddf_backward(grad, *made, 1, 1, 1, "mul", [True] * 3)
        expected = reference.backward(grad, *plain, 1, 1, 1, "mul", (True,) * 3)
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
                calls.append(args[-1])
            return function(*args, **(kwargs or {}))

    with Watch():
        ops.ddf(*made, padding=1).sum().backward()
    assert calls == [[place == needed for place in range(3)]]
    assert [tensor.grad is not None for tensor in made] == calls[0]


def test_other_devices_take_the_reference() -> None:
    made = [tensor.to("meta") for tensor in tensors()]
    assert torch.ops.ddf_convert.ddf(*made, 1, 1, 1, "mul").shape == made[0].shape
    table = torch._C._dispatch_dump_table("ddf_convert::ddf")
    kinds = dict(line.split(":", 1) for line in table.splitlines())
    assert "default backend kernel" in kinds["CUDA"]
    assert "default backend kernel" not in kinds["CPU"]


def replaced(position: int, value: Any) -> dict[str, Any]:
    return {"position": position, "value": value}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        ({}, {"combine": "max"}, ValueError, "combine must be 'mul' or 'add', got 'max'"),
        ({}, {"stride": 0}, ValueError, "stride >= 1"),
        ({}, {"padding": -1}, ValueError, "padding >= 0"),
        (replaced(0, torch.randn(8, 7, 9)), {}, ValueError, r"input must be \(B, C, H, W\)"),
        (replaced(1, torch.randn(2, 8, 2, 2)), {}, ValueError, "K odd"),
        (replaced(1, torch.randn(2, 7, 3, 3)), {}, ValueError, r"channel_filter must be .*\(2, 8, K, K\)"),
        (replaced(2, torch.randn(2, 9, 6, 9)), {}, ValueError, r"spatial_filter must be .*G\*9, 7, 9"),
        (replaced(2, torch.randn(2, 27, 7, 9)), {}, ValueError, "G dividing 8 channels"),
        (replaced(1, torch.randn(2, 8, 3, 3).half()), {}, TypeError, "of one dtype"),
        ({}, {"dilation": 9}, ValueError, "too small for kernel 3"),
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
        torch.ops.ddf_convert.ddf_backward(torch.randn(2, 8, 6, 9).double(), *made, 1, 1, 1, "mul", [True] * 3)
