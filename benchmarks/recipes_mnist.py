"""A small ResNet on 5,000 MNIST digits: what a converted model learns, from which start, from whom.

    python benchmarks/fetch_real.py       once
    python benchmarks/recipes_mnist.py    half an hour on two busy cores; writes recipes_mnist.json, .md and .png
    python benchmarks/recipes_mnist.py --quick

For each of three seeds a ResNet is trained, converted, and trained on; accuracy on 1,000 other digits after each epoch.
The same command gives the same numbers on the same machine.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from recipe_parts.ablation import channel_alone, spatial_alone
from recipe_parts.images import digits, split
from recipe_parts.page import figure, machine, options, paragraph, run, table, write
from recipe_parts.small_resnet import SmallResNet
from recipe_parts.training import accuracy, spread, train
from torch import Tensor, nn

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.recipes.schema import Losses, Optimizer

NAME = "recipes_mnist"
TEST = 1000
SEEDS = (0, 1, 2)
FIRST, AGAIN = 8, 6  # epochs of the original, and of everything that comes after
_LABELS = Losses(task=1.0)
# Every converted model is built alike, so that rows differ in what they say they differ in and nothing else. With these
# options a layer can take old weights over, and from a random start it is the paper's.
_CONVERSION = {"affine": True, "mixing": "dense"}


@dataclass(frozen=True)
class Row:
    """One way to go on from the trained original.

    Attributes:
        name: In words.
        recipe: Whose initialization; None leaves the model as it is.
        change: Done to the converted model before it is initialized.
        teacher: Learn from the original, as the recipe ``distill`` does, and look at no label.
        color: In the plot.
        dashed: In the plot.
    """

    name: str
    recipe: str | None
    color: str
    change: Callable[[nn.Module], None] = lambda model: None
    teacher: bool = False
    dashed: bool = False


ROWS = (
    Row("original, trained on", None, "#7f7f7f"),
    Row("spatial filter alone, random", "paper", "#9ecae1", spatial_alone, dashed=True),
    Row("channel filter alone, random", "paper", "#6baed6", channel_alone, dashed=True),
    Row("both filters, random (`paper`)", "paper", "#08519c"),
    Row("both, `preserve`", "preserve", "#d62728"),
    Row("both, `calibrate`", "calibrate", "#ff7f0e"),
    Row("both, `preserve`, then the original teaches (`distill`)", "preserve", "#2ca02c", teacher=True),
)
_ORIGINAL = "original"


def main() -> None:
    chosen = options(__doc__, "one seed, one epoch, fewer digits: to see whether it runs")
    folder: Path = chosen.results
    figure(1, 1)  # fails early
    start = time.monotonic()
    document = study(SEEDS[:1] if chosen.quick else SEEDS, *((1, 1, 500) if chosen.quick else (FIRST, AGAIN, None)))
    document["seconds"] = time.monotonic() - start
    lines = list(page(document))
    write(folder, NAME, document, lines, plot(document))
    print("\n".join(lines))


def study(seeds: Sequence[int], first: int, again: int, limit: int | None) -> dict[str, Any]:
    """Everything that is measured."""
    images, labels = digits()
    to_train, to_test = split(labels, TEST)
    to_train = to_train[torch.randperm(len(to_train), generator=torch.Generator().manual_seed(0))[:limit]]
    training, test = (images[to_train], labels[to_train]), (images[to_test], labels[to_test])
    curves: dict[str, list[list[float]]] = {name: [] for name in (_ORIGINAL, *(row.name for row in ROWS))}
    costs: dict[str, dict[str, int]] = {}
    for seed in seeds:
        torch.manual_seed(seed)
        original = SmallResNet()
        curves[_ORIGINAL].append(learn(original, None, _LABELS, first, training, test, seed))
        costs[_ORIGINAL] = cost(original)
        _say(seed, _ORIGINAL, curves)
        for row in ROWS:
            torch.manual_seed(seed)
            model = prepare(row, original, training[0])
            losses = recipes.load("distill").stage("everything").losses if row.teacher else _LABELS
            teacher = original if row.teacher else None
            curves[row.name].append(learn(model, teacher, losses, again, training, test, seed))
            costs[row.name] = cost(model)
            _say(seed, row.name, curves)
    return {
        "machine": machine(),
        "seeds": list(seeds),
        "digits": {"training": len(to_train), "test": len(to_test)},
        "epochs": {"original": first, "others": again},
        "rows": {
            name: {**costs[name], "accuracy": of_row, "spread": spread(of_row)} for name, of_row in curves.items()
        },
    }


def prepare(row: Row, original: nn.Module, images: Tensor, **conversion: Any) -> nn.Module:
    """The model of a row, before it learns; further options of the conversion are for tests."""
    if row.recipe is None:
        return copy.deepcopy(original)
    recipe = recipes.load(row.recipe)
    model = recipe.convert(original, images[:2], **_CONVERSION, **conversion)
    row.change(model)
    recipe.initialize(model, original, images.split(64))
    return model


def learn(
    model: nn.Module,
    teacher: nn.Module | None,
    losses: Losses,
    epochs: int,
    training: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    seed: int,
) -> list[float]:
    """Accuracy before the first epoch, and after each."""
    stage = recipes.Stage(
        name="digits", epochs=epochs, optimizer=Optimizer(opt="adamw", lr=2e-3, weight_decay=0.01), losses=losses
    )
    return train(model, recipes.load("finetune"), stage, training, seed, lambda: accuracy(model, test), teacher)


def cost(model: nn.Module) -> dict[str, int]:
    """Parameters and MACs for one digit."""
    found = ddf.measure(model, torch.zeros(1, 1, 28, 28))
    return {"params": found.params, "macs": found.macs}


def page(document: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    rows, counts, epochs = document["rows"], document["digits"], document["epochs"]
    seeds = ", ".join(map(str, document["seeds"]))
    yield "# A small ResNet on MNIST digits: what a converted model learns, and from which start"
    yield ""
    yield from paragraph(
        f"{counts['training']:,} digits to train, {counts['test']:,} others to test; seeds {seeds}. For each seed"
        f" an original is trained for {epochs['original']} epochs, converted (all dense 3x3 convolutions but the stem),"
        " and everything is then trained on, with one optimizer and one schedule for all rows; with labels, but for the"
        " last row, which looks at the original alone. Percent right on the test digits: mean of the seeds"
        " (least to most). Epoch 0 is before training."
    )
    yield ""
    shown = sorted({0, 1, 2, 3, epochs["others"]} & set(range(epochs["others"] + 1)))
    headings = ["", "parameters", "MACs", *(f"epoch {epoch}" for epoch in shown)]
    body = []
    for name, row in rows.items():
        numbers = row["spread"]
        cells = [_percent(numbers, epoch) for epoch in shown]
        if name == _ORIGINAL:
            cells = [*[""] * (len(shown) - 1), _percent(numbers, -1)]
        body.append([name, f"{row['params']:,}", f"{row['macs'] / 1e6:.2f} M", *cells])
    yield from table(headings, body)
    yield f"![Accuracy after each epoch]({NAME}.png)"
    yield ""
    yield from conclusion(document)
    yield ""


def conclusion(document: dict[str, Any]) -> Iterator[str]:
    """What the numbers are, in the order in which they came out."""
    rows = {name: row["spread"]["mean"] for name, row in document["rows"].items() if name != _ORIGINAL}
    for when, epoch in (("Before training", 0), ("After one epoch", 1), ("At the end", -1)):
        order = sorted(rows, key=lambda name: -rows[name][epoch])
        shown = "; ".join(f"{name} {100 * rows[name][epoch]:.1f}" for name in order)
        yield from paragraph(f"{when}, best first: {shown}.")
        yield ""
    yield "One test digit is 0.1 percent: rows whose ranges overlap are not told apart by three seeds."


def _percent(numbers: dict[str, list[float]], epoch: int) -> str:
    mean, least, most = (100 * numbers[key][epoch] for key in ("mean", "min", "max"))
    return f"{mean:.1f} ({least:.1f} to {most:.1f})"


def plot(document: dict[str, Any]) -> Any:
    """Wrong answers by epoch, a line for each row and a band from the best seed to the worst."""
    drawn = figure(10, 5.5)
    axes = drawn.subplots()
    least = 100 / document["digits"]["test"] / 2  # where the logarithm has no place for 0
    for row in ROWS:
        numbers = document["rows"][row.name]["spread"]
        mean, low, high = ([max(least, 100 * (1 - v)) for v in numbers[key]] for key in ("mean", "max", "min"))
        epochs = range(len(mean))
        style = "--" if row.dashed else "-"
        axes.plot(epochs, mean, style, color=row.color, marker="o", ms=4, label=row.name.replace("`", ""))
        axes.fill_between(epochs, low, high, color=row.color, alpha=0.15, lw=0)
    end = 100 * (1 - document["rows"][_ORIGINAL]["spread"]["mean"][-1])
    axes.axhline(max(least, end), color="black", lw=1, ls=":", label="original, before conversion")
    ticks = [value for value in (0.5, 1, 2, 5, 10, 20, 50, 100) if value >= least]
    axes.set(yscale="log", xlabel="epochs of training after the conversion", ylabel="wrong on test digits, percent")
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)
    seeds, training = len(document["seeds"]), document["digits"]["training"]
    axes.set_title(f"Small ResNet, {training:,} MNIST digits: mean and range of {seeds} seeds")
    return drawn


def _say(seed: int, name: str, curves: dict[str, list[list[float]]]) -> None:
    print(f"seed {seed}: {name}: {' '.join(f'{100 * value:.1f}' for value in curves[name][-1])}", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
