"""What new layers start from: random weights, the old ones (preserve), or those fitted on images (calibrate)."""

from __future__ import annotations

import copy
import json

import numpy
import PIL.Image
import pytest
import timm
import torch
from support import networks as net
from support.recipes import EVERYTHING, Classifier, converted_classifier
from support.tolerances import far, near
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

import ddf_convert as ddf
from ddf_convert import cli
from ddf_convert.artifacts import artifact
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d
from ddf_convert.recipes import factorization
from ddf_convert.recipes.calibrate import BatchNormCalibrator, sample_positions
from ddf_convert.recipes.losses import relative_error
from ddf_convert.recipes.pairs import ConvPair, find_pairs

PRESERVE, CALIBRATE, PAPER = (ddf.recipes.load(name) for name in ("preserve", "calibrate", "paper"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_output(model, original, image):
    with torch.no_grad():
        expected = original(image)
        torch.testing.assert_close(model(image), expected, **near(torch.float32, expected, terms=9 * 32))


# --- preserve ---

DEPTHWISE = {
    "plain": {},
    "bias": {"bias": True},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2},
    "no padding": {"padding": 0},
    "circular": {"padding_mode": "circular"},
    "reflected": {"padding_mode": "reflect"},
    "5x5": {"kernel_size": 5, "padding": 2},
}


@pytest.mark.parametrize(("case", "combine"), [("plain", "add"), *((case, "mul") for case in DEPTHWISE)])
def test_depthwise_convolutions_are_preserved_exactly(case, combine):
    options = {"kernel_size": 3, "padding": 1, "bias": False, **DEPTHWISE[case]}
    original = net.around(nn.Conv2d(32, 32, groups=32, **options))
    image = torch.randn(2, 3, 13, 17)
    model = PRESERVE.convert(original, image, **EVERYTHING, kernel_size=(3, 5), combine=combine, heads=2)
    assert isinstance(model[1], DDF2d)
    done = PRESERVE.initialize(model, original)
    assert [layer.weight_error for layer in done.layers] == [0.0]
    assert_same_output(model, original, image)


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_standardized_weights_are_preserved_as_the_convolution_uses_them(kind):
    conv = kind(32, 32, 3, padding=1, groups=32, bias=True).eval()
    with torch.no_grad():
        conv.bias.normal_()
    original, image = net.around(conv), torch.randn(1, 3, 9, 9)
    model = PRESERVE.convert(original, image, **EVERYTHING)
    PRESERVE.initialize(model, original)
    assert_same_output(model, original, image)


def test_functional_convolutions_are_preserved():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(3, 1, 3, 3)), nn.Parameter(torch.randn(3))

        def forward(self, image):
            return nn.functional.conv2d(image, self.kernel, self.shift, padding=1, groups=3)

    original, image = Depthwise(), torch.randn(1, 3, 8, 8)
    model = PRESERVE.convert(original, image, **EVERYTHING, functional=True)
    assert PRESERVE.initialize(model, original).layers[0].weight_error == 0
    assert_same_output(model, original, image)


DENSE = {
    "dense": ({"in_channels": 32, "out_channels": 32}, {}),
    "wider": ({"in_channels": 32, "out_channels": 48, "bias": True}, {}),
    "grouped": ({"in_channels": 32, "out_channels": 64, "groups": 4}, {}),
    "depthwise, multiplied": ({"in_channels": 32, "out_channels": 64, "groups": 32}, {}),
    "no 1x1 of its own": ({"in_channels": 32, "out_channels": 32}, {"mixing": "never"}),
    "grouped, no 1x1 of its own": ({"in_channels": 32, "out_channels": 32, "groups": 4}, {"mixing": "never"}),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_convolutions_get_the_best_factors(case):
    """The layer computes the convolution with those factors, and reports the error of the best of rank one."""
    conv_options, options = DENSE[case]
    conv = nn.Conv2d(kernel_size=3, padding=1, **conv_options)
    original, image = net.around(conv), torch.randn(1, 3, 8, 8)
    model = PRESERVE.convert(original, image, **EVERYTHING, **options)
    (layer,) = PRESERVE.initialize(model, original).layers
    (pair,) = find_pairs(model, original)
    weight = pair.weight()
    if pair.mix is None:
        kept = weight.diagonal(dim1=1, dim2=2).square().sum()
    else:
        kept = torch.linalg.svdvals(weight.transpose(1, 2))[..., 0].square().sum()
    assert layer.weight_error == pytest.approx((1 - kept / weight.square().sum()).clamp_min(0).sqrt().item(), abs=1e-6)
    product = factorization.factorize_weights(weight, pair.mix is not None).product()
    with torch.no_grad():
        conv.weight.copy_(product.reshape_as(conv.weight))
        torch.testing.assert_close(model(image), original(image), **far(torch.float32, original(image)))


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_gradients_reach_the_scales_first_and_everything_after_a_step(combine):
    original, image = net.around(net.conv(groups=32)), torch.randn(2, 3, 8, 8)
    model = PRESERVE.convert(original, image, **EVERYTHING, combine=combine).train()
    PRESERVE.initialize(model, original)
    layer = model[1]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def without_gradient():
        optimizer.zero_grad()
        model(image).square().sum().backward()
        return {name for name, p in layer.named_parameters() if not p.grad.any()}

    assert {name.rpartition(".")[2] for name in without_gradient()} == {"weight", "bias"}  # of the branches' layers
    optimizer.step()
    assert without_gradient() == set()


def test_paper_draws_new_weights_and_leaves_the_rest():
    original, model = converted_classifier()
    PRESERVE.initialize(model, original)
    before = state_of(model)
    assert PAPER.initialize(model).layers == ()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"stem", "wide", "deep"}
    assert model.deep.channel_branch[4].std.std().item() == pytest.approx(2**0.5 / 3, rel=0.3)
    assert not model.deep.channel_branch[4].mean.any()


INVALID = {
    "no original": (lambda m, o: PRESERVE.initialize(m), "give the original"),
    "not converted": (lambda m, o: PRESERVE.initialize(o, o), "was not converted"),
    "the converted one twice": (lambda m, o: PRESERVE.initialize(m, m), "before conversion"),
    "another": (lambda m, o: PRESERVE.initialize(m, net.around(net.conv())), "does not fit"),
    "no images": (lambda m, o: CALIBRATE.initialize(m, o), "looks at images"),
    "empty": (lambda m, o: CALIBRATE.initialize(m, o, []), "no images"),
    "not batches": (lambda m, o: CALIBRATE.initialize(m, o, [torch.ones(3, 8, 8)]), "batches"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", INVALID)
def test_a_model_is_unchanged_if_it_cannot_be_initialized(case):
    original, model = converted_classifier()
    before = state_of(model)
    call, words = INVALID[case]
    with pytest.raises(UsageError, match=words):
        call(model, original)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_without_shifts_say_how_to_get_them():
    original = net.Residual()
    model = ddf.convert(original, example_input=torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match="affine=True"):
        PRESERVE.initialize(model, original)


# --- calibrate ---


def test_sampled_patches_are_those_of_the_convolution():
    for options in ({}, {"stride": 2}, {"dilation": 2, "padding": 3}, {"padding_mode": "reflect"}):
        conv = nn.Conv2d(5, 6, 3, **{"padding": 1, "bias": False, **options})
        layer = DDFConv2d(5, 6, affine=True, **{**{"padding": 1, "stride": 1, "dilation": 1}, **options})
        images, pair = torch.randn(2, 5, 11, 9), ConvPair("conv", "conv", conv, layer)
        with torch.no_grad():
            patches, outputs = sample_positions(pair, images, conv(images), count=13, seed=1)
        assert patches.shape == (26, 5, 9)
        found = patches.flatten(1) @ conv.weight.detach().flatten(1).T
        torch.testing.assert_close(found, outputs, **near(torch.float32, outputs, terms=9 * 5))


def test_alternating_least_squares_recovers_factors_and_improves_on_the_weights():
    patches = torch.randn(3000, 2, 5, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)

    def moments(weight):
        targets = torch.einsum("goit,ngit->ngo", weight, patches)
        return factorization.Moments(
            torch.einsum("ngit,ngju->gitju", patches, patches) / len(patches),
            torch.einsum("ngo,ngit->goit", targets, patches) / len(patches),
        )

    def error(factors, weight):
        found, expected = (torch.einsum("goit,ngit->ngo", each, patches) for each in (factors.product(), weight))
        return ((found - expected).square().sum() / expected.square().sum()).sqrt().item()

    exact = factorization.factorize_weights(torch.randn(2, 6, 5, 9, dtype=torch.float64), True).product()
    assert error(factorization.factorize_moments(moments(exact), exact, True), exact) < 1e-6
    weight = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    preserved = error(factorization.factorize_weights(weight, True), weight)
    assert error(factorization.factorize_moments(moments(weight), weight, True), weight) < 0.95 * preserved


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["dense", "never"])
def test_calibration_brings_every_layer_nearer_to_the_original(mixing):
    torch.manual_seed(2)
    original = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), net.conv(16, 16), nn.BatchNorm2d(16), nn.ReLU(), net.conv(16, 16, bias=False)
    ).eval()
    images = [torch.nn.functional.avg_pool2d(torch.randn(8, 3, 24, 24), 3, 1) for _ in range(3)]
    held_out = torch.nn.functional.avg_pool2d(torch.randn(8, 3, 24, 24), 3, 1)
    options = {"mixing": mixing, "allow_growth": True}
    preserved = CALIBRATE.convert(original, images[0], **options).eval()
    calibrated = CALIBRATE.convert(original, images[0], **options).eval()
    PRESERVE.initialize(preserved, original)
    state = state_of(original)
    lines = []
    done = CALIBRATE.initialize(calibrated, original, iter(images), num_images=20, steps=6, say=lines.append)
    assert done.images == 20
    assert [layer.name for layer in done.layers] == ["2", "5"]
    assert all(layer.fitted_error < layer.output_error for layer in done.layers)
    assert len(lines) == 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    assert not calibrated.training
    with torch.no_grad():
        errors = [relative_error(model(held_out), original(held_out)).item() for model in (preserved, calibrated)]
    assert errors[1] < 0.8 * errors[0]
    assert all(p.requires_grad and p.grad is None for p in calibrated.parameters())


def test_calibration_keeps_what_is_exact():
    original = net.around(net.conv(groups=32, bias=False)).eval()
    images = [torch.randn(4, 3, 12, 12)]
    model = CALIBRATE.convert(original, images[0], **EVERYTHING)
    (layer,) = CALIBRATE.initialize(model, original, images, steps=3).layers
    assert layer.fitted_error < 1e-5


@pytest.mark.parametrize("own_statistics", [True, False])
def test_batch_norms_put_out_what_the_original_puts_out(own_statistics):
    """With features of another scale and mean, and whether or not the images are what the original was trained on."""
    original = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))
    batches = [torch.randn(16, 3, 6, 6) + 1 for _ in range(2)]
    if own_statistics:
        for norm in (original[1], original[4]):
            norm.momentum = None  # the mean of all batches
        for batch in batches:
            original(batch)
    original.eval()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[0].bias.add_(2)
    before = model[1].running_mean.clone()
    norms = BatchNormCalibrator(model, original)
    assert norms.calibrate(batches, model[3], original[3]) == ["1"]
    assert norms.calibrate(batches) == ["4"]
    with torch.no_grad():
        images = torch.cat(batches)
        torch.testing.assert_close(model(images), original(images), rtol=0.05, atol=0.1)
        if own_statistics:
            torch.testing.assert_close(model[1].running_mean, model[0](images).mean((0, 2, 3)), rtol=0.02, atol=0.02)
    assert not torch.equal(model[1].running_mean, before)
    assert torch.equal(original[1].running_mean, before)


# --- saved with the model ---


@pytest.mark.slow
def test_the_recipe_and_the_original_are_saved_with_the_model(tmp_path):
    original, image = timm.create_model("resnet10t", num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    recipe = ddf.recipes.load("quick")
    model = recipe.convert(original, image).eval()
    recipe.initialize(model, original)
    ddf.save(model, tmp_path / "kept", original=original)
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert manifest["conversion"]["recipe"]["name"] == "quick"
    again = ddf.load(tmp_path / "kept")
    assert ddf.recipes.Recipe.model_validate(again.ddf_conversion.recipe) == recipe
    teacher = artifact.load_original(tmp_path / "kept")
    with torch.no_grad():
        assert torch.equal(teacher(image), original(image))
        assert torch.equal(again(image), model(image))
    ddf.save(model, tmp_path / "kept")  # without the original this time
    assert artifact.load_original(tmp_path / "kept") is None
    assert not (tmp_path / "kept" / "original.safetensors").exists()


def test_the_original_of_a_model_that_only_its_user_can_build(tmp_path):
    original, model = converted_classifier()
    ddf.save(model, tmp_path / "own", original=original)
    with pytest.raises(ddf.ArtifactError, match="only you can build"):
        artifact.load_original(tmp_path / "own")
    teacher = artifact.load_original(tmp_path / "own", Classifier())
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(teacher(image), original(image))
    with pytest.raises(ddf.ArtifactError, match="do not fit"):
        artifact.load_original(tmp_path / "own", Classifier(classes=7))


# --- on the command line ---

SIZE = ["--input-size", "3", "32", "32"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; returns its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        code = cli.run(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_recipes_are_listed_and_shown(run):
    code, out, _ = run("recipes")
    assert code == 0
    assert all(name in out for name in ddf.recipes.names())
    assert json.loads(run("recipes", "list", "--json")[1])["recipes"][0]["name"] == ddf.recipes.names()[0]
    assert ddf.recipes.parse(run("recipes", "show", "distill")[1]) == ddf.recipes.load("distill")
    shown = json.loads(run("recipes", "show", "distill", "--json")[1])
    assert list(shown) == ["name", "description", "conversion", "initialize", "stages"]
    assert ddf.recipes.Recipe.model_validate(shown) == ddf.recipes.load("distill")
    assert run("recipes", "show", "destill")[2].endswith("did you mean distill?\n")


@pytest.mark.slow
def test_convert_initializes_as_the_recipe_says(run, caplog):
    code, out, err = run("convert", "resnet10t", "-o", "out", "--recipe", "quick", *SIZE, "--json")
    assert code == 0, err
    assert "random here" in caplog.text  # resnet10t without weights has nothing worth preserving
    report = json.loads(out)
    assert report["recipe"] == "quick"
    assert report["config"]["affine"]
    layers = report["initialised"]["layers"]
    assert {layer["name"] for layer in layers} == {s["name"] for s in report["sites"] if s["action"] == "replace"}
    assert all(0 < layer["weight_error"] < 1 for layer in layers)
    with open("out/report.json") as file:
        assert json.load(file) == report
    model, original = ddf.load("out"), artifact.load_original("out")
    assert torch.equal(model.conv1[0].weight, original.conv1[0].weight)
    channel = model.get_submodule(layers[0]["name"]).ddf.channel_branch[4]
    assert not channel.std.any()
    assert channel.mean.any()


def test_options_of_the_command_line_override_the_recipe(run, tmp_path):
    text = "name: mine\nconversion: {affine: true, mixing: always, heads: 2, exclude: ['layer1*']}\n"
    (tmp_path / "mine.yaml").write_text(text + "initialize: {method: preserve}\n")
    arguments = ["inspect", "resnet10t", *SIZE, "--json", "--recipe", "mine.yaml"]
    report = json.loads(run(*arguments, "--mixing", "auto", "--exclude", "layer2*")[1])
    assert (report["config"]["mixing"], report["config"]["heads"], report["config"]["affine"]) == ("auto", 2, True)
    reasons = {site["name"]: site["reason"] for site in report["sites"]}
    assert "excluded" in reasons["layer2.0.conv1"]
    assert "excluded" not in reasons["layer1.0.conv1"]


@pytest.mark.slow
def test_convert_calibrates_on_a_folder_of_images(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = numpy.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "short.yaml").write_text(CALIBRATE.to_yaml().replace("steps: 16", "steps: 2"))
    code, out, err = run(
        *("convert", "test_resnet", "-o", "out", "--recipe", "short.yaml", "--images", "photos", *SIZE)
    )
    assert code == 0, err
    assert "on 3 images" in out
    layers = json.loads((tmp_path / "out" / "report.json").read_text())["initialised"]["layers"]
    assert all(layer["fitted_error"] <= layer["output_error"] for layer in layers)


WRONG = {
    "no such recipe": (["--recipe", "distil"], "did you mean distill"),
    "no images": (["--recipe", "calibrate"], "give --images FOLDER"),
    "images for nothing": (["--recipe", "preserve", "--images", "."], "recipes that calibrate"),
    "no such images": (["--recipe", "calibrate", "--images", "nowhere"], "nowhere"),
    "empty folder": (["--recipe", "calibrate", "--images", "."], "no images"),
    "no shifts": (["--recipe", "bad.yaml"], "conversion.affine: true"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_with_a_recipe_is_one_line_and_nothing_is_written(case, run, tmp_path):
    options, words = WRONG[case]
    (tmp_path / "bad.yaml").write_text("name: bad\ninitialize: {method: preserve}\n")
    code, out, err = run("convert", "resnet10t", "-o", "out", *SIZE, *options)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()
