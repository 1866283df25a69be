"""Stages of a recipe: which parameters they train, and what they minimize."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from support import networks as net
from support.recipes import Classifier, converted_classifier
from torch import nn

import ddf_convert as ddf
from ddf_convert.errors import UsageError
from ddf_convert.recipes.losses import Objective, divergence, relative_error
from ddf_convert.recipes.parameters import learning_rate, parameter_groups, trainable_names
from ddf_convert.recipes.schema import Losses, Stage


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def stage(**options):
    return Stage.model_validate({"name": "one", "epochs": 1, "optimizer": {"lr": 0.1}, **options})


# --- parameters ---

TRAINABLE = {
    "all": lambda name: True,
    "new": lambda name: name.startswith(("stem.", "wide.", "deep.")),
    "norms": lambda name: name.startswith("norm."),
    "head": lambda name: name.startswith("head."),
    "*.bias": lambda name: name.endswith(".bias"),
    "re:(head|norm).*": lambda name: name.startswith(("head.", "norm.")),
}


@pytest.mark.parametrize("pattern", TRAINABLE)
def test_patterns_select_parameters(pattern):
    model = converted_classifier()[1]
    names = {name for name, _ in model.named_parameters()}
    assert trainable_names(model, [pattern]) == {name for name in names if TRAINABLE[pattern](name)}


@pytest.mark.parametrize(("pattern", "words"), [("hed", "head"), ("wide", r"'wide\.\*'"), ("re:(", "expression")])
def test_a_pattern_that_matches_nothing_is_an_error(pattern, words):
    with pytest.raises(UsageError, match=words):
        trainable_names(converted_classifier()[1], [pattern])


def test_a_parameter_with_brackets_in_its_name_is_found_by_it():
    model = nn.Module()
    for name in ("conv[1]", "conv1"):
        model.add_module(name, nn.Conv2d(3, 3, 3))
    assert trainable_names(model, ["conv[1].weight"]) == {"conv[1].weight"}
    assert trainable_names(model, ["conv[1-9].weight"]) == {"conv1.weight"}
    with pytest.raises(UsageError, match=re.escape("write 'conv[[]1].*'")):
        trainable_names(model, ["conv[1]"])


def test_new_layers_and_norms_that_a_model_has_none_of():
    with pytest.raises(UsageError, match="no DDF layers"):
        trainable_names(Classifier(), ["new"])
    model = ddf.convert(net.Residual(), example_input=torch.randn(1, 3, 8, 8))
    assert trainable_names(model, ["new", "norms"]) == trainable_names(model, ["new"])
    with pytest.raises(UsageError, match="no normalizations"):
        trainable_names(model, ["norms"])


def test_groups_freeze_what_is_not_trained_and_decay_only_weights():
    model = converted_classifier()[1]
    one = stage(trainable=["new", "norms"], optimizer={"lr": 0.1, "weight_decay": 0.3, "old_lr_scale": 0.5})
    groups = parameter_groups(model, one)
    assert all(p.requires_grad == (not name.startswith("head.")) for name, p in model.named_parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert found["old, without weight decay"] == {"norm.weight", "norm.bias"}
    assert all(name.endswith(".weight") for name in found["new, with weight decay"])
    undecayed = {name.rpartition(".")[2] for name in found["new, without weight decay"]}
    assert undecayed == {"bias", "std", "mean"}
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "new, with weight decay": (0.1, 0.3),
        "new, without weight decay": (0.1, 0.0),
        "old, without weight decay": (0.05, 0.0),
    }
    optimizer = timm.optim.create_optimizer_v2(groups, opt="adamw", lr=one.optimizer.lr)
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in groups]


def test_the_learning_rate_scales_with_the_images_of_a_step():
    paper = ddf.recipes.load("paper").stages[0]
    assert learning_rate(paper, 256) == pytest.approx(0.1)
    assert learning_rate(paper) == 0.4
    assert learning_rate(stage(), 256) == 0.1


# --- losses ---


def test_the_loss_is_the_weighted_sum_of_its_parts():
    original, model = converted_classifier()
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


def test_a_preserved_model_has_no_distance_from_its_teacher():
    original, model = converted_classifier(exclude=["stem", "wide"])
    ddf.recipes.load("preserve").initialize(model, original)
    objective = Objective(model.eval(), Losses(task=0, logits=1.0, features=1.0), original).eval()
    result = objective(torch.randn(2, 3, 16, 16))
    assert result["features_loss"].item() < 1e-12
    assert result["logits_loss"].item() < 1e-10


def test_soft_targets_and_binary_cross_entropy():
    model = converted_classifier()[1]
    images, soft = torch.randn(2, 3, 16, 16), torch.tensor([[0.2, 0.8, 0], [0, 0, 1.0]])
    result = Objective(model, Losses())(images, soft)
    expected = torch.nn.functional.cross_entropy(result["output"], soft)
    assert result["task_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    binary = Objective(model, Losses(bce=True))(images, torch.tensor([0, 2]))
    one_hot = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(binary["output"], one_hot)
    assert binary["task_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_relative_error_is_relative():
    expected = torch.randn(2, 3, 4, 4)
    assert relative_error(0.9 * expected, expected).item() == pytest.approx(0.01, rel=1e-4)
    assert relative_error(expected.half(), expected).dtype == torch.float32


def test_losses_name_what_is_missing():
    model = converted_classifier()[1]
    with pytest.raises(UsageError, match="give it as the teacher"):
        Objective(model, Losses(logits=1.0))
    with pytest.raises(UsageError, match="before conversion"):
        Objective(model, Losses(features=1.0), nn.Linear(1, 1))
    with pytest.raises(UsageError, match="needs labels"):
        Objective(model, Losses())(torch.randn(1, 3, 16, 16))
    features = ddf.convert(net.Residual(), example_input=torch.randn(1, 3, 8, 8))
    with pytest.raises(UsageError, match=r"class scores \(B, classes\), and the model returns a tensor of shape"):
        Objective(features, Losses())(torch.randn(1, 3, 8, 8), torch.tensor([0]))
