"""Captured filters, their measures, pictures of them; the command `visualize`."""

from __future__ import annotations

import io
import json
import math
import sys

import numpy
import PIL.Image
import pytest
import timm
import torch
from torch import nn

import ddf_convert as ddf
from ddf_convert import cli, visualize
from ddf_convert.layers import DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d
from ddf_convert.visualize.layer_filters import measure_dynamics

MODEL = "test_resnet"  # timm's smallest


class Everything(nn.Module):
    """One of each kind of layer; one of them is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout())
        self.conv = DDFConv2d(8, 12, kernel_size=5, heads=2)
        self.down = DDF2d(12, stride=2, combine="add", padding="same")
        self.twice = DDF2d(12, affine=True, nonlinearity="linear")
        self.up = DDFUpConv2d(12, 4, 2)
        self.guided = DDFUp2d(4, 2, guide_channels=8, heads=2, affine=True)

    def forward(self, image):
        fine = self.stem(image)
        coarse = self.twice(self.twice(self.down(self.conv(fine))))
        return self.guided(self.up(coarse), fine)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Everything()


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def seen(model, images):
    return visualize.filters(model, images)


def test_every_call_of_every_layer_is_captured(seen):
    assert [(layer.title, layer.kind, layer.size, layer.spatial.shape[1], layer.kernel_size) for layer in seen] == [
        ("conv", "DDFConv2d", (8, 12), 2, 5),
        ("down", "DDF2d", (4, 6), 1, 3),
        ("twice", "DDF2d", (4, 6), 1, 3),
        ("twice (call 2)", "DDF2d", (4, 6), 1, 3),
        ("up", "DDFUpConv2d", (8, 12), 1, 3),
        ("guided", "DDFUp2d", (16, 24), 2, 3),
    ]


def test_captured_filters_are_those_that_the_operator_applies(model, images, seen):
    """What a layer puts out comes from the filters caught, and from its input."""
    caught = {}

    def keep(layer, inputs, output):
        caught[layer] = inputs[0], output

    layers = {"conv": model.conv.ddf, "down": model.down, "up": model.up.up, "guided": model.guided}
    handles = [layer.register_forward_hook(keep) for layer in layers.values()]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    for found in seen:
        if found.name == "twice":
            continue
        layer = layers[found.name]
        input, output = caught[layer]
        step = found.scale_factor
        spatial = found.by_branch().unflatten(-1, (found.size[0] // step, -1)).flatten(1, 3)  # as DDF-Up takes them
        before = ddf.ops.ddf(
            nn.functional.pad(input, (0, 1, 0, 1)) if found.name == "down" else input,
            found.channel.flatten(1, 2),
            spatial,
            stride=getattr(layer, "stride", (1, 1))[0],
            padding=0 if found.name == "down" else found.kernel_size // 2,
            combine=found.combine,
            upscale_factor=step,
        )
        torch.testing.assert_close(before, output)


def test_the_model_is_left_as_it_was(model, images):
    model.train()
    model.conv.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    visualize.filters(model, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(RuntimeError):
        visualize.filters(model, images[:, :2])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_wrapped_and_compiled_models_are_unwrapped(model, images, seen):
    compiled = torch.compile(nn.Sequential(model), backend="eager").eval()
    with torch.no_grad():
        compiled(images)  # before there are hooks
    for wrapped in (compiled, nn.DataParallel(model)):
        found = visualize.filters(wrapped, images)
        assert [layer.name.removeprefix("0.") for layer in found] == [layer.name for layer in seen]
        assert all(torch.equal(one.spatial, two.spatial) for one, two in zip(found, seen, strict=True))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.conv = DDF2d(3), nn.Conv2d(3, 3, 1)

    def forward(self, image):
        return self.conv(image)


@pytest.mark.parametrize(("model", "words"), [(nn.Conv2d(3, 4, 3), "no DDF layers"), (Unused(), "called none")])
def test_models_without_called_ddf_layers_are_refused(model, words):
    with pytest.raises(ddf.UsageError, match=words):
        visualize.filters(model, torch.rand(1, 3, 8, 8))


# --- numbers ---


def applied(spatial, channel, combine):
    """(B, N, G, C / G, T, P): every single filter."""
    spatial = spatial.double()[:, :, :, None]
    channel = channel.double().unflatten(2, (spatial.shape[2], -1))[..., None]
    return spatial * channel if combine == "mul" else spatial + channel


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("count", [1, 3])
def test_dynamics_are_the_loss_of_replacing_by_means(combine, count):
    generator = torch.Generator().manual_seed(0)
    spatial = torch.rand(count, 2, 2, 9, 20, generator=generator) + torch.rand(1, 2, 2, 9, 20, generator=generator)
    channel = torch.randn(count, 2, 6, 9, generator=generator) + torch.rand(1, 2, 6, 9, generator=generator)
    found = measure_dynamics(spatial, channel, combine)
    filters = applied(spatial, channel, combine)
    by_head = channel.unflatten(2, (2, 3))

    def lost(without):
        return float(((filters - without).square().sum() / filters.square().sum()).sqrt())

    same_pixels = applied(spatial.mean(-1, keepdim=True).expand_as(spatial), channel, combine)
    same_channels = applied(spatial, by_head.mean(3, keepdim=True).expand_as(by_head).flatten(2, 3), combine)
    same_images = applied(spatial, channel.mean(0, keepdim=True).expand_as(channel), combine)
    assert found.total == pytest.approx(lost(filters.mean((0, 5), keepdim=True)))
    assert found.pixels == pytest.approx(lost(same_pixels))
    assert found.channels == pytest.approx(lost(same_channels))
    assert found.images == (None if count == 1 else pytest.approx(lost(same_images)))
    assert 0 < found.pixels <= found.total < 1


@pytest.mark.parametrize("combine", ["mul", "add"])
def test_fixed_filters_are_not_dynamic(combine):
    layer = DDF2d(4, combine=combine, affine=True)
    layer.fix(torch.randn(4, 3, 3))
    (found,) = visualize.filters(layer, torch.rand(2, 4, 6, 6))
    assert found.untouched
    assert found.dynamics.to_dict() == {"total": 0, "pixels": 0, "images": 0, "channels": found.dynamics.channels}
    assert found.dynamics.channels > 0.5
    assert not visualize.components(found).changes
    with torch.no_grad():
        layer.spatial_branch[1].std.fill_(0.1)
    (found,) = visualize.filters(layer, torch.rand(2, 4, 6, 6))
    assert not found.untouched
    assert found.dynamics.pixels > 0


def test_filters_of_zeros_are_not_dynamic():
    found = measure_dynamics(torch.zeros(1, 1, 1, 9, 4), torch.zeros(1, 1, 2, 9), "mul")
    assert (found.total, found.pixels, found.images, found.channels) == (0, 0, None, 0)


@pytest.mark.parametrize("name", ["conv", "down", "guided"])
def test_maps_are_of_the_applied_filters(seen, name):
    layer = next(each for each in seen if each.name == name)
    image, head = 1, layer.heads - 1
    filters = applied(layer.by_branch(), layer.channel.flatten(3), layer.combine)[image, :, head]  # (N, C / G, T, P)
    step, (height, width) = layer.scale_factor, layer.size

    def as_map(squares):  # (N, C / G, T, P)
        values = squares.sum(2).mean(1).sqrt().unflatten(-1, (height // step, width // step))
        return nn.functional.pixel_shuffle(values, step)[0]

    norm = as_map(filters.square())
    torch.testing.assert_close(visualize.strength(layer, image, head), norm / norm.mean())
    differences = as_map((filters - filters.mean(-1, keepdim=True)).square())
    expected = differences / norm.square().mean().sqrt()
    torch.testing.assert_close(visualize.change(layer, image, head), expected)


def test_components_recover_three_shapes():
    """Sums of three shapes are seen as just those; what branches differ in everywhere is not seen."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.linalg.qr(torch.randn(9, 3, generator=generator))[0].T
    amounts = torch.randn(3, 6, 8, generator=generator) * torch.tensor([3.0, 2.0, 1.0]).view(-1, 1, 1)
    spatial = torch.einsum("chw,ct->thw", amounts, shapes)
    spatial[:, ::2] += 5  # those of two of the four branches
    layer = visualize.LayerFilters(
        "up", "DDFUp2d", spatial.view(1, 1, 3, 3, 6, 8), torch.ones(1, 4, 2, 3, 3), "mul", scale_factor=2
    )
    found = visualize.components(layer)
    assert sum(found.shares) == pytest.approx(1)
    assert list(found.shares) == sorted(found.shares, reverse=True)
    taps = found.filters.flatten(1)
    torch.testing.assert_close(taps @ taps.T, torch.eye(3, dtype=taps.dtype))
    centered = layer.by_branch()[0, :, 0].double()
    centered -= centered.mean(-1, keepdim=True)
    again = torch.nn.functional.pixel_unshuffle(found.scores[:, None], 2).squeeze(1).flatten(2)  # (3, N, P)
    torch.testing.assert_close(torch.einsum("cnp,ct->ntp", again, taps), centered, atol=1e-6, rtol=1e-6)
    colors = found.colors()
    assert colors.shape == (6, 8, 3)
    assert 0 <= colors.min() < colors.max() <= 1


# --- pictures ---


def texts(figure):
    def below(part):
        yield part
        for child in part.get_children():
            yield from below(child)

    return [artist.get_text() for artist in below(figure) if hasattr(artist, "get_text") and artist.get_text()]


def test_a_picture_has_a_row_for_each_chosen_layer(seen):
    photo = torch.rand(16, 24, 3)
    figure = visualize.picture(seen, photo, [seen[0], seen[-1]], image=1, head=1, branch=3, heading="these")
    said = texts(figure)
    assert "these" in said
    assert sum(text.startswith("conv   (DDFConv2d, 8 channels, 5x5, 8x12 pixels, head 1 of 2)") for text in said) == 1
    assert sum(text.startswith("guided   (DDFUp2d") for text in said) == 1
    assert "spatial filters, 3x3 taps, branch 3" in said
    assert "shape of the filter, 2x2 branches" in said
    assert {layer.title for layer in seen} <= set(said)  # the bars' names
    figure = visualize.picture(seen, None, [seen[1]], taps=[(0, 2), (1, 1)])
    assert {"spatial filter, tap 0,2", "spatial filter, tap 1,1"} < set(texts(figure))


@pytest.mark.parametrize(
    "wrong", [{"image": 2}, {"head": 1}, {"branch": 4}, {"taps": [(0, 3)]}], ids=lambda wrong: next(iter(wrong))
)
def test_indices_out_of_range_are_refused(seen, wrong):
    with pytest.raises(ValueError, match=r"from 0|there is no"):
        visualize.picture(seen, None, [seen[-2]], **wrong)


def test_layers_are_spread_from_the_first_to_the_last(seen):
    assert visualize.spread(seen, 9) == seen
    assert [layer.title for layer in visualize.spread(seen, 3)] == [seen[0].title, seen[2].title, seen[5].title]


# --- the command ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visualize")
    torch.manual_seed(0)
    original = timm.create_model(MODEL)
    recipe = ddf.recipes.load("preserve")
    fresh = recipe.convert(original, torch.zeros(1, 3, 32, 32))
    recipe.initialize(fresh, original)
    ddf.save(fresh, folder / "fresh")
    names = [name for name, module in fresh.named_modules() if isinstance(module, DDFConv2d)]
    with torch.no_grad():
        fresh.get_submodule(names[1]).ddf.spatial_branch[1].std.fill_(0.2)  # as if one layer had learned something
    ddf.save(fresh, folder / "converted")
    random = numpy.random.default_rng(0)
    for name, mode, size in (("photo.png", "RGB", (40, 30)), ("gray.png", "L", (30, 50))):
        shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
        PIL.Image.fromarray(random.integers(0, 255, shape, dtype=numpy.uint8), mode=None).save(folder / name)
    (folder / "text.png").write_text("no image")
    (folder / "own.py").write_text(
        "import collections\nfrom torch import nn\nfrom ddf_convert.layers import DDF2d\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 4, 1), DDF2d(4, heads=2))\n"
        "def plain(): return nn.Conv2d(3, 4, 3)\n"
        "def bracketed():\n"
        "    layers = {'conv1': DDF2d(3), 'conv[1]': DDF2d(3, heads=3)}\n"
        "    return nn.Sequential(collections.OrderedDict(layers))\n"
    )
    return folder, names


@pytest.fixture(autouse=True)
def _here(request, monkeypatch):
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place")[0])


SIZE = ("--input-size", "3", "32", "32")


def ran(capsys, *arguments):
    code = cli.run(["visualize", *arguments, "--device", "cpu"])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_command_draws_a_picture_and_prints_a_table(place, capsys):
    names = place[1]
    code, out, err = ran(capsys, "converted", "photo.png", "-o", "a.png", "--layer", names[1], "--tap", "1,1", *SIZE)
    assert code == 0, err
    lines = out.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0] in names]
    assert sorted(row[0] for row in rows) == sorted(names)
    assert rows[0][0] == names[1]  # the most dynamic comes first
    assert all("fixed" in row for row in rows[1:])
    told = " ".join(out.split())
    assert f"In {len(names) - 1} of {len(names)} layers the spatial filters are the same everywhere: nothing" in told
    with PIL.Image.open("a.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500


def test_a_layer_with_brackets_in_its_name_is_found_by_it(place, capsys):
    options = ("--layer", "conv[1]", "--head", "2", *SIZE)  # conv1 has a single head
    code, _, err = ran(capsys, "own:bracketed", "photo.png", "--json", *options)
    assert code == 0, err


def test_json_output_is_only_json(place, capsys):
    names = place[1]
    code, out, err = ran(capsys, "fresh", "photo.png", "gray.png", "--json", *SIZE)
    assert code == 0, err
    document = json.loads(out)
    assert document["images"] == ["photo.png", "gray.png"]
    assert document["picture"] is None
    assert sorted(layer["name"] for layer in document["layers"]) == sorted(names)
    assert all(layer["untouched"] and layer["dynamic"]["total"] == 0 for layer in document["layers"])
    assert document["notes"] == [
        "in all layers the spatial filters are the same everywhere: nothing dynamic was learned yet"
    ]


def test_own_models_and_plain_images(place, capsys):
    code, out, err = ran(capsys, "own:net", "gray.png", "--plain", "--json", "--head", "1", *SIZE)
    assert code == 0, err
    (layer,) = json.loads(out)["layers"]
    assert layer["heads"] == 2
    assert layer["dynamic"]["images"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("converted", "text.png"), "text.png: is not an image"),
        (("converted", "none.png"), "none.png: the photo cannot be read: No such file"),
        (("converted", "."), ".: is a folder; give an image"),
        (("own:plain", "photo.png"), "own:plain has no DDF layers"),
        (("nothing", "photo.png"), "unknown model 'nothing'"),
        (("converted", "photo.png", "--layer", "NEAR"), "matches no DDF layer; did you mean"),
        (("converted", "photo.png", "--layer", "re:("), "not a regular expression"),
        (("converted", "photo.png", "--head", "1"), "has 1 head, number 0"),
        (("converted", "photo.png", "--tap", "3,0"), "taps from 0,0 to 2,2"),
        (("converted", "photo.png", "--tap", "center"), "give a row and a column"),
        (("converted", "photo.png", "--checkpoint", "photo.png"), "converted holds its weights"),
        (("own:net", "photo.png", "--checkpoint", "none.pth"), "no such file"),
        (("own:net", "photo.png", "--model", "own:net"), "--model is for a converted folder"),
        (("own:net", "photo.png", "--input-size", "1", "32", "32"), "does not take images of 1 x 32 x 32"),
        (("converted", "photo.png", "-o", "a.jpg"), "give a name that ends in .png"),
        (("converted", "photo.png", "-o", "none/a.png"), "there is no folder none"),
        (("converted", "photo.png", "-o", "converted"), "is a folder; give a file"),
    ],
)
def test_mistakes_are_one_line(place, arguments, message, capsys):
    near = f"{place[1][0]}x"
    code, out, err = ran(capsys, *(near if argument == "NEAR" else argument for argument in arguments))
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_missing_matplotlib_is_reported_first(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = ran(capsys, "no-model", "photo.png", "-o", "new.png")
    assert (code, out) == (2, "")
    assert "--output needs matplotlib: pip install 'ddf-convert[plot]'" in " ".join(err.split())


def test_shown_undoes_the_normalization():
    pixels = numpy.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=numpy.uint8)
    content = io.BytesIO()
    PIL.Image.fromarray(pixels).save(content, "PNG")
    with PIL.Image.open(content) as opened:
        photo = opened.convert("RGB")
    for plain in (False, True):
        settings = visualize.settings_of(nn.Conv2d(3, 4, 3), (3, 32, 32), plain)
        batch = visualize.as_batch([photo], settings)
        assert batch.shape == (1, 3, 32, 32)
        assert bool(batch.min() >= 0) == plain
        seen = visualize.shown(batch[0], settings)
        assert math.isclose(float((seen * 255 - torch.from_numpy(pixels)).abs().max()), 0, abs_tol=0.01)
