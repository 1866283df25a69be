"""What code that knows a model finds in its converted form: attributes, frozen parts, unbatched maps."""

import copy
import pickle
from types import MethodType

import pytest
import torch
from support import networks as net
from torch import nn

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d
from ddf_convert.layers.branches import ChannelBranch, narrow_squeeze_width, squeeze_width

IMAGE = torch.randn(1, 32, 12, 12, generator=torch.Generator().manual_seed(0))
CONV = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
    "transposed",
    "output_padding",
)
CONVOLUTIONS = {
    "plain": net.conv(),
    "another width": net.conv(32, 48),
    "strided": net.conv(stride=2),
    "dilated": net.conv(dilation=2, padding=2),
    "unpadded": net.conv(padding=0),
    "grouped": net.conv(groups=4),
    "depthwise": net.conv(groups=32),
    "reflecting": net.conv(padding_mode="reflect"),
    "no bias": net.conv(bias=False),
}


def replaced(module: nn.Module, image: torch.Tensor = IMAGE, **options: object) -> nn.Module:
    options = {"depthwise": True, "allow_growth": True, **options}
    converted = ddf.convert(nn.Sequential(module), example_input=image, **options)[0]
    assert converted is not module
    return converted


# --- attributes ---


# Every convolution with DDF, and three with each of the other filters.
GEOMETRIES = [
    pytest.param(chosen, conv, id=f"{chosen}-{name}")
    for chosen in ("ddf", "spatial", "channel", "depthwise", "condconv", "dw-condconv", "dw-weightnet")
    for name, conv in CONVOLUTIONS.items()
    if chosen == "ddf" or name in ("another width", "strided", "depthwise")
]


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "conv"), GEOMETRIES)
def test_geometry_is_the_convolutions(chosen: str, conv: nn.Conv2d) -> None:
    layer = replaced(conv, filter=chosen, filter_options={"num_experts": 2} if "cond" in chosen else {})
    assert {name: getattr(layer, name) for name in CONV} == {name: getattr(conv, name) for name in CONV}
    assert layer(IMAGE).shape == conv(IMAGE).shape


@pytest.mark.parametrize("mixing", ["never", "always"])
@pytest.mark.parametrize("bias", [True, False])
def test_bias_is_the_one_that_is_added(mixing: str, bias: bool) -> None:
    layer = replaced(net.conv(bias=bias), mixing=mixing)
    assert (layer.bias is None) == (not bias)
    if bias:
        before = layer(IMAGE)
        with torch.no_grad():
            layer.bias.add_(1)
        assert torch.allclose(layer(IMAGE), before + 1, atol=1e-5)
        assert layer.bias is dict(layer.named_parameters())["bias" if mixing == "never" else "mix.bias"]


LAYERS = {
    "DDF2d": lambda: DDF2d(8),
    "DDFConv2d": lambda: DDFConv2d(8, 12),
    "DDFUp2d": lambda: DDFUp2d(8),
    "DDFUpConv2d": lambda: DDFUpConv2d(8, 12),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_weight_is_refused_with_the_reason(make) -> None:
    layer = make()
    assert not hasattr(layer, "weight")
    assert getattr(layer, "weight", None) is None
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(AttributeError, match=f"{type(layer).__name__} has no weight: .* predicted"):
            same.weight  # noqa: B018 - the access is what is tested
        with pytest.raises(AttributeError, match="no attribute 'wieght'"):
            same.wieght  # noqa: B018


def test_transposed_convolutions_and_upsampling_keep_their_arguments() -> None:
    conv = nn.ConvTranspose2d(32, 16, 4, 2, 1)
    layer = replaced(conv, upsample=True)
    for name in ("in_channels", "out_channels", "stride", "padding", "output_padding", "groups", "transposed"):
        assert getattr(layer, name) == getattr(conv, name), name
    upsample = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
    layer = replaced(upsample, upsample=True)
    for name in ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor"):
        assert getattr(layer, name) == getattr(upsample, name), name


def test_constructors_take_a_convolutions_own_attributes() -> None:
    conv = net.conv(stride=2, dilation=2, padding=2)
    layer = DDF2d(conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    assert layer(IMAGE).shape == conv(IMAGE).shape
    assert DDF2d(4, padding="valid").padding == (0, 0)
    assert DDFUp2d(4, kernel_size=(3, 3), dilation=(1, 1)).kernel_size == (3, 3)


@pytest.mark.parametrize("option", ["kernel_size", "stride", "padding", "dilation"])
@pytest.mark.parametrize("size", [(3, 5), (3, 3, 3), "large", (3.0, 3.0), ()])
def test_sizes_that_differ_are_refused(option: str, size: object) -> None:
    with pytest.raises(ValueError, match=rf"DDF2d: {option} must be a"):
        DDF2d(8, **{option: size})


@pytest.mark.slow
@pytest.mark.parametrize("as_graph", [False, True])
def test_attributes_of_instances_are_carried_over(as_graph: bool, tmp_path) -> None:
    model = net.Routed().eval()
    for layer in model.model:
        layer._is_hf_initialized = True
        layer.notes = {"made by": ["us"]}
    converted = ddf.convert(model, example_input=IMAGE, upsample=True, allow_growth=True, as_graph=as_graph)
    assert {type(layer) for layer in converted.model.children()} == {DDFConv2d, DDFUp2d}
    output = converted(IMAGE)
    assert output.shape == model(IMAGE).shape
    for old, new in zip(model.model, converted.model.children(), strict=True):
        for name in ("i", "f", "type", "np", "_is_hf_initialized", "notes"):
            assert getattr(new, name) == getattr(old, name), name
        assert new.notes is not old.notes  # the converted model is a copy
    if not as_graph:
        ddf.save(converted, tmp_path / "saved")
        again = ddf.restore(net.Routed(), tmp_path / "saved").eval()
        assert torch.equal(again(IMAGE), output)


@pytest.mark.parametrize("name", ["ddf", "mix", "kernel_sizes"])
def test_names_that_the_layer_needs_are_a_reason(name: str) -> None:
    conv = net.conv()
    setattr(conv, name, "of the library")
    site = ddf.plan(nn.Sequential(conv), IMAGE)["0"]
    if name == "kernel_sizes":
        assert site.action == "replace"
        return
    assert site.reason == f"has an attribute {name!r}, a name that DDFConv2d needs for itself"
    with pytest.raises(UsageError, match="cannot be replaced: has an attribute"):
        site.replace()


def test_names_that_are_set_after_planning_change_nothing() -> None:
    model = nn.Sequential(net.conv())
    plan = ddf.plan(model, IMAGE)
    model[0].mix = 3
    with pytest.raises(UsageError, match="0 cannot be replaced: it has an attribute 'mix'"):
        ddf.convert(model, plan, inplace=True)
    assert type(model[0]) is nn.Conv2d


class Tagged(nn.Conv2d):
    tag = "of the class"
    scales = (1, 2)

    def describe(self) -> str:
        return self.tag


def test_values_of_a_subclass_and_methods_of_an_instance_are_carried_over() -> None:
    conv = Tagged(32, 32, 3, padding=1)
    conv.channels = MethodType(lambda self: self.in_channels + self.extra, conv)
    conv.extra = 1
    layer = replaced(conv)
    assert (layer.tag, layer.scales) == ("of the class", (1, 2))
    conv.extra = 5
    assert layer.channels() == 33  # bound to the new layer


@pytest.mark.parametrize("part", ["buffer", "parameter", "module"])
def test_convolutions_that_hold_more_are_left_alone(part: str) -> None:
    conv = net.conv()
    if part == "buffer":
        conv.register_buffer("mask", torch.ones(32))
    elif part == "parameter":
        conv.mask = nn.Parameter(torch.ones(32))
    else:
        conv.mask = nn.Linear(2, 2)
    assert ddf.plan(nn.Sequential(conv), IMAGE)["0"].reason == "holds mask, which would be lost"


def test_pixel_shuffles_keep_theirs_too() -> None:
    model = net.Shuffles()
    shuffles = {name: module for name, module in model.named_modules() if isinstance(module, nn.PixelShuffle)}
    for shuffle in shuffles.values():
        shuffle.f = -1
    converted = ddf.convert(model, example_input=torch.randn(1, 3, 6, 6), upsample=True)
    kinds = {type(converted.get_submodule(name)) for name in shuffles}
    assert kinds == {nn.Identity}
    assert all(converted.get_submodule(name).f == -1 for name in shuffles)
    assert all(
        converted.get_submodule(name).upscale_factor == shuffle.upscale_factor for name, shuffle in shuffles.items()
    )


# --- frozen models ---


def test_new_layers_of_frozen_models_are_trainable_and_the_plan_says_so(tmp_path) -> None:
    model = nn.Sequential(net.conv(), nn.ReLU(), net.conv()).requires_grad_(False)
    plan = ddf.plan(model, IMAGE)
    assert any(note.startswith("Frozen (requires_grad=False): 2 of the 2 modules") for note in plan.notes)
    converted = ddf.convert(model, plan)
    assert all(parameter.requires_grad for parameter in converted.parameters())
    ddf.save(converted, tmp_path / "saved")
    restored = ddf.restore(copy.deepcopy(model), tmp_path / "saved")
    assert all(parameter.requires_grad for parameter in restored.parameters())
    model[0].requires_grad_(True)
    assert any("1 of the 2 modules" in note for note in ddf.plan(model, IMAGE).notes)
    model.requires_grad_(True)
    assert not any("Frozen" in note for note in ddf.plan(model, IMAGE).notes)


@pytest.mark.parametrize("keep_frozen", [False, True])
def test_layers_that_take_over_frozen_weights_follow_only_if_asked(keep_frozen: bool) -> None:
    model = nn.Sequential(net.conv().requires_grad_(False), nn.ReLU(), net.conv())
    recipe = recipes.load("preserve")
    converted = recipe.convert(model, example_input=IMAGE)
    recipe.initialize(converted, model, keep_frozen=keep_frozen)
    assert {parameter.requires_grad for parameter in converted[0].parameters()} == {not keep_frozen}
    assert all(parameter.requires_grad for parameter in converted[2].parameters())


# --- narrow squeezes ---


@pytest.mark.parametrize(
    ("channels", "ratio", "width"), [(1, 0.2, 1), (3, 0.2, 3), (16, 0.2, 4), (64, 0.2, 12), (64, 0.5, 32)]
)
def test_squeezes_are_at_least_four_wide_where_the_channels_allow(channels: int, ratio: float, width: int) -> None:
    assert squeeze_width(channels, ratio) == width
    assert ChannelBranch(channels, 3, ratio).squeeze.out_channels == width
    assert DDF2d(channels, se_ratio=ratio, squeeze_channels=2).channel_branch.squeeze.out_channels == 2
    with pytest.raises(ValueError, match="squeeze_channels must be 1 or more, got 0"):
        DDF2d(channels, squeeze_channels=0)


def test_squeezes_of_few_channels_learn_from_most_starts() -> None:
    alive = 0
    for seed in range(40):
        torch.manual_seed(seed)
        branch = ChannelBranch(3, 3)
        branch(torch.rand(4, 3, 6, 6)).square().sum().backward()
        alive += bool(branch.squeeze.weight.grad.abs().sum())
    # A unit starts closed about as often as open: three of them all do in 1 of 8 starts, the one of old in 1 of 2.
    assert alive >= 30


@pytest.mark.parametrize("make", [DDF2d, lambda *a, **k: DDFUp2d(*a, **k), lambda *a, **k: DDFConv2d(a[0], 8, **k)])
def test_weights_with_the_narrow_squeeze_load(make) -> None:
    old, layer = make(8, squeeze_channels=narrow_squeeze_width(8, 0.2)), make(8)
    kept = list(layer.parameters())
    layer.load_state_dict(old.state_dict())
    image = torch.randn(2, 8, 5, 5)
    assert torch.equal(layer(image), old(image))
    assert all(mine is before for mine, before in zip(layer.parameters(), kept, strict=True))
    layer.load_state_dict(make(8).state_dict())  # and back
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(make(8, squeeze_channels=3).state_dict())


# --- maps without a batch ---


@pytest.mark.slow
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_layers_take_maps_without_a_batch(make) -> None:
    layer, image = make(), torch.randn(8, 6, 5)
    assert torch.equal(layer(image), layer(image[None])[0])
    for wrong in (image[0], image[None, None]):
        with pytest.raises((ValueError, RuntimeError), match=r"\(C, H, W\)|Expected 3D \(unbatched\)"):
            layer(wrong)
    exported = torch.export.export(layer, (image,)).module()
    assert torch.equal(exported(image), layer(image))


def test_guides_without_a_batch() -> None:
    layer = DDFUp2d(8, guide_channels=3)
    image, guide = torch.randn(8, 6, 5), torch.randn(3, 6, 5)
    assert torch.equal(layer(image, guide), layer(image[None], guide[None])[0])


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["ddf", "spatial", "channel", "condconv", "dw-weightnet"])
def test_models_that_call_convolutions_without_a_batch(chosen: str) -> None:
    model = nn.Sequential(net.conv(), nn.ReLU(), net.conv(32, 48, stride=2)).eval()
    plan = ddf.plan(model, IMAGE[0], filter=chosen, allow_growth=True)
    assert [(site.input_shape, site.action) for site in plan] == [((32, 12, 12), "replace")] * 2
    converted = ddf.convert(model, plan)
    assert torch.allclose(converted(IMAGE[0]), converted(IMAGE)[0], atol=1e-5)
    assert plan.after.macs == ddf.plan(converted, IMAGE[0]).before.macs


def test_transposed_convolutions_without_a_batch() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(32, 16, 4, 2, 1))
    converted = ddf.convert(model, example_input=IMAGE[0], upsample=True)
    assert isinstance(converted[0], DDFUpConv2d)
    assert converted(IMAGE[0]).shape == model(IMAGE[0]).shape
