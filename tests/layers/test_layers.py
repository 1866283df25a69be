"""FilterNorm, the branches, DDF2d and DDFConv2d."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.paths import DATA
from support.tolerances import far
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddf_convert import ops, reference
from ddf_convert.layers import ChannelBranch, ChannelFilterNorm, DDF2d, DDFConv2d, DDFUp2d, SpatialFilterNorm, branches
from ddf_convert.layers import ddf as ddf_module
from ddf_convert.layers.ddf import normalizes_inside

GOLDEN = DATA / "golden"
CASES = [case for case in json.loads((GOLDEN / "index.json").read_text()) if case["module"] == "DDF2d"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def by_reference(input: Tensor, channel: Tensor, spatial: Tensor, **options: object) -> Tensor:
    return reference.forward(input, channel, spatial, reference.Geometry(**options))  # type: ignore[arg-type]


def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets layers decide as they would for CUDA tensors; plain DDF is then an error where FilterNorm goes inside."""
    on_cuda = SimpleNamespace(is_cuda=True)
    monkeypatch.setattr(ddf_module, "normalizes_inside", lambda branch, input: normalizes_inside(branch, on_cuda))

    def normalized_ddf(*tensors: Tensor, norm_scale: float, **options: Any) -> Tensor:
        return ops.ddf(*tensors, norm_scale=norm_scale, **options)

    monkeypatch.setattr(ddf_module, "ddf", normalized_ddf)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["kernels", "reference", "normalized inside"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"])
def test_golden(case: dict, backend: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr(ddf_module, "ddf", by_reference)
    elif backend == "normalized inside":
        as_on_cuda(monkeypatch)
    tensors = load_file(GOLDEN / case["file"])
    layer = DDF2d(**case["kwargs"], dtype=torch.float64)
    weights = {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}
    layer.load_state_dict(weights, strict=True)
    output = layer(tensors["input.0"].to(memory_format=layout))
    torch.testing.assert_close(output, tensors["output"], **far(torch.float64, output))


def test_three_golden_cases_are_there() -> None:
    assert len(CASES) == 3


def test_spatial_filter_norm() -> None:
    norm = SpatialFilterNorm(3, "relu")
    filters = torch.randn(2, 18, 4, 5, dtype=torch.float64) * 7 + 3
    normalized = norm(filters).unflatten(1, (2, 9))
    scale = math.sqrt(2) / 3
    torch.testing.assert_close(normalized.mean(2), torch.zeros(2, 2, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(normalized.std(2), torch.full((2, 2, 4, 5), scale, dtype=torch.float64))
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
def test_filters_are_normalized_in_float32(dtype: torch.dtype) -> None:
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
    assert layer.channel_branch[1].out_channels == max(min(4, channels), int(channels * 0.2))
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
    torch.testing.assert_close(layer(input), reference.forward(padded, channel, spatial, reference.Geometry(stride=2)))
    assert not torch.allclose(layer(input), bare(input))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(mode: str) -> None:
    layer, zeros = DDF2d(4, padding_mode=mode), DDF2d(4)
    zeros.load_state_dict(layer.state_dict())
    input = torch.randn(1, 4, 6, 7)
    padded = nn.functional.pad(input, (1, 1, 1, 1), mode=mode)
    expected = reference.forward(padded, layer.channel_branch(input), layer.spatial_branch(input), reference.Geometry())
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
    exact = layer.double()(input.double())
    assert (output.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()  # the layer rounds four times


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    layer = DDF2d(8)
    with torch.autocast("cpu", dtype):
        output = layer(torch.randn(2, 8, 7, 7))
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


# --- shortcuts: FilterNorm inside the operator, and a channel branch of matrix products -------------------------------


def forward_and_backward(layer: nn.Module, input: Tensor) -> list[Tensor]:
    input = input.detach().requires_grad_()
    output = layer(input)
    grad = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).to(output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, [input, *layer.parameters()], grad)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 5, "heads": 2, "combine": "add", "bias": True},
        {"stride": 2, "padding": "same"},
        {"dilation": 2, "padding": 0, "padding_mode": "reflect"},
        {"padding": 3, "padding_mode": "circular", "se_ratio": 1.0},
    ],
    ids=str,
)
def test_the_shortcuts_change_nothing(
    options: dict, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DDF2d(8, **options, dtype=torch.float64)
    input = torch.randn(2, 8, 10, 9, dtype=torch.float64).to(memory_format=layout)
    watched = copy.deepcopy(layer)
    for module in watched.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    expected = forward_and_backward(watched, input)
    as_on_cuda(monkeypatch)
    ours = forward_and_backward(layer, input)
    assert ours[0].stride() == expected[0].stride()
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_with_the_shortcuts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    layer, input = DDF2d(8), torch.randn(2, 8, 7, 7)
    exact = layer(input)
    with torch.autocast("cpu", dtype):
        mixed = layer(input)
    pure = layer.to(dtype)(input.to(dtype))
    for output in (mixed, pure):
        assert output.dtype == dtype
        assert (output.float() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()  # as above
    mixed.float().sum().backward()
    pure.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


class Doubled(SpatialFilterNorm):
    def forward(self, filters: Tensor) -> Tensor:
        return 2 * super().forward(filters)


def doubled_forward(branch: nn.Sequential) -> None:
    forward = branch[-1].forward
    branch[-1].forward = lambda filters: 2 * forward(filters)  # as accelerate's hooks do it


TAMPERINGS: dict[str, Callable[[nn.Sequential], object]] = {
    "forward hook": lambda branch: branch[-1].register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward hook of the branch": lambda branch: branch.register_forward_hook(
        lambda module, inputs, output: 2 * output
    ),
    "added module": lambda branch: branch.append(nn.Hardtanh()),
    "own forward": doubled_forward,
    "replaced module": lambda branch: branch.__setitem__(-1, nn.Sequential(branch[-1], nn.Hardtanh())),
}


@pytest.mark.parametrize("change", [*TAMPERINGS, "subclass"])
def test_a_changed_spatial_branch_runs_as_it_is(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DDF2d(4)
    input = torch.randn(2, 4, 6, 5)
    on_cuda = SimpleNamespace(is_cuda=True)
    assert normalizes_inside(layer.spatial_branch, on_cuda)
    assert not normalizes_inside(layer.spatial_branch, input)
    if change == "subclass":
        layer.spatial_branch[1] = Doubled(3, "relu")
    else:
        TAMPERINGS[change](layer.spatial_branch)
    assert not normalizes_inside(layer.spatial_branch, on_cuda)
    expected = layer(input)
    ddf = ddf_module.ddf
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(ddf_module, "ddf", ddf)
    assert torch.equal(layer(input), expected)


@pytest.mark.parametrize("place", range(2))
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_the_spatial_branch_are_called(kind: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DDF2d(4)
    ddf = ddf_module.ddf
    as_on_cuda(monkeypatch)
    monkeypatch.setattr(ddf_module, "ddf", ddf)
    calls: list[nn.Module] = []
    getattr(layer.spatial_branch[place], f"register_{kind}_hook")(lambda module, *arguments: calls.append(module))
    layer(torch.randn(2, 4, 6, 5, requires_grad=True)).sum().backward()
    assert calls == [layer.spatial_branch[place]]
    assert normalizes_inside(layer.spatial_branch, SimpleNamespace(is_cuda=True)) == (place == 0)


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
        assert not normalizes_inside(layer.spatial_branch, SimpleNamespace(is_cuda=True))
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
def test_a_changed_channel_branch_runs_as_it_is(place: int, other: nn.Module) -> None:
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


def test_the_shortcuts_count_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, input = DDF2d(20, heads=2, dtype=torch.float64), torch.randn(2, 20, 9, 7, dtype=torch.float64)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            layer(input).sum().backward()
        return counter.get_total_flops()

    as_built = flops()  # the counter watches all modules with hooks, so the branches run as they are
    monkeypatch.setattr(branches, "any_global_hook", lambda: False)
    as_on_cuda(monkeypatch)
    assert flops() == as_built


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7)])
def test_the_channel_branch_needs_no_convolution(sizes: tuple[int, int]) -> None:
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


def test_compiles_and_exports_with_the_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_cuda(monkeypatch)
    torch._dynamo.reset()
    layer, input = DDF2d(8, stride=2), torch.randn(2, 8, 9, 9)
    for ours, eager in zip(
        forward_and_backward(torch.compile(layer, fullgraph=True), input),
        forward_and_backward(layer, input),
        strict=True,
    ):
        torch.testing.assert_close(ours, eager)
    exported = torch.export.export(layer, (input,))
    (call,) = [node for node in exported.graph.nodes if node.target is torch.ops.ddf_convert.ddf.default]
    assert call.args[-1] == layer.spatial_branch[1].scale
    torch.testing.assert_close(exported.module()(input), layer(input))
    layer.spatial_branch[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    monkeypatch.undo()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(input), layer(input))


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
        ({"padding": "full"}, "number of pixels, None, 'same' or 'valid', got 'full'"),
        ({"combine": "max"}, "one of mul, add, got 'max'"),
        ({"padding_mode": "mirror"}, "got 'mirror'"),
        ({"se_ratio": 0}, "se_ratio must be above 0"),
        ({"se_ratio": float("inf")}, "se_ratio must be above 0 and finite"),
    ],
)
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DDF2d(**{"in_channels": 8, **options})


# --- torch.func: gradients of one sample, ensembles -------------------------------------------------------------------

TRANSFORMED = {
    "DDF2d": lambda: DDF2d(4, heads=2, bias=True),
    "affine, strided": lambda: DDF2d(4, 5, stride=2, padding="same", affine=True, combine="add"),
    "reflect": lambda: DDF2d(4, dilation=2, padding=1, padding_mode="reflect"),
    "DDFConv2d": lambda: DDFConv2d(4, 6, bias=True),
    "DDFUp2d": lambda: DDFUp2d(4),
    "DDFUp2d, affine": lambda: DDFUp2d(4, affine=True, combine="add"),
    "watched": lambda: watched(DDF2d(4)),  # as no branch is computed directly then
}


def watched(layer: nn.Module) -> nn.Module:
    for module in layer.modules():
        module.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_each_sample(layout: torch.memory_format, name: str) -> None:
    layer = TRANSFORMED[name]().double()
    input = torch.randn(3, 4, 7, 6, dtype=torch.float64).to(memory_format=layout)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).sin().sum()

    ours = torch.vmap(torch.func.grad(loss, (0, 1)), (None, 0))(dict(layer.named_parameters()), input)
    for index in range(3):
        sample = input[index : index + 1].clone().requires_grad_()
        names, parameters = zip(*layer.named_parameters(), strict=True)
        theirs = torch.autograd.grad(layer(sample).sin().sum(), (sample, *parameters))
        torch.testing.assert_close(ours[1][index], theirs[0][0])
        for each, gradient in zip(names, theirs[1:], strict=True):
            torch.testing.assert_close(ours[0][each][index], gradient, msg=each)


@pytest.mark.parametrize("name", TRANSFORMED)
def test_ensembles(name: str) -> None:
    layers = [TRANSFORMED[name]().double() for _ in range(3)]
    state = torch.func.stack_module_state(layers)
    inputs = torch.randn(3, 2, 4, 7, 6, dtype=torch.float64)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], input: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (input,))

    for one, in_dims in ((inputs[0], (0, 0, None)), (inputs, (0, 0, 0))):
        expected = [layer(each) for layer, each in zip(layers, one.expand_as(inputs), strict=True)]
        torch.testing.assert_close(torch.vmap(call, in_dims)(*state, one), torch.stack(expected))
