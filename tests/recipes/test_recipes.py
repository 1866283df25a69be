"""Recipes: files and their errors, what a stage trains, what it minimizes, and what new layers start from."""

from __future__ import annotations

import copy
import json
import re
import tracemalloc

import numpy
import PIL.Image
import pytest
import timm
import torch
from support import networks as net
from support.tolerances import far, near
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn

import ddf_convert as ddf
from ddf_convert import cli
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d
from ddf_convert.recipes import factorization
from ddf_convert.recipes.calibrate import BatchNormCalibrator, sample_positions
from ddf_convert.recipes.losses import Objective, divergence, relative_error
from ddf_convert.recipes.pairs import ConvPair, find_pairs
from ddf_convert.recipes.parameters import learning_rate, trainable_names
from ddf_convert.recipes.schema import Initialize, Losses, Stage

PRESERVE = ddf.recipes.load("preserve")
ANY = {"stem": True, "depthwise": True, "allow_growth": True}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Small(nn.Module):
    """A classifier with a stem, two dense convolutions and a depthwise one."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.head = nn.Linear(24, classes)

    def forward(self, image):
        feature = self.norm(self.stem(image)).relu()
        return self.head(self.deep(self.wide(feature).relu()).mean((2, 3)))


def stage(**options):
    return Stage.model_validate({"name": "one", "epochs": 1, "optimizer": {"lr": 0.1}, **options})


# --- files ---


@pytest.mark.parametrize("name", ddf.recipes.names())
def test_built_in_recipes_are_right_and_survive_being_written_out(name):
    recipe = ddf.recipes.load(name)
    assert recipe.name == name
    assert recipe.description
    assert ddf.recipes.parse(recipe.to_yaml()) == recipe
    assert ddf.recipes.parse(ddf.recipes.source(name)) == recipe


HEAD = "name: mine\nconversion: {affine: true}\nstages:\n  - name: one\n    optimizer: {lr: 0.1}\n"
BAD = {
    "unknown key": ("name: mine\ninitialize:\n  methode: paper\n", 3, "initialize.methode", "did you mean method"),
    "key of a stage": (HEAD + "    epochs: 1\n    optimizer: {lr: 1}\n", 7, "stages.0.optimizer", "optimizer"),
    "twice": ("name: mine\nname: yours\n", 2, "name", "twice"),
    "type": (HEAD + "    epochs: many\n", 6, "stages.0.epochs", "integer"),
    "range": (HEAD + "    epochs: 0\n", 6, "stages.0.epochs", "greater"),
    "optimizer": (HEAD.replace("lr: 0.1", "lr: 0.1, opt: adamx") + "    epochs: 1\n", 5, "opt", "did you mean"),
    "epochs and steps": (HEAD + "    epochs: 1\n    steps: 1\n", 4, "stages.0", "one of the two"),
    "neither": (HEAD, 4, "stages.0", "one of the two"),
    "nothing to minimize": (HEAD + "    epochs: 1\n    losses: {task: 0}\n", 7, "losses", "every weight is 0"),
    "smoothing without labels": (
        HEAD + "    epochs: 1\n    losses: {task: 0, logits: 1, label_smoothing: 0.1}\n",
        7,
        "losses",
        "task loss",
    ),
    "mixup without labels": (
        HEAD + "    epochs: 1\n    losses: {task: 0, logits: 1}\n    augmentation: {mixup: 0.2}\n",
        4,
        "stages.0",
        "mix labels",
    ),
    "warm-up of epochs in steps": (
        HEAD + "    steps: 9\n    schedule: {warmup_epochs: 1}\n",
        4,
        "stages.0",
        "warmup_steps",
    ),
    "all warm-up": (HEAD + "    epochs: 2\n    schedule: {warmup_epochs: 2}\n", 4, "stages.0", "leaves nothing"),
    "step schedule in steps": (HEAD + "    steps: 9\n    schedule: {sched: step}\n", 4, "stages.0", "counts epochs"),
    "preserve without shifts": ("name: mine\ninitialize: {method: preserve}\n", None, "recipe", "affine: true"),
    "two stages of a name": (
        HEAD + "    epochs: 1\n  - name: one\n    epochs: 1\n    optimizer: {lr: 1}\n",
        None,
        "recipe",
        "'one'",
    ),
    "conversion": ("name: mine\nconversion:\n  heads: 0\n", 3, "conversion.heads", "greater"),
    "not YAML": ("name: [\n", 2, "", "not YAML"),
    "not a mapping": ("- 1\n", None, "", "not a recipe"),
    "code": ("name: !!python/object/apply:os.system [ls]\n", 1, "", "not YAML"),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_name_file_line_and_key(case, tmp_path):
    text, line, *words = BAD[case]
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        ddf.recipes.load(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert all(word in message for word in words)
    assert "\n" not in message


def test_unknown_recipes_and_files(tmp_path):
    with pytest.raises(UsageError, match="did you mean distill"):
        ddf.recipes.load("distil")
    with pytest.raises(UsageError, match=r"nothing\.yaml: cannot be read"):
        ddf.recipes.load(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        ddf.recipes.load(tmp_path / "bytes.yaml")


def test_settings_of_all_stages_change_together():
    recipe = ddf.recipes.load("finetune").changed(epochs=1, lr=0.5, amp="bfloat16", batch_size=None)
    assert [(s.epochs, s.optimizer.lr, s.amp) for s in recipe.stages] == [(1, 0.5, "bfloat16")] * 2
    assert recipe.stages[0].batch_size == 64
    assert [s.epochs for s in ddf.recipes.load("finetune").stages] == [2, 10]
    shorter = ddf.recipes.load("finetune").changed(steps=20)
    assert [(s.steps, s.epochs, s.schedule.warmup_steps) for s in shorter.stages] == [(20, None, 2)] * 2


# --- what a stage trains ---


def converted(**options):
    original = Small().eval()
    return original, ddf.convert(original, example_input=torch.randn(1, 3, 16, 16), affine=True, **{**ANY, **options})


TRAINABLE = {
    "all": lambda name: True,
    "new": lambda name: name.startswith(("stem.", "wide.", "deep.")),
    "norms": lambda name: name.startswith("norm."),
    "head": lambda name: name.startswith("head."),
    "*.bias": lambda name: name.endswith(".bias"),
    "re:(head|norm).*": lambda name: name.startswith(("head.", "norm.")),
}


@pytest.mark.parametrize("pattern", TRAINABLE)
def test_what_is_trainable(pattern):
    model = converted()[1]
    names = {name for name, _ in model.named_parameters()}
    assert trainable_names(model, [pattern]) == {name for name in names if TRAINABLE[pattern](name)}


@pytest.mark.parametrize(("pattern", "words"), [("hed", "head"), ("wide", r"'wide\.\*'"), ("re:(", "expression")])
def test_a_pattern_that_matches_nothing_is_an_error(pattern, words):
    with pytest.raises(UsageError, match=words):
        trainable_names(converted()[1], [pattern])


def test_a_parameter_with_brackets_in_its_name_is_found_by_it():
    model = nn.Module()
    for name in ("conv[1]", "conv1"):
        model.add_module(name, nn.Conv2d(3, 3, 3))
    assert trainable_names(model, ["conv[1].weight"]) == {"conv[1].weight"}
    assert trainable_names(model, ["conv[1-9].weight"]) == {"conv1.weight"}
    with pytest.raises(UsageError, match=re.escape("write 'conv[[]1].*'")):
        trainable_names(model, ["conv[1]"])


def test_new_needs_new_layers():
    with pytest.raises(UsageError, match="no DDF layers"):
        trainable_names(Small(), ["new"])


def test_a_network_without_norms_has_none_to_train():
    model = ddf.convert(net.Residual(), example_input=torch.randn(1, 3, 8, 8))
    assert trainable_names(model, ["new", "norms"]) == trainable_names(model, ["new"])
    with pytest.raises(UsageError, match="no normalizations"):
        trainable_names(model, ["norms"])


def test_groups_freeze_what_is_not_trained_and_decay_only_weights():
    model = converted()[1]
    one = stage(trainable=["new", "norms"], optimizer={"lr": 0.1, "weight_decay": 0.3, "old_lr_scale": 0.5})
    groups = ddf.recipes.parameters.parameter_groups(model, one)
    assert all(p.requires_grad == (not name.startswith("head.")) for name, p in model.named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert set(found) == {"new, with weight decay", "new, without weight decay", "old, without weight decay"}
    assert found["old, without weight decay"] == {"norm.weight", "norm.bias"}
    assert all(name.endswith(".weight") for name in found["new, with weight decay"])
    undecayed = {name.rpartition(".")[2] for name in found["new, without weight decay"]}
    assert undecayed == {"bias", "std", "mean"}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert rates == {
        "new, with weight decay": (0.1, 0.3),
        "new, without weight decay": (0.1, 0.0),
        "old, without weight decay": (0.05, 0.0),
    }
    optimizer = timm.optim.create_optimizer_v2(groups, opt="adamw", lr=one.optimizer.lr)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]


def test_learning_rate_goes_with_the_images_of_a_step():
    paper = ddf.recipes.load("paper").stages[0]
    assert learning_rate(paper, 256) == pytest.approx(0.1)
    assert learning_rate(paper) == 0.4
    assert learning_rate(stage(), 256) == 0.1


def test_stages_by_name_and_number():
    recipe = ddf.recipes.load("finetune")
    assert recipe.stage(1) == recipe.stage("everything") == recipe.stage(recipe.stages[1])
    with pytest.raises(UsageError, match="'everything'"):
        recipe.stage("nothing")
    with pytest.raises(UsageError, match="ends with the initialization"):
        PRESERVE.stage(0)


# --- what a stage minimizes ---


def test_losses_are_the_weighted_sum_of_their_parts():
    original, model = converted()
    images, targets = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 1])
    losses = Losses(task=0.5, label_smoothing=0.1, logits=2.0, temperature=3.0, features=0.25)
    objective = Objective(model, losses, original).train()
    assert not original.training
    result = objective(images, targets)
    weights = {"task_loss": 0.5, "logits_loss": 2.0, "features_loss": 0.25}
    assert result["loss"].item() == pytest.approx(sum(w * result[name].item() for name, w in weights.items()))
    expected = torch.nn.functional.cross_entropy(result["output"], targets, label_smoothing=0.1)
    assert result["task_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert result["logits_loss"].item() == pytest.approx(
            divergence(result["output"], original(images), 3.0).item(), rel=1e-5
        )
    result["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in original.parameters())


def test_a_model_is_at_no_distance_from_itself():
    original, model = converted(exclude=["stem", "wide"])
    PRESERVE.initialize(model, original)
    objective = Objective(model.eval(), Losses(task=0, logits=1.0, features=1.0), original).eval()
    result = objective(torch.randn(2, 3, 16, 16))
    assert result["features_loss"].item() < 1e-12
    assert result["logits_loss"].item() < 1e-10


def test_soft_targets_and_binary_cross_entropy():
    model = converted()[1]
    images, soft = torch.randn(2, 3, 16, 16), torch.tensor([[0.2, 0.8, 0], [0, 0, 1.0]])
    result = Objective(model, Losses())(images, soft)
    expected = torch.nn.functional.cross_entropy(result["output"], soft)
    assert result["task_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    binary = Objective(model, Losses(bce=True))(images, torch.tensor([0, 2]))
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(binary["output"], one_hot)
    assert binary["task_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_relative_error_is_relative():
    wanted = torch.randn(2, 3, 4, 4)
    assert relative_error(0.9 * wanted, wanted).item() == pytest.approx(0.01, rel=1e-4)
    assert relative_error(wanted.half(), wanted).dtype == torch.float32


def test_what_losses_cannot_do():
    model = converted()[1]
    with pytest.raises(UsageError, match="give it as the teacher"):
        Objective(model, Losses(logits=1.0))
    with pytest.raises(UsageError, match="before conversion"):
        Objective(model, Losses(features=1.0), nn.Linear(1, 1))
    with pytest.raises(UsageError, match="needs labels"):
        Objective(model, Losses())(torch.randn(1, 3, 16, 16))
    features = ddf.convert(net.Residual(), example_input=torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match=r"class scores \(B, classes\), and the model returns a tensor of shape"):
        Objective(features, Losses())(torch.randn(1, 3, 8, 8), torch.tensor([0]))


# --- preserve ---

DEPTHWISE = {
    "plain": {},
    "bias": {"bias": True},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2, "padding": 2},
    "no padding": {"padding": 0},
    "more padding": {"padding": 3},
    "circular": {"padding_mode": "circular"},
    "reflected": {"padding_mode": "reflect"},
    "5x5": {"kernel_size": 5, "padding": 2},
}


@pytest.mark.parametrize("combine", ["mul", "add"])
@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise_convolutions_are_preserved_exactly(case, combine):
    options = {"kernel_size": 3, "padding": 1, "bias": False, **DEPTHWISE[case]}
    original = net.around(nn.Conv2d(32, 32, groups=32, **options))
    image = torch.randn(2, 3, 13, 17)
    model = PRESERVE.convert(original, image, **ANY, kernel_size=(3, 5), combine=combine, heads=2)
    assert isinstance(model[1], DDF2d)
    done = PRESERVE.initialize(model, original)
    assert [layer.weight_error for layer in done.layers] == [0.0]
    with torch.no_grad():
        torch.testing.assert_close(model(image), original(image), **near(torch.float32, original(image), terms=9 * 32))


@pytest.mark.parametrize("kind", [StdConv2d, ScaledStdConv2d])
def test_standardised_weights_are_taken_as_the_convolution_uses_them(kind):
    conv = kind(32, 32, 3, padding=1, groups=32, bias=True).eval()
    with torch.no_grad():
        conv.bias.normal_()
    original = net.around(conv)
    image = torch.randn(1, 3, 9, 9)
    model = PRESERVE.convert(original, image, **ANY)
    PRESERVE.initialize(model, original)
    with torch.no_grad():
        torch.testing.assert_close(model(image), original(image), **near(torch.float32, original(image), terms=9 * 32))


def test_functional_convolutions_are_preserved():
    class Depthwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(3, 1, 3, 3)), nn.Parameter(torch.randn(3))

        def forward(self, image):
            return nn.functional.conv2d(image, self.kernel, self.shift, padding=1, groups=3)

    original, image = Depthwise(), torch.randn(1, 3, 8, 8)
    model = PRESERVE.convert(original, image, **ANY, functional=True)
    assert PRESERVE.initialize(model, original).layers[0].weight_error == 0
    with torch.no_grad():
        torch.testing.assert_close(model(image), original(image), **near(torch.float32, original(image), terms=9 * 32))


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
    """The layer is the convolution with those factors, and the error told is what the best of rank one leaves."""
    conv_options, options = DENSE[case]
    conv = nn.Conv2d(kernel_size=3, padding=1, **conv_options)
    original, image = net.around(conv), torch.randn(1, 3, 8, 8)
    model = PRESERVE.convert(original, image, **ANY, **options)
    (layer,) = PRESERVE.initialize(model, original).layers
    pair = find_pairs(model, original)[0]
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
def test_gradients_reach_the_scales_at_once_and_all_else_after_a_step(combine):
    original = net.around(net.conv(groups=32))
    image = torch.randn(2, 3, 8, 8)
    model = PRESERVE.convert(original, image, **ANY, combine=combine).train()
    PRESERVE.initialize(model, original)
    layer = model[1]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)

    def without_gradient():
        optimizer.zero_grad()
        model(image).square().sum().backward()
        return {name for name, p in layer.named_parameters() if not p.grad.any()}

    assert {name.rpartition(".")[2] for name in without_gradient()} == {"weight", "bias"}  # of what makes the filters
    optimizer.step()
    assert without_gradient() == set()


def test_paper_draws_anew_and_leaves_the_rest():
    original, model = converted()
    ddf.recipes.load("preserve").initialize(model, original)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert ddf.recipes.load("paper").initialize(model).layers == ()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"stem", "wide", "deep"}
    assert model.deep.channel_branch[4].std.std().item() == pytest.approx(2**0.5 / 3, rel=0.3)
    assert not model.deep.channel_branch[4].mean.any()


INITIALIZE_WRONG = {
    "no original": (lambda m, o: PRESERVE.initialize(m), "give the original"),
    "not converted": (lambda m, o: PRESERVE.initialize(o, o), "was not converted"),
    "the converted one twice": (lambda m, o: PRESERVE.initialize(m, m), "before conversion"),
    "another": (lambda m, o: PRESERVE.initialize(m, net.around(net.conv())), "does not fit"),
    "no images": (lambda m, o: ddf.recipes.load("calibrate").initialize(m, o), "looks at images"),
    "none": (lambda m, o: ddf.recipes.load("calibrate").initialize(m, o, []), "no images"),
    "not batches": (lambda m, o: ddf.recipes.load("calibrate").initialize(m, o, [torch.ones(3, 8, 8)]), "batches"),
}


@pytest.mark.parametrize("case", INITIALIZE_WRONG)
def test_what_cannot_be_initialized_stays_as_it_is(case):
    original, model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    call, words = INITIALIZE_WRONG[case]
    with pytest.raises(UsageError, match=words):
        call(model, original)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_without_shifts_say_how_to_get_them():
    original = net.Residual()
    model = ddf.convert(original, example_input=torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match="affine=True"):
        PRESERVE.initialize(model, original)


# --- calibrate ---


def test_sampled_patches_are_what_the_convolution_sees():
    for options in ({}, {"stride": 2}, {"dilation": 2, "padding": 3}, {"padding_mode": "reflect"}):
        conv = nn.Conv2d(5, 6, 3, **{"padding": 1, "bias": False, **options})
        layer = DDFConv2d(5, 6, affine=True, **{**{"padding": 1, "stride": 1, "dilation": 1}, **options})
        images = torch.randn(2, 5, 11, 9)
        with torch.no_grad():
            patches, outputs = sample_positions(
                ConvPair("conv", "conv", conv, layer), images, conv(images), count=13, seed=1
            )
        assert patches.shape == (26, 5, 9)
        made = patches.flatten(1) @ conv.weight.detach().flatten(1).T
        torch.testing.assert_close(made, outputs, **near(torch.float32, outputs, terms=9 * 5))


def test_alternating_least_squares_finds_what_is_there_to_find():
    """Outputs that factors make are made by the factors found; others are fitted better than the weights are."""
    patches = torch.randn(3000, 2, 5, 9, dtype=torch.float64) @ torch.randn(9, 9, dtype=torch.float64)

    def moments(weight):
        wanted = torch.einsum("goit,ngit->ngo", weight, patches)
        return factorization.Moments(
            torch.einsum("ngit,ngju->gitju", patches, patches) / len(patches),
            torch.einsum("ngo,ngit->goit", wanted, patches) / len(patches),
        )

    def error(found, weight):
        made, wanted = (torch.einsum("goit,ngit->ngo", each, patches) for each in (found.product(), weight))
        return ((made - wanted).square().sum() / wanted.square().sum()).sqrt().item()

    truth = factorization.factorize_weights(torch.randn(2, 6, 5, 9, dtype=torch.float64), True).product()
    assert error(factorization.factorize_moments(moments(truth), truth, True), truth) < 1e-6
    weight = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    preserved = error(factorization.factorize_weights(weight, True), weight)
    assert error(factorization.factorize_moments(moments(weight), weight, True), weight) < 0.95 * preserved


@pytest.mark.parametrize("mixing", ["dense", "never"])
def test_calibration_brings_every_layer_nearer_to_the_original(mixing):
    torch.manual_seed(2)
    original = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), net.conv(16, 16), nn.BatchNorm2d(16), nn.ReLU(), net.conv(16, 16, bias=False)
    ).eval()
    images = [torch.nn.functional.avg_pool2d(torch.randn(8, 3, 24, 24), 3, 1) for _ in range(3)]
    held_out = torch.nn.functional.avg_pool2d(torch.randn(8, 3, 24, 24), 3, 1)
    recipe = ddf.recipes.load("calibrate")
    options = {"mixing": mixing, "allow_growth": True}
    preserved = recipe.convert(original, images[0], **options).eval()
    calibrated = recipe.convert(original, images[0], **options).eval()
    PRESERVE.initialize(preserved, original)
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    said = []
    done = recipe.initialize(calibrated, original, iter(images), num_images=20, steps=6, say=said.append)
    assert done.images == 20
    assert [layer.name for layer in done.layers] == ["2", "5"]
    assert all(layer.fitted_error < layer.output_error for layer in done.layers)
    assert len(said) == 2
    assert all(torch.equal(tensor, state[name]) for name, tensor in original.state_dict().items())
    assert not calibrated.training
    with torch.no_grad():
        errors = [relative_error(model(held_out), original(held_out)).item() for model in (preserved, calibrated)]
    assert errors[1] < 0.8 * errors[0]
    assert all(p.requires_grad and p.grad is None for p in calibrated.parameters())


def test_calibration_keeps_what_is_exact():
    original = net.around(net.conv(groups=32, bias=False)).eval()
    images = [torch.randn(4, 3, 12, 12)]
    recipe = ddf.recipes.load("calibrate")
    model = recipe.convert(original, images[0], **ANY)
    (layer,) = recipe.initialize(model, original, images, steps=3).layers
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


def test_initialize_checks_its_settings():
    with pytest.raises(ValueError, match="steps"):
        Initialize(steps=-1)


# --- with the rest of the house ---


def test_the_record_and_the_original_travel_with_the_model(tmp_path):
    original = timm.create_model("resnet10t", num_classes=4).eval()
    image = torch.randn(1, 3, 32, 32)
    recipe = ddf.recipes.load("quick")
    model = recipe.convert(original, image).eval()
    recipe.initialize(model, original)
    ddf.save(model, tmp_path / "kept", original=original)
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert manifest["conversion"]["recipe"]["name"] == "quick"
    again = ddf.load(tmp_path / "kept")
    assert ddf.recipes.Recipe.model_validate(again.ddf_conversion.recipe) == recipe
    teacher = ddf.artifacts.artifact.load_original(tmp_path / "kept")
    with torch.no_grad():
        assert torch.equal(teacher(image), original(image))
        assert torch.equal(again(image), model(image))
    ddf.save(model, tmp_path / "kept")  # without the original this time
    assert ddf.artifacts.artifact.load_original(tmp_path / "kept") is None
    assert not (tmp_path / "kept" / "original.safetensors").exists()


def test_the_original_of_a_model_of_ones_own(tmp_path):
    original, model = converted()
    ddf.save(model, tmp_path / "own", original=original)
    with pytest.raises(ddf.ArtifactError, match="only you can build"):
        ddf.artifacts.artifact.load_original(tmp_path / "own")
    teacher = ddf.artifacts.artifact.load_original(tmp_path / "own", Small())
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(teacher(image), original(image))
    with pytest.raises(ddf.ArtifactError, match="do not fit"):
        ddf.artifacts.artifact.load_original(tmp_path / "own", Small(classes=7))


# --- on the command line ---

SMALL = ["--input-size", "3", "32", "32"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty folder; gives its exit code, what it printed, and what it complained of."""
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
    assert run("recipes", "show", "destill")[2].endswith("did you mean distill?\n")


def test_convert_initializes_as_the_recipe_says(run, caplog):
    code, out, err = run("convert", "resnet10t", "-o", "out", "--recipe", "quick", *SMALL, "--json")
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
    model, original = ddf.load("out"), ddf.artifacts.artifact.load_original("out")
    assert torch.equal(model.conv1[0].weight, original.conv1[0].weight)
    channel = model.get_submodule(layers[0]["name"]).ddf.channel_branch[4]
    assert not channel.std.any()
    assert channel.mean.any()


def test_the_command_lines_options_win_over_the_recipes(run, tmp_path):
    text = "name: mine\nconversion: {affine: true, mixing: always, heads: 2, exclude: ['layer1*']}\n"
    (tmp_path / "mine.yaml").write_text(text + "initialize: {method: preserve}\n")
    arguments = ["inspect", "resnet10t", *SMALL, "--json", "--recipe", "mine.yaml"]
    report = json.loads(run(*arguments, "--mixing", "auto", "--exclude", "layer2*")[1])
    assert (report["config"]["mixing"], report["config"]["heads"], report["config"]["affine"]) == ("auto", 2, True)
    reasons = {site["name"]: site["reason"] for site in report["sites"]}
    assert "excluded" in reasons["layer2.0.conv1"]
    assert "excluded" not in reasons["layer1.0.conv1"]


def test_convert_calibrates_on_a_folder_of_images(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = numpy.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=numpy.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    text = ddf.recipes.load("calibrate").to_yaml().replace("steps: 16", "steps: 2")
    (tmp_path / "short.yaml").write_text(text)
    code, out, err = run(
        *("convert", "test_resnet", "-o", "out", "--recipe", "short.yaml", "--images", "photos", *SMALL)
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


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_recipe_is_said_in_one_line_and_nothing_is_written(case, run, tmp_path):
    options, words = WRONG[case]
    (tmp_path / "bad.yaml").write_text("name: bad\ninitialize: {method: preserve}\n")
    code, out, err = run("convert", "resnet10t", "-o", "out", *SMALL, *options)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
HOSTILE = {
    "aliases of aliases": (BOMB, "more than 20,000 values"),
    "an alias of itself": ("a: &a [*a]\n", "more than 20,000 values"),
    "brackets": ("a: " + "[" * 5000, "nested too deeply"),
    "closed brackets": ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "braces": ("{a: " * 5000, "nested too deeply"),
    "much text": ("a: " + "x" * 2**20, "more than 1,048,576 bytes"),
    "many digits": ("a: " + "9" * 5000, "not YAML"),
    "a day that is none": ("a: 2024-13-77\n", "not YAML"),
    "a float that is none": ("a: !!float b\n", "not YAML"),
    "a tag of Python": ("a: !!python/object/apply:os.system [ls]\n", "not YAML"),
    "a control character": ("a: \x07\n", "not YAML"),
    "a list as key": ("? [a]\n: b\n", "not YAML"),
    "a long key": ("name: a\n" + "x" * 1000 + ": 1\n", "characters\\)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_quickly(name, tmp_path):
    text, words = HOSTILE[name]
    (tmp_path / "r.yaml").write_text(text)
    if "alias" in name:  # of the others the file is as large as what is read, and tracing is slow
        tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=words) as caught:
            ddf.recipes.load(tmp_path / "r.yaml")
        assert tracemalloc.get_traced_memory()[1] < 100e6  # 0 where nothing is traced
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_device_is_not_read_to_its_end():
    with pytest.raises(UsageError, match="more than 1,048,576 bytes"):
        ddf.recipes.load("/dev/zero")
