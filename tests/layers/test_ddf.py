"""DDF2d and DDFConv2d: sizes, padding, dtypes, shortcuts, and torch's transformations of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.layer_helpers import LAYOUTS, forward_and_backward, pretend_cuda, with_hooks
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddf_convert import reference
from ddf_convert.layers import DDF2d, DDFConv2d, DDFUp2d, branches


@pytest.mark.parametrize("channels", [1, 3, 7, 33])
def test_every_channel_count_works(channels: int) -> None:
    layer = DDF2d(channels)
    assert layer.channel_branch[1].out_channels == max(min(4, channels), int(channels * 0.2))
    output = layer(torch.randn(2, channels, 6, 5, requires_grad=True))
    output.sum().backward()
    assert output.shape == (2, channels, 6, 5)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


SHAPES = list(itertools.product((1, 2, 3, 4), (None, 0, 1, 3, "same"), (1, 2), (3, 5)))


@pytest.mark.parametrize(("stride", "padding", "dilation", "size"), SHAPES, ids=str)
def test_output_sizes_are_those_of_conv2d(stride: int, padding: int | str | None, dilation: int, size: int) -> None:
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
def test_filters_stay_at_their_pixels_with_any_padding(stride: int) -> None:
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
def test_padding_modes_pad_like_torch(mode: str) -> None:
    layer, zeros = DDF2d(4, padding_mode=mode), DDF2d(4)
    zeros.load_state_dict(layer.state_dict())
    input = torch.randn(1, 4, 6, 7)
    padded = nn.functional.pad(input, (1, 1, 1, 1), mode=mode)
    expected = reference.forward(padded, layer.channel_branch(input), layer.spatial_branch(input), reference.Geometry())
    torch.testing.assert_close(layer(input), expected)
    torch.testing.assert_close(layer(input)[:, :, 1:-1, 1:-1], zeros(input)[:, :, 1:-1, 1:-1])


def test_bias_is_added() -> None:
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


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_train(dtype: torch.dtype, shortcuts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if shortcuts:
        pretend_cuda(monkeypatch)
    layer, input = DDF2d(8), torch.randn(2, 8, 7, 7)
    exact = layer(input)
    with torch.autocast("cpu", dtype):
        mixed = layer(input)
    pure = layer.to(dtype)(input.to(dtype))
    for output in (mixed, pure):
        assert output.dtype == dtype
        assert (output.float() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()  # it rounds four times
    mixed.float().sum().backward()
    pure.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_channels_last_is_kept() -> None:
    layer = DDF2d(8).to(memory_format=torch.channels_last)
    output = layer(torch.randn(2, 8, 7, 7).to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compiles_without_graph_breaks() -> None:
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


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
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
def test_shortcuts_change_no_result(
    options: dict, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = DDF2d(8, **options, dtype=torch.float64)
    input = torch.randn(2, 8, 10, 9, dtype=torch.float64).to(memory_format=layout)
    expected = forward_and_backward(with_hooks(layer), input)
    pretend_cuda(monkeypatch)
    ours = forward_and_backward(layer, input)
    assert ours[0].stride() == expected[0].stride()
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right)


def test_shortcuts_count_the_same_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, input = DDF2d(20, heads=2, dtype=torch.float64), torch.randn(2, 20, 9, 7, dtype=torch.float64)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            layer(input).sum().backward()
        return counter.get_total_flops()

    as_built = flops()  # the counter watches all modules with hooks, so the branches run as they are
    monkeypatch.setattr(branches, "any_global_hook", lambda: False)
    pretend_cuda(monkeypatch)
    assert flops() == as_built


@pytest.mark.slow
def test_compiles_and_exports_with_shortcuts(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch)
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


TRANSFORMED = {
    "DDF2d": lambda: DDF2d(4, heads=2, bias=True),
    "affine, strided": lambda: DDF2d(4, 5, stride=2, padding="same", affine=True, combine="add"),
    "reflect": lambda: DDF2d(4, dilation=2, padding=1, padding_mode="reflect"),
    "DDFConv2d": lambda: DDFConv2d(4, 6, bias=True),
    "DDFUp2d": lambda: DDFUp2d(4),
    "DDFUp2d, affine": lambda: DDFUp2d(4, affine=True, combine="add"),
    "with hooks": lambda: with_hooks(DDF2d(4)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_vmap_gives_the_gradients_of_each_sample(layout: torch.memory_format, name: str) -> None:
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
def test_vmap_runs_ensembles(name: str) -> None:
    layers = [TRANSFORMED[name]().double() for _ in range(3)]
    state = torch.func.stack_module_state(layers)
    inputs = torch.randn(3, 2, 4, 7, 6, dtype=torch.float64)

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor], input: Tensor) -> Tensor:
        return torch.func.functional_call(layers[0], (parameters, buffers), (input,))

    for one, in_dims in ((inputs[0], (0, 0, None)), (inputs, (0, 0, 0))):
        expected = [layer(each) for layer, each in zip(layers, one.expand_as(inputs), strict=True)]
        torch.testing.assert_close(torch.vmap(call, in_dims)(*state, one), torch.stack(expected))
