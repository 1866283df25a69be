"""Upsampling: what replaces it, what is left alone and why, and that a layer can start as what it replaced."""

import copy
import json
import pickle
import re
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import networks as net
from support.tolerances import near, shallow
from torch import fx, nn

import ddf_convert as ddf
from ddf_convert import cli
from ddf_convert.artifacts.artifact import FORMAT_VERSION, read_manifest
from ddf_convert.conversion import convert, plan, recorded
from ddf_convert.conversion.interpolate_hook import class_of
from ddf_convert.cost.count import measure
from ddf_convert.errors import ArtifactError, UsageError
from ddf_convert.layers import DDFUpConv2d
from ddf_convert.recipes.factorization import alignment_error, factorize_mix_first, interpolation_phases
from ddf_convert.recipes.initialize import initialize
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.parameters import new_layers, trainable_names
from ddf_convert.recipes.schema import Initialize, Losses

IMAGE = torch.empty(1, 3, 12, 16)
PRESERVE = ddf.recipes.load("preserve")
UP = {"upsample": True, "affine": True, "allow_growth": True}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def bilinear(factor=2, **options):
    return nn.Upsample(scale_factor=factor, mode="bilinear", **options)


def transposed(inputs, outputs, size, stride, padding, more=0, **options):
    return nn.ConvTranspose2d(inputs, outputs, size, stride, padding, more, **options)


def the_site(model, image=IMAGE, **options):
    """The one site that upsamples."""
    decided = plan(model, image, **{"upsample": True, **options})
    (found,) = [site for site in decided if site.upsampling or "transposed" in site.kind]
    return found


def preserved(model, image=IMAGE, **options):
    """A converted copy that started from the original, and what was done."""
    converted = convert(model.eval(), example_input=image, **{**UP, **options}).eval()
    return converted, PRESERVE.initialize(converted, model)


# --- what is replaced, and what is not ---

REPLACED = {
    "nearest": (net.Up(nn.Upsample(scale_factor=2)), "nearest 2x", "DDFUp2d"),
    "nearest-exact": (net.Up(nn.Upsample(scale_factor=3, mode="nearest-exact")), "nearest-exact 3x", "DDFUp2d"),
    "bilinear": (net.Up(bilinear()), "bilinear 2x", "DDFUp2d"),
    "a pair of factors": (net.Up(bilinear((4, 4))), "bilinear 4x", "DDFUp2d"),
    "bicubic": (net.Up(nn.Upsample(scale_factor=2, mode="bicubic")), "bicubic 2x", "DDFUp2d"),
    "UpsamplingNearest2d": (net.Up(nn.UpsamplingNearest2d(scale_factor=2)), "nearest 2x", "DDFUp2d"),
    "UpsamplingBilinear2d": (net.Up(nn.UpsamplingBilinear2d(scale_factor=2)), "bilinear 2x", "DDFUp2d"),
    "function": (net.Interpolates(scale_factor=2), "functional nearest 2x", "DDFUp2d"),
    "function, area": (net.Interpolates(scale_factor=2, mode="area"), "functional area 2x", "DDFUp2d"),
    "function, size": (net.Interpolates(size=(48, 64), mode="bilinear"), "functional bilinear 4x", "DDFUp2d"),
    "function, antialiased": (
        net.Interpolates(scale_factor=2, mode="bilinear", antialias=True),
        "functional bilinear 2x",
        "DDFUp2d",
    ),
    "transposed 2x2": (net.Up(transposed(8, 4, 2, 2, 0)), "transposed 2x2", "DDFUpConv2d"),
    "transposed 4x4": (net.Up(transposed(8, 4, 4, 2, 1)), "transposed 4x4", "DDFUpConv2d"),
    "transposed 3x3": (net.Up(transposed(8, 4, 3, 2, 1, 1)), "transposed 3x3", "DDFUpConv2d"),
    "transposed depthwise": (net.Up(transposed(8, 8, 4, 2, 1, groups=8)), "transposed 4x4", "DDFUp2d"),
    "pixel shuffle": (net.Shuffles(), "pixel shuffle 2x", "DDFUpConv2d"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLACED)
def test_what_is_replaced_keeps_its_shape_and_costs_what_the_plan_says(name):
    model, kind, layer = REPLACED[name]
    decided = plan(model, IMAGE, upsample=True, allow_growth=True)
    site = decided.replaced[-1]
    assert (site.kind, site.replacement.layer) == (kind, layer)
    assert ddf.Plan.from_json(decided.to_json()) == decided
    converted = convert(model, decided)
    assert type(converted).__name__ == type(model).__name__
    assert converted(IMAGE).shape == model(IMAGE).shape
    cost = measure(converted, IMAGE)
    assert (cost.params, cost.macs) == (decided.after.params, decided.after.macs)


def test_upsampling_is_not_listed_by_default():
    for name in ("nearest", "function", "pixel shuffle"):
        assert not any(site.upsampling for site in plan(REPLACED[name][0], IMAGE))
    (site,) = plan(REPLACED["transposed 2x2"][0], IMAGE).sites[1:]
    assert site.reason == "transposed convolution; DDF replaces ordinary ones"


def hooked():
    up = bilinear()
    up.register_forward_hook(lambda module, args, output: output)
    return up


class OwnUpsample(nn.Upsample):
    def forward(self, x):
        return super().forward(x) * 2


class Shared(net.Up):
    """One module for maps of different numbers of channels."""

    def forward(self, x):
        return self.up(self.first(x)).mean() + self.up(x).mean()


class Embedding(net.Interpolates):
    """Interpolates a parameter."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 8, 6, 8))

    def forward(self, x):
        return self.first(x) + F.interpolate(self.position, size=x.shape[-2:])


class OnImage(net.Interpolates):
    """Resizes the image."""

    def forward(self, x):
        return self.first(F.interpolate(x, scale_factor=2))


class PixelShuffleFunction(net.Interpolates):
    def forward(self, x):
        return F.pixel_shuffle(self.first(x), 2)


class Vectors(net.Interpolates):
    """Interpolates along one side."""

    def forward(self, x):
        return F.interpolate(self.first(x).flatten(2), scale_factor=2)


def overridden():
    model = net.Interpolates(scale_factor=2)
    model.forward = lambda x: F.interpolate(model.first(x), scale_factor=2)
    return model


LEFT = {
    "no whole number": (net.Up(bilinear(1.5)), "12x16 becomes 18x24: DDF-Up enlarges both sides by one whole number"),
    "other factors": (net.Up(bilinear((2, 3))), "enlarges both sides by one whole number"),
    "same size": (net.Interpolates(size=(12, 16)), "the size stays 12x16"),
    "smaller": (net.Interpolates(scale_factor=0.5), "makes maps smaller: 12x16 becomes 6x8"),
    "far": (net.Up(bilinear(9)), "9x would take 81 branches of filters; DDF-Up goes up to 8x: stack several"),
    "fixed size": (net.Up(nn.Upsample(size=(24, 32))), "brings maps of any size to a fixed one"),
    "a pixel": (
        net.Up(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Upsample(scale_factor=4))),
        "spreads a single pixel over the map",
    ),
    "another cubic": (net.Interpolates(scale_factor=2, mode="bicubic", antialias=True), "antialiased bicubic"),
    "hooks": (net.Up(hooked()), "has hooks that would be lost"),
    "own forward": (net.Up(OwnUpsample(scale_factor=2)), "OwnUpsample has a forward of its own"),
    "own forward of the caller": (overridden(), "in a forward that replaces that of Interpolates"),
    "several widths": (Shared(bilinear()), "called with 3 and 8 channels"),
    "embedding": (Embedding(), "interpolates a parameter"),
    "image": (OnImage(), "resizes the image"),
    "one channel": (net.Up(bilinear(), width=1), "works on a single channel"),
    "vectors": (Vectors(), "its input has 3 dimensions"),
    "shuffle as a function": (PixelShuffleFunction(), "called as a function; a pixel shuffle is replaced with its"),
    "not twice": (net.Up(transposed(8, 4, 3, 2, 1)), "its output is not 2 times its input: 12x16 becomes 23x31"),
    "no stride": (net.Up(transposed(8, 4, 3, 1, 1)), "its stride is 1: it does not upsample"),
    "dilated": (net.Up(transposed(8, 4, 2, 2, 0, dilation=2)), "dilated or not square"),
    "wide": (net.Up(transposed(8, 4, 12, 2, 5)), "its outputs read 7x7 pixels"),
    "would not save": (net.Up(transposed(8, 4, 2, 2, 0)), r"would not save: .* \(allow_growth=True replaces it\)"),
    "shuffle of an activation": (net.Shuffles(between=nn.ReLU()), "is not known to read one convolution's output"),
    "shuffle beside others": (net.ShufflesAndMore(), "is not known to read one convolution's output"),
    "strided before a shuffle": (
        net.Shuffles(nn.Conv2d(32, 64, 3, 2, 1)),
        "conv, has a stride, a dilation, or padding",
    ),
    "7x7 before a shuffle": (net.Shuffles(nn.Conv2d(32, 64, 7, padding=3)), "conv, is 7x7"),
    "groups before a shuffle": (
        net.Shuffles(net.conv(32, 32, groups=16)),
        "16 groups of its convolution, conv, do not",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_has_its_reason(name):
    model, reason = LEFT[name]
    site = the_site(model)
    assert site.action == "skip"
    assert re.search(reason, site.reason), site.reason


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"stem": True}, OnImage()),
        ({"stem": True}, net.Up(bilinear(), width=1)),
        ({"allow_growth": True}, LEFT["would not save"][0]),
    ],
)
def test_options_replace_what_is_left_alone_by_default(options, model):
    assert the_site(model, **options).action == "replace"


def test_heads_that_do_not_divide_the_channels():
    assert the_site(net.Up(bilinear()), heads=3).reason == "3 heads do not divide its 8 channels"


def test_a_large_transposed_convolution_saves():
    site = the_site(net.Up(transposed(64, 32, 4, 2, 1), width=64))
    assert (site.action, site.reason) == ("replace", "1x1, then DDF-Up")
    assert site.after.params < site.before.params
    assert site.after.macs < site.before.macs


# --- what starts as what ---

EXACT = {name: model for name, (model, kind, layer) in REPLACED.items() if layer == "DDFUp2d"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_interpolations_and_depthwise_ones_are_preserved_exactly(name):
    model, image = EXACT[name], torch.randn(2, 3, 12, 16)
    converted, done = preserved(model, image, combine="add" if "function" in name else "mul")
    (layer,) = done.layers
    with torch.no_grad():
        close = torch.allclose(converted(image), model(image), **near(torch.float32, model(image)))
    if name == "UpsamplingBilinear2d":  # align_corners=True
        assert not close
        assert 0.1 < layer.weight_error < 0.5
    else:
        assert close
        assert layer.weight_error == 0
    assert new_layers(converted)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("factor", [2, 3, 8])
def test_filters_of_interpolations_sum_to_one_and_aligned_corners_are_off(mode, factor):
    filters = interpolation_phases(mode, factor, 5)
    assert torch.allclose(filters.sum((1, 2)), torch.ones(factor**2, dtype=torch.float64))
    aligned, other = (
        F.interpolate(torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16), scale_factor=factor, mode=mode,
                      align_corners=flag)
        for flag in (True, False)
    )  # fmt: skip
    assert alignment_error(mode, factor) == pytest.approx(float((aligned - other).norm() / aligned.norm()))


SEPARABLE = {
    "2x2": transposed(8, 4, 2, 2, 0),
    "4x4": transposed(8, 4, 4, 2, 1),
    "3x3": transposed(8, 4, 3, 2, 1, 1),
    "groups": transposed(8, 4, 4, 2, 1, groups=2),
    "16x16, 8x": transposed(8, 4, 16, 8, 4),
    "7x7, 3x": transposed(8, 4, 7, 3, 2),
    "10x10": transposed(8, 4, 10, 2, 4, bias=False),
    "few inputs": transposed(4, 4, 4, 2, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEPARABLE)
@torch.no_grad()
def test_a_transposed_convolution_of_rank_one_is_preserved_exactly(name):
    conv = SEPARABLE[name]
    inputs, outputs = conv.weight.shape[:2]
    conv.weight.copy_(torch.randn(inputs, outputs, 1, 1) * torch.randn(1, outputs, *conv.kernel_size))
    model, image = net.Up(conv, width=conv.in_channels), torch.randn(1, 3, 5, 6)
    converted, done = preserved(model, image)
    assert isinstance(converted.up, DDFUpConv2d)
    assert done.layers[0].weight_error < shallow(torch.float32)
    assert torch.allclose(converted(image), model(image), **near(torch.float32, model(image)))


def test_the_best_fit_of_other_weights_is_the_nearest():
    for inputs, taps in ((6, 4), (4, 6)):
        weight = torch.randn(2, 3, inputs, taps, dtype=torch.float64)
        mix, filters = factorize_mix_first(weight)
        found = (mix[..., None] * filters[:, :, None] - weight).square().sum((2, 3))
        assert torch.allclose(found, torch.linalg.svdvals(weight)[..., 1:].square().sum(-1))


@torch.no_grad()
def test_a_shuffled_convolution_of_rank_one_is_preserved_but_for_what_its_biases_differ():
    conv = nn.Conv2d(32, 32, 5, padding=2, groups=2)
    phases = torch.randn(8, 1, 16, 1, 1) * torch.randn(8, 4, 1, 5, 5)
    conv.weight.copy_(phases.flatten(0, 1))
    conv.bias.copy_(torch.randn(8).repeat_interleave(4))
    model, image = net.Shuffles(conv), torch.randn(1, 3, 6, 7)
    converted, done = preserved(model, image)
    assert (done.layers[0].name, done.layers[0].kind) == ("shuffle", "pixel shuffle 2x")
    assert done.layers[0].weight_error < shallow(torch.float32)
    assert isinstance(converted.shuffle, nn.Identity)
    assert torch.allclose(converted(image), model(image), **near(torch.float32, model(image)))


def test_layers_start_random_without_a_recipe_and_need_affine_to_start_from_the_old_ones():
    model, image = net.Up(bilinear()), torch.randn(1, 3, 6, 6)
    converted = convert(model, example_input=image, upsample=True)
    assert not torch.allclose(converted(image), model(image), atol=1e-2)
    with pytest.raises(UsageError, match="convert with affine=True"):
        PRESERVE.initialize(converted, model)
    with pytest.raises(UsageError, match="the original has Identity at up, and not the upsampling"):
        PRESERVE.initialize(convert(model, example_input=image, **UP), net.Up(nn.Identity()))


# --- functions ---


def test_a_u_net_keeps_its_sizes_also_where_they_are_odd():
    model = net.UNet().eval()
    converted, _ = preserved(model)
    for height, width in ((12, 16), (24, 8), (13, 15)):
        image = torch.randn(1, 3, height, width)
        assert converted(image).shape == (1, 8, height, width)
        assert torch.allclose(converted(image), model(image), **near(torch.float32, model(image))) == (height != 13)
    assert type(converted) is not net.UNet
    assert class_of(converted) is net.UNet
    assert isinstance(converted, net.UNet)


def test_other_factors_than_the_recorded_one_are_torchs_own():
    model = net.Interpolates(scale_factor=2)
    converted, _ = preserved(model)
    image = torch.randn(1, 3, 6, 6)
    nn.init.ones_(converted.ddf_interpolate.channel_branch[0][4].mean)
    for arguments in ({"scale_factor": 3}, {"scale_factor": (2, 3)}, {"size": 18}, {"size": (12, 18)}):
        model.arguments = converted.arguments = arguments
        assert torch.equal(converted(image), model(image))
    model.arguments = converted.arguments = {"size": 12}
    assert not torch.allclose(converted(image), model(image), atol=1e-3)


def _note(called, name, layer, args, output):
    called.append(name)


@pytest.mark.slow
def test_calls_of_modules_inside_are_not_counted_for_the_one_around_them():
    model = net.Pyramid().eval()
    decided = plan(model, IMAGE, **UP, exclude=["up", "inner*"])
    assert [site.name for site in decided if site.upsampling] == [
        "interpolate()",
        "inner.interpolate()",
        "interpolate_1()",
        "up",
        "interpolate_2()",
    ]
    assert decided["inner.interpolate()"].calls == 2
    for exclude in (["up", "inner*"], ["interpolate*"], None):
        converted = convert(model, example_input=IMAGE, **UP, exclude=exclude).eval()
        PRESERVE.initialize(converted, model)
        image = torch.randn(1, 3, 5, 6)
        called = []
        for name, layer in new_layers(converted).items():
            layer.register_forward_hook(partial(_note, called, name))
        with torch.no_grad():
            assert torch.allclose(converted(image), model(image), **near(torch.float32, model(image)))
        expected = ["ddf_interpolate", "inner.ddf_interpolate", "up", "inner.ddf_interpolate", "ddf_interpolate_2"]
        left = {"up": "up", "inner*": "inner.ddf_interpolate", "interpolate*": "ddf_interpolate"}
        gone = [left[pattern] for pattern in exclude or []]
        assert called == [name for name in expected if not any(name.startswith(prefix) for prefix in gone)]


@pytest.mark.slow
def test_a_model_is_converted_bit_by_bit():
    model = net.Pyramid().eval()
    first = convert(model, example_input=IMAGE, **UP, include="interpolate()")
    decided = plan(first, IMAGE, **UP)
    names = [site.name for site in decided if site.upsampling or site.kind.startswith("DDF-Up")]
    assert names == ["ddf_interpolate", "inner.interpolate()", "interpolate_1()", "up", "interpolate_2()"]
    second = convert(first, decided).eval()
    PRESERVE.initialize(second, model)
    image = torch.randn(1, 3, 5, 6)
    assert torch.allclose(second(image), model(image), **near(torch.float32, model(image)))
    assert set(new_layers(second)) == {"ddf_interpolate", "inner.ddf_interpolate", "up", "ddf_interpolate_2"}


@pytest.mark.slow
def test_a_converted_caller_is_copied_pickled_traced_and_called_in_threads():
    model = net.Pyramid().eval()
    converted, _ = preserved(model)
    image = torch.randn(1, 3, 5, 6)
    with torch.no_grad():
        expected = converted(image)
        for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
            assert (type(other).__name__, type(other).__module__) == ("Pyramid", "support.networks")
            assert torch.equal(other(image), expected)
            assert other.ddf_interpolate is not converted.ddf_interpolate
        graph = convert(model, example_input=IMAGE, **UP, as_graph=True)
        assert isinstance(graph, fx.GraphModule)
        targets = [node.target for node in graph.graph.nodes if node.op == "call_module"]
        assert targets.count("inner.ddf_interpolate") == 2
        graph.load_state_dict(converted.state_dict())
        assert torch.equal(graph(image), expected)
        results = []
        threads = [threading.Thread(target=lambda: results.append(_many(converted, image))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected) for found in results for result in found)
    names = {name.split(".")[0] for name, _ in converted.named_parameters()}
    assert "ddf_interpolate" in names


@torch.no_grad()
def _many(model, image):
    return [model(image) for _ in range(5)]


@pytest.mark.long
def test_a_converted_caller_compiles_whole():
    converted, _ = preserved(net.Pyramid())
    image = torch.randn(1, 3, 5, 6)
    assert torch.allclose(
        torch.compile(converted, fullgraph=True)(image), converted(image), **near(torch.float32, converted(image))
    )


@pytest.mark.slow
def test_torchvisions_fpn_is_converted_and_preserved():
    with torch.device("meta"):
        weightless = torchvision.models.detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    fpn = torchvision.ops.FeaturePyramidNetwork([8, 8, 8], 8).eval()

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.fpn = nn.Conv2d(3, 8, 1), fpn

        def forward(self, x):
            x = self.first(x)
            return self.fpn({str(n): F.max_pool2d(x, 2**n) for n in range(3)})

    assert type(weightless.backbone.fpn) is type(fpn)
    model = Backbone().eval()
    converted, done = preserved(model, include="*interpolate*")
    assert [layer.name for layer in done.layers] == ["fpn.interpolate()", "fpn.interpolate_1()"]
    for image in (torch.randn(1, 3, 12, 16), torch.randn(2, 3, 13, 17)):
        before, after = model(image), converted(image)
        assert [feature.shape for feature in before.values()] == [feature.shape for feature in after.values()]
        assert all(torch.allclose(old, after[name], **near(torch.float32, old)) for name, old in before.items())


# --- artifacts, recipes, reports, the command line ---


def test_a_shuffle_and_its_convolution_are_one_decision():
    model = net.Shuffles(nn.Conv2d(32, 256, 3, padding=1))
    decided = plan(model, IMAGE, upsample=True)
    assert (decided["shuffle"].action, decided["shuffle"].convolution) == ("replace", "conv")
    assert decided["conv"].reason == "part of shuffle, which is replaced with it"
    decided["conv"].replace()
    with pytest.raises(UsageError, match="shuffle is replaced together with conv, which the plan replaces by itself"):
        convert(model, decided)
    decided["shuffle"].skip()
    assert convert(model, decided)(IMAGE).shape == model(IMAGE).shape
    only = plan(model, IMAGE, upsample=True, exclude="shuffle")
    assert [site.name for site in only.replaced] == ["conv"]
    assert plan(model, IMAGE, upsample=True, include="shuffle")["shuffle"].action == "replace"
    without = plan(model, IMAGE, upsample=True, exclude="conv")
    assert without["shuffle"].reason == "its convolution, conv, is excluded by 'conv'"
    assert not without.replaced


ARTIFACTS = {
    "module": lambda: net.Up(bilinear()),
    "function": net.Pyramid,
    "transposed": lambda: net.Up(transposed(8, 4, 4, 2, 1)),
    "shuffle": net.Shuffles,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARTIFACTS)
def test_artifacts_hold_upsampling(name, tmp_path):
    make = ARTIFACTS[name]
    converted, _ = preserved(make(), exclude=["inner*", "up"] if name == "function" else None)
    ddf.save(converted, tmp_path / "a")
    manifest = read_manifest(tmp_path / "a")
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.source.model_class.endswith(class_of(converted).__name__)
    fresh = make()
    restored = ddf.restore(fresh, tmp_path / "a").eval()
    assert restored is fresh
    image = torch.randn(1, 3, 6, 6)
    assert torch.equal(restored(image), converted(image))
    assert recorded(restored) == recorded(converted)
    with pytest.raises(ArtifactError, match="does not fit"):
        ddf.restore(fresh, tmp_path / "a")  # converted already


def test_a_restored_model_must_have_what_was_replaced(tmp_path):
    ddf.save(preserved(net.Up(bilinear()))[0], tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"up \(bilinear 4x\) has scale_factor 4.0, where the record has 2"):
        ddf.restore(net.Up(bilinear(4)), tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"up \(nearest 2x\) has mode nearest, where the record has bilinear"):
        ddf.restore(net.Up(nn.Upsample(scale_factor=2)), tmp_path / "a")
    with pytest.raises(ArtifactError, match="up: is ConvTranspose2d, where the record has Upsample"):
        ddf.restore(net.Up(transposed(8, 8, 2, 2, 0)), tmp_path / "a")
    ddf.save(preserved(net.Shuffles())[0], tmp_path / "b")
    with pytest.raises(ArtifactError, match="has scale_factor 4, where the record has 2"):
        ddf.restore(net.Shuffles(nn.Conv2d(32, 256, 3, padding=1), nn.PixelShuffle(4)), tmp_path / "b")
    ddf.save(preserved(net.Up(transposed(8, 4, 4, 2, 1)))[0], tmp_path / "c")
    with pytest.raises(ArtifactError, match="has out_channels 5, where the record has 4"):
        ddf.restore(net.Up(transposed(8, 5, 4, 2, 1)), tmp_path / "c")


def test_new_layers_take_over_where_they_stand():
    model = net.Interpolates(scale_factor=2).half().train()
    model.requires_grad_(False)
    converted = convert(model, example_input=IMAGE.half(), upsample=True)
    layer = converted.ddf_interpolate
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float16}
    assert layer.training
    assert all(parameter.requires_grad for parameter in layer.parameters())


def test_losses_and_groups_know_the_new_layers():
    model, image = net.Shuffles(), torch.randn(2, 3, 6, 6)
    converted, _ = preserved(model, image)
    result = Objective(converted, Losses(task=0, features=1), model)(image)
    result["loss"].backward()
    assert result["loss"] > 0
    up = converted.conv.up
    assert all(parameter.grad is not None for parameter in up.channel_branch[0][4].parameters())
    assert {name.split(".")[0] for name in trainable_names(converted, ["new"])} == {"conv"}
    converted, _ = preserved(net.UNet(), image)
    assert trainable_names(converted, ["new"]) == {
        name for name, _ in converted.named_parameters() if "ddf_interpolate" in name
    }


def test_calibration_leaves_upsampling_as_it_was_preserved():
    model = nn.Sequential(net.conv(3, 8), bilinear(), net.conv(8, 8), nn.BatchNorm2d(8)).eval()
    image = torch.randn(2, 3, 8, 8)
    converted = convert(model, example_input=image, **UP, stem=True).eval()
    done = initialize(converted, Initialize(method="calibrate", steps=1, num_images=2), model, [image])
    assert [layer.fitted_error is None for layer in done.layers] == [False, True, False]


@pytest.mark.slow
def test_comparisons_and_budgets_count_upsampling():
    model = net.UNet()
    converted, _ = preserved(model)
    found = ddf.compare(model, converted, IMAGE, latency=False)
    changed = {layer.name: (layer.kind_before, layer.kind_after) for layer in found.layers if layer.changed}
    assert changed == dict.fromkeys(("interpolate()", "interpolate_1()"), ("functional bilinear 2x", "DDF-Up 2x"))
    assert "2 of 7 layers replaced" in str(found)
    budget = plan(model, IMAGE, upsample=True, target_macs=1)
    assert not budget.replaced


@pytest.mark.slow
def test_the_command_line_prints_upsampling_in_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["inspect", "support.networks:UNet", "--input-size", "3", "16", "16", "--upsample"]
    assert cli.run(arguments) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "2 of 7 layers replaced" in printed
    assert re.search(r"interpolate_1\(\) +DDF-Up 2x +0 -> ", printed)
    assert cli.run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["upsample"]
    assert "functional bilinear 2x" in {site["kind"] for site in document["sites"]}
