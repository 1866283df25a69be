"""The studies of the recipes (benchmarks/recipes_*.py) on tiny models, without the fetched weights and images."""

import numpy as np
import pytest
import recipes_mnist
import recipes_mobilenet
import recipes_vgg
import torch
from common import results
from PIL import Image

from ddf_convert import recipes
from ddf_convert.layers import DDF2d

BLOCKS = ((16, 16), (32,))


def digits(count=20):
    """Images, and labels that can be read off them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    return torch.randn(count, 1, 28, 28, generator=generator) / 10 + labels.view(-1, 1, 1, 1), labels


def keras_file(blocks, generator):
    """Arrays of a trunk as Keras names and orders them, and of HED's side outputs."""
    file, before = {}, 3
    for block, widths in enumerate(blocks, 1):
        for place, width in enumerate(widths):
            path = f"block{block}/layers/conv2d{f'_{place}' if place else ''}/vars"
            file[f"{path}/0"] = generator.standard_normal((3, 3, before, width)) / before
            file[f"{path}/1"] = generator.standard_normal(width)
            before = width
        file[f"dsn{block}/vars/0"] = generator.standard_normal((1, 1, before, 1))
        file[f"dsn{block}/vars/1"] = np.zeros(1)
    file["fuse/vars/0"], file["fuse/vars/1"] = np.ones((1, 1, len(blocks), 1)), np.zeros(1)
    return file


@pytest.fixture
def trunk(monkeypatch):
    monkeypatch.setattr(recipes_vgg, "BLOCKS", BLOCKS)
    file = keras_file(BLOCKS, np.random.default_rng(0))
    model = recipes_vgg.VGG16(BLOCKS).eval()
    recipes_vgg.load_trunk(model, file)
    return model, recipes_vgg.Edges(file), file


# --- VGG16 ---


def test_the_trunk_has_vggs_names_and_parameters():
    model = recipes_vgg.VGG16()
    assert model.names[:3] == ["conv1_1", "conv1_2", "conv2_1"]
    assert model.ends == ["conv1_2", "conv2_2", "conv3_3", "conv4_3", "conv5_3"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 14_714_688


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("conv1_1", "block1/layers/conv2d/vars"),
        ("conv1_2", "block1/layers/conv2d_1/vars"),
        ("conv5_3", "block5/layers/conv2d_2/vars"),
    ],
)
def test_paths_in_the_keras_file(name, path):
    assert recipes_vgg.keras_path(name) == path


def test_kernels_are_transposed_from_keras_order(trunk):
    model, _, file = trunk
    kernel = file["block1/layers/conv2d_1/vars/0"]  # rows, columns, in, out
    assert model.conv1_2.weight[3, 1, 0, 2].item() == pytest.approx(kernel[0, 2, 1, 3])
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 32, 8, 8)


def test_preprocessing_makes_bgr_without_the_mean():
    image = torch.zeros(3, 1, 1)
    image[0] = 255  # red
    assert recipes_vgg.preprocess(image).flatten().tolist() == pytest.approx([-104.00699, -116.66877, 255 - 122.67892])


def test_similarity_is_0_for_the_original_and_1_for_zeros(trunk):
    model, edges, _ = trunk
    similarity = recipes_vgg.Similarity(model, edges, torch.rand(3, 3, 16, 16), batch_size=2)
    same = similarity.of(model)
    assert same == {"error": dict.fromkeys([*model.names, recipes_vgg.LAST], 0.0), "edges_f1": 1.0}
    with torch.no_grad():
        model.conv2_1.weight.zero_()
        model.conv2_1.bias.zero_()
    zeros = similarity.of(model)["error"]
    assert zeros == {"conv1_1": 0.0, "conv1_2": 0.0, "conv2_1": pytest.approx(1), recipes_vgg.LAST: pytest.approx(1)}


def test_the_study_of_vgg_runs(trunk, monkeypatch, tmp_path):
    model, edges, _ = trunk
    names = []
    for number in range(4):
        names.append(tmp_path / f"{number}.png")
        Image.effect_noise((40, 30), 50).convert("RGB").save(names[-1])
    monkeypatch.setattr(recipes_vgg, "open_weights", lambda file: (model, edges))
    monkeypatch.setattr(recipes_vgg, "HED", type("Fetched", (), {"get": lambda self: None})())
    monkeypatch.setattr(recipes_vgg, "photos_to_fit_and_test", lambda: (names[:2], names[2:]))
    monkeypatch.setattr(recipes_vgg, "CONVERSION", {"allow_growth": True})  # it has too few channels to be worth it
    document = recipes_vgg.measure(recipes_vgg.StudySize(16, 4, 1, 2, 2))
    document["seconds"] = 1.0
    assert document["left_alone"] == ["conv1_1"]
    assert list(document["found"]) == ["random", "preserve", "calibrate", "distill"]
    errors = {name: each["test"]["error"]["conv1_2"] for name, each in document["found"].items()}
    assert errors["calibrate"] < errors["preserve"] < errors["random"]
    results.write(tmp_path, "recipes_vgg", document, recipes_vgg.page(document), recipes_vgg.plot(document))
    assert (tmp_path / "recipes_vgg.png").read_bytes().startswith(b"\x89PNG")


# --- digits ---


def test_a_split_is_fixed_even_and_leaves_nothing_out():
    labels = torch.arange(50) % 10
    train, test = recipes_mnist.split(labels, 10)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(50))
    assert labels[test].sort().values.tolist() == list(range(10))
    assert torch.equal(recipes_mnist.split(labels, 10)[0], train)


def test_one_filter_alone_is_the_layer_with_the_other_at_1():
    torch.manual_seed(0)
    layer = DDF2d(4, stride=2, heads=2)
    x = torch.randn(2, 4, 7, 5)
    spatial, channel = layer.spatial_branch(x), layer.channel_branch(x)
    for change, taken in ((recipes_mnist.spatial_only, "channel"), (recipes_mnist.channel_only, "spatial")):
        changed = torch.nn.Sequential(DDF2d(4, stride=2, heads=2))
        changed[0].load_state_dict(layer.state_dict())
        change(changed)
        ones = {"channel": torch.ones_like(channel), "spatial": torch.ones_like(spatial)}
        filters = {"channel": channel, "spatial": spatial, taken: ones[taken]}
        expected = torch.ops.ddf_convert.ddf(x, filters["channel"], filters["spatial"], 2, 1, 1, "mul")
        torch.testing.assert_close(changed(x), expected)
        assert not [name for name, _ in changed.named_parameters() if f"{taken}_branch" in name]


def test_one_filter_alone_needs_filters_that_multiply():
    with pytest.raises(ValueError, match="multiply"):
        recipes_mnist.spatial_only(torch.nn.Sequential(DDF2d(4, combine="add")))


@pytest.mark.slow
def test_every_row_learns_the_same_at_every_run():
    data = digits()
    torch.manual_seed(0)
    original = recipes_mnist.SmallResNet((4, 8))
    assert len(recipes_mnist.train(original, None, recipes_mnist.LABELS_ONLY, 1, data, data, 0)) == 2
    for row in recipes_mnist.ROWS:
        curves = []
        for _ in range(2):
            torch.manual_seed(0)
            model = recipes_mnist.prepare(row, original, data[0], allow_growth=True)
            curve = recipes_mnist.train(model, original if row.teacher else None, row.losses, 1, data, data, 0)
            curves.append((curve, [parameter.sum().item() for parameter in model.parameters()]))
        assert curves[0] == curves[1], row.name
        assert bool(getattr(model, "ddf_conversion", None)) == (row.recipe is not None)


def test_accuracy_leaves_the_mode_as_it_was():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([0.0, 1.0]))
    model.train()
    data = torch.zeros(5, 1, 2, 2), torch.tensor([1, 1, 1, 1, 0])
    assert recipes_mnist.accuracy(model, data, batch_size=2) == 0.8
    assert model.training


def test_spread_is_taken_epoch_by_epoch():
    assert recipes_mnist.spread([[0.0, 0.5], [1.0, 0.7]]) == {"mean": [0.5, 0.6], "min": [0.0, 0.5], "max": [1.0, 0.7]}


# --- MobileNetV2 ---


def test_gradients_reach_the_scales_first_and_then_everything():
    torch.manual_seed(0)
    original = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    recipe, x = recipes.load("preserve"), torch.randn(4, 8, 6, 6)
    model = recipe.convert(original, x, depthwise=True, allow_growth=True)
    recipe.initialize(model, original)
    finetune = recipes.load("finetune")
    groups = finetune.parameter_groups(model, recipes.Stage(name="all", epochs=1, optimizer={"lr": 1e-2}))
    first, second = recipes_mobilenet.coverage_over_steps(
        model, finetune.losses(model, 0), groups, (x, torch.arange(4)), 2
    )
    assert {part for part, (yes, all_) in first.items() if yes == all_} == {
        "spatial filter: FilterNorm's scale",
        "spatial filter: FilterNorm's shift",
        "channel filter: FilterNorm's scale",
        "channel filter: FilterNorm's shift",
        "bias",
    }
    assert all(yes == all_ for yes, all_ in second.values())


def test_parameters_belong_to_named_parts():
    assert recipes_mobilenet.part_of("ddf.spatial_branch.0.weight") == "spatial filter: its 1x1 convolution"
    assert recipes_mobilenet.part_of("mix.bias") == "1x1 convolution behind"
