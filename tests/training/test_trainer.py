"""The training loop: what it does to weights, and what it says when something goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import training_runs as runs
from support.training_runs import distance, equal, finetune, weights
from torch import nn

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.artifacts import artifact
from ddf_convert.errors import DDFError
from ddf_convert.recipes.losses import Objective
from ddf_convert.recipes.schema import Losses
from ddf_convert.training import diagnostics, evaluation, finetuner, stage
from ddf_convert.training.checkpoints import Checkpoints
from ddf_convert.training.dataloader import evaluation_loader, image_settings
from ddf_convert.training.dataset import open_images
from ddf_convert.training.distributed import Processes
from ddf_convert.training.evaluation import evaluate
from ddf_convert.training.logs import read
from ddf_convert.training.progress import LineProgress, Progress, progress_of

ALONE = Processes(0, 1, torch.device("cpu"))
# One stage of labels alone, in which nothing is random but the order.
CALM = """
name: calm
stages:
  - name: only
    epochs: 1
    batch_size: 8
    optimizer: {opt: sgd, lr: 0.1, momentum: 0.9}
    schedule: {sched: constant}
    augmentation: null
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.prepare(tmp_path_factory.mktemp("training"))
    (folder / "calm.yaml").write_text(CALM)
    return folder


@pytest.fixture(autouse=True)
def _here(place: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.enter(place)
    if "everything" not in request.node.name:
        runs.without_pictures(monkeypatch)


def calm(output: str, **more: Any) -> dict[str, torch.Tensor]:
    """The weights after a calm run of the plain network, without its dropout."""
    finetune(output, **{"own": "calm", "recipe": "calm.yaml", **more})
    return weights(f"{output}/last")


def written(name: str, old: str, new: str, text: str = CALM) -> str:
    """A recipe that differs from another."""
    assert old in text
    Path(name).write_text(text.replace(old, new))
    return name


@pytest.mark.slow
def test_accumulated_batches_are_a_big_batch(place: Path) -> None:
    big = calm("big")
    assert distance(big, weights("plain")) > 1e-2
    assert distance(big, calm("small", changes={"batch_size": 2, "accumulate": 4})) < 1e-5
    # Layout and the number of workers change nothing; a half type does, and weights stay float32.
    assert distance(big, calm("last", channels_last=True)) < 1e-5
    assert equal(big, calm("workers", workers=1))
    half = calm("half", changes={"amp": "bfloat16"})
    assert 1e-5 < distance(big, half) < 0.05
    assert {tensor.dtype for tensor in half.values()} == {torch.float32}


def test_the_images_of_a_step_scale_the_learning_rate_and_the_whole_schedule(place: Path) -> None:
    text = CALM.replace("{sched: constant}", "{sched: cosine, warmup_epochs: 0.5, warmup_lr: 0.01, min_lr: 0.02}")
    recipe = written("scaled.yaml", "lr: 0.1,", "lr: 0.1, lr_base_size: 16, old_lr_scale: 0.5,", text)
    finetune("scaled", own="calm", recipe=recipe)
    rates = [row.lr for row in read("scaled/log.csv") if row.kind == "train"]
    assert len(rates) == 6
    assert rates[-1] == pytest.approx(0.01)  # half of min_lr, since a step has half of 16 images
    assert max(rate for rate in rates if rate) == pytest.approx(0.05 * 0.5 + 0.01 * 0.5, rel=0.35)
    assert rates[0] == pytest.approx(0.005 + (0.05 - 0.005) / 3, rel=1e-3)
    found = Checkpoints("scaled/checkpoints").latest()
    assert found is not None
    ends = {group["name"][:3]: group["lr"] for group in found[0]["optimizer"]["param_groups"]}
    assert ends == {"new": pytest.approx(0.01), "old": pytest.approx(0.005)}


@pytest.mark.slow
def test_frozen_parameters_stay_as_they_are_until_their_stage(place: Path) -> None:
    outcome = finetune("staged", checkpoint_every=1, changes={"epochs": 1})
    assert outcome.finished
    before, after = weights("plain"), weights("staged/last")
    assert distance(before, after) > 1e-3
    recipe = written("first.yaml", runs.RECIPE[runs.RECIPE.index("  - name: labels") :], "", runs.RECIPE)
    finetune("first", recipe=recipe)
    first = weights("first/last")
    changed = {name for name in before if not torch.equal(before[name], first[name])}
    new = {name for name in before if name.startswith(("body.", "last."))}
    assert changed <= new
    assert {"body.mix.weight", "last.mix.weight"} <= changed  # the gradient reaches both layers
    assert not equal(first, after)


def test_averaged_weights_are_evaluated_and_saved(place: Path) -> None:
    plain = calm("without")
    averaged = calm("averaged", recipe=written("ema.yaml", "    augmentation", "    ema_decay: 0.99\n    augmentation"))
    assert not equal(plain, averaged)
    found = Checkpoints("averaged/checkpoints").latest()
    assert found is not None
    state = found[0]
    assert equal(state["model"], plain)  # what is averaged learns as if it were not
    assert equal(state["ema"], averaged)
    model = ddf.restore(__import__("tinyruns").calm(), "averaged/last").eval()
    images = open_images("data", "validation", True)
    loader = evaluation_loader(images, image_settings(model, runs.SIZE), 4)
    found_again = evaluate(model, loader, evaluation.EvaluationSettings(ALONE))
    assert read("averaged/log.csv")[-1].loss == pytest.approx(found_again.loss, rel=1e-6)
    assert read("averaged/log.csv")[-1].loss != pytest.approx(read("without/log.csv")[-1].loss, rel=1e-6)


def test_a_run_folder_has_everything(place: Path) -> None:
    outcome = finetune("everything", changes={"epochs": 1, "batch_size": 4}, seed=3)
    folder = Path("everything")
    recipe = recipes.load(folder / "recipe.yaml")
    assert [(stage.epochs, stage.batch_size) for stage in recipe.stages] == [(1, 4), (1, 4)]
    settings = json.loads((folder / "settings.json").read_text())
    assert (settings["seed"], settings["images"], settings["validation_images"]) == (3, 48, 15)
    assert (folder / "curves.png").stat().st_size > 1000
    rows = read(folder / "log.csv")
    assert [row.step for row in rows if row.kind == "validation"] == [0, 12, 18]
    assert {row.stage for row in rows} == {"features", "labels"}
    assert outcome.last == rows[-1]
    for name in ("best", "last"):
        assert artifact.load_original(folder / name, __import__("tinyruns").plain()) is not None


def test_the_better_evaluation_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scripted(*accuracies: float) -> Any:
        rest = iter(accuracies)
        return lambda *_: evaluation.Evaluation(10, 1.0, next(rest), None, None, None, {}, 1.0)

    arguments: dict[str, Any] = {"own": "calm", "recipe": "calm.yaml"}
    monkeypatch.setattr(finetuner, "evaluate", scripted(0.5, 0.7, 0.6))
    outcome = finetune("best", **arguments, changes={"epochs": 2})
    assert [row and row.step for row in (outcome.before, outcome.best, outcome.last)] == [0, 6, 12]
    monkeypatch.setattr(finetuner, "evaluate", scripted(0.5, 0.5))
    outcome = finetune("same", **arguments)
    assert outcome.best == outcome.before  # no better is not better
    assert equal(weights("same/best"), weights("plain"))
    assert equal(weights("same/last"), weights("best/best"))
    assert not equal(weights("best/best"), weights("best/last"))


def test_evaluations_are_compared_by_accuracy_then_by_a_distance() -> None:
    one = evaluation.Evaluation(10, 1.0, 0.5, None, None, None, {}, 1.0)
    assert replace(one, top1=0.6, loss=9.0).rank > one.rank  # accuracy first
    assert replace(one, loss=0.9).rank > one.rank  # then the loss
    assert one.rank > replace(one, loss=float("nan")).rank
    unlabelled = replace(one, top1=None, agreement=0.5, divergence=0.1)
    # Stages of different losses are compared by what they have in common.
    assert replace(unlabelled, loss=9.0, divergence=0.05).rank > unlabelled.rank
    nothing = replace(one, top1=None, parts={"features_loss": 0.2})
    assert replace(nothing, loss=5.0, parts={"features_loss": 0.1}).rank > nothing.rank


def test_every_image_is_evaluated_once_whoever_shares_them(place: Path) -> None:
    module = __import__("tinyruns")
    original = module.normed().eval()
    model = ddf.restore(module.normed(), "normed").train()
    images, settings = open_images("data", "validation", True), image_settings(model, runs.SIZE)
    objective = Objective(model, Losses(task=0, logits=1.0, features=2.0), original)
    parts = [
        evaluate(
            model,
            evaluation_loader(images, settings, 4, rank, 2),
            evaluation.EvaluationSettings(ALONE),
            objective,
            original,
        )
        for rank in (0, 1)
    ]
    whole = evaluate(
        model, evaluation_loader(images, settings, 15), evaluation.EvaluationSettings(ALONE), objective, original
    )
    assert [part.images for part in parts] == [8, 7]
    for name in ("top1", "agreement", "divergence"):
        expected = sum(getattr(part, name) * part.images for part in parts) / 15
        # float32 logarithms: a divergence near 0 is a difference of much larger numbers
        assert getattr(whole, name) == pytest.approx(expected, abs=1e-6), name
    assert model.training
    assert model.drop.training
    with torch.no_grad():
        batch, labels = next(iter(evaluation_loader(images, settings, 15)))
        scores, theirs = model.eval()(batch), original(batch)
    assert whole.top1 == pytest.approx((scores.argmax(1) == labels).double().mean().item())
    assert whole.agreement == pytest.approx((scores.argmax(1) == theirs.argmax(1)).double().mean().item())
    assert whole.top5 is None  # of three classes it says nothing
    assert whole.loss == pytest.approx(whole.parts["logits_loss"] + 2 * whole.parts["features_loss"])
    assert whole.divergence == pytest.approx(whole.parts["logits_loss"])
    # Without labels the same, but for the accuracy.
    unlabelled = evaluate(
        model,
        evaluation_loader(open_images("data", "validation", False), settings, 15),
        evaluation.EvaluationSettings(ALONE, labeled=False),
        objective,
        original,
    )
    assert unlabelled.top1 is None
    assert replace(unlabelled, top1=whole.top1, seconds=whole.seconds) == whole


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            "no_number",
            r"stage 'features', step 3: the loss is nan; it began in the output of drop \(Bad\); try a lower",
        ),
        ("no_gradient", r"step 3: a gradient is not finite; it began at the gradient of last\.mix\.bias; try a lower"),
        (
            "no_memory",
            r"the GPU's memory ran out with batches of 8: try --batch-size 4 --accumulate 2, .*--amp bfloat16",
        ),
        ("no_cpu_memory", r"^memory ran out with batches of 8: try --batch-size 4 --accumulate 2"),
    ],
)
def test_what_goes_wrong_is_said_with_the_place_and_what_to_do(place: Path, own: str, words: str) -> None:
    recipe = written("bad.yaml", "{task: 0, features: 1.0}", "{task: 1.0}", runs.RECIPE)
    with pytest.raises(DDFError, match=words) as caught:
        finetune(own, own=own, recipe=recipe)
    assert caught.value.exit_code == 1
    # What was done before is not lost.
    assert Path(own, "checkpoints/step-00000000/state.pt").exists()
    assert equal(weights(f"{own}/last"), weights("plain"))


def test_float16_scales_the_loss_and_leaves_out_steps_that_overflow(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "amp_dtype", lambda stage, device: torch.float16)  # as if the CPU were a GPU
    assert distance(calm("scaled-loss"), weights("plain")) > 1e-2
    stuck = calm("stuck", own="no_gradient")  # from its third step on
    found = Checkpoints("stuck/checkpoints").latest()
    assert found is not None
    assert found[0]["scaler"]["scale"] == 2.0**16 / 2**4
    two_steps = calm("two-steps", own="no_gradient", changes={"steps": 2})
    assert equal(stuck, two_steps)


def test_where_a_loss_began_looks_at_images_weights_layers_and_the_original() -> None:
    class Overflow(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"a": x, "b": x * float("inf")}

    fine = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    images = torch.rand(2, 3, 4, 4)
    assert diagnostics.where_it_began(fine, None, images).endswith("began in the loss itself")
    assert "images themselves" in diagnostics.where_it_began(fine, None, images * float("nan"))
    assert "output of 1 (Overflow)" in diagnostics.where_it_began(
        nn.Sequential(nn.Identity(), Overflow()), None, images
    )
    teacher = nn.Sequential(Overflow())
    assert "original model, in the output of 0 (Overflow)" in diagnostics.where_it_began(fine, teacher, images)
    with torch.no_grad():
        fine[0].bias[1] = float("inf")
    assert "0.bias was not finite before this step" in diagnostics.where_it_began(fine, None, images)
    assert not any(module._forward_hooks for module in fine.modules())


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), diagnostics.memory_explained(4, 1):
        raise RuntimeError("shapes do not match")
    with pytest.raises(DDFError, match="--workers 1"), diagnostics.memory_explained(4, 1):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(DDFError) as caught, diagnostics.memory_explained(1, 3, amp=True):
        raise MemoryError
    assert "--batch-size" not in str(caught.value)
    assert "--amp" not in str(caught.value)
    assert "--input-size" in str(caught.value)


def test_progress_moves_on_a_terminal_and_is_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def training(progress: Progress) -> None:
        with progress.counting("stage [one]", 3, done=1):
            progress.step("loss 0.25  70 images/s")
            with progress.counting("evaluating", 2):
                progress.step()
            progress.say("epoch 1: [top-1] 50%")

    with progress_of(True) as progress:
        assert type(progress) is LineProgress
        training(progress)
    assert capsys.readouterr().err == "epoch 1: [top-1] 50%\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_of(True) as progress:
        training(progress)
    shown = capsys.readouterr().err
    assert "stage [one]" in shown
    assert "epoch 1: [top-1] 50%" in shown
    with progress_of(False) as progress:
        training(progress)
    assert capsys.readouterr() == ("", "")
