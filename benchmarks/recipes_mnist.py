"""A small ResNet on 5,000 MNIST digits: what a converted model learns, from which start, with which teacher.

    python benchmarks/fetch_real.py       once
    python benchmarks/recipes_mnist.py    half an hour on two busy cores; writes recipes_mnist.json, .md and .png
    python benchmarks/recipes_mnist.py --quick

For each of three seeds a ResNet is trained, converted, and trained on; accuracy on 1,000 other digits after each epoch.
The same command gives the same numbers on the same machine.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common.markdown import paragraph, table
from common.results import exit_code, machine, run_study, study_parser
from common.sources import digits
from torch import Tensor, nn

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.layers import DDF2d
from ddf_convert.recipes.schema import Losses, Optimizer
from ddf_convert.utils.figures import new_figure

NAME = "recipes_mnist"
TEST = 1000
SEEDS = (0, 1, 2)
FIRST_EPOCHS, MORE_EPOCHS = 8, 6  # of the original, and of every row after the conversion
LABELS_ONLY = Losses(task=1.0)
# All rows are converted with these options. They let a layer take old weights over; a random layer is the paper's.
CONVERSION = {"affine": True, "mixing": "dense"}
ORIGINAL = "original"

Data = tuple[Tensor, Tensor]  # images, labels


# --- the model, and layers with one filter alone ---


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-18."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem that halves the map, a block for each width of which all but the first halve it, and a classifier."""

    def __init__(self, widths: Sequence[int] = (16, 32, 64), num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        in_channels = [widths[0], *widths[:-1]]
        strides = [1, *[2] * (len(widths) - 1)]
        self.blocks = nn.Sequential(*map(BasicBlock, in_channels, widths, strides))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> (B, num_classes)."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.fc(x.mean((-2, -1)))


class SpatialOnes(nn.Module):
    """Replaces a spatial branch: (B, C, H, W) -> (B, G*K*K, ceil(H / stride), ceil(W / stride)) ones."""

    def __init__(self, layer: DDF2d) -> None:
        super().__init__()
        self.taps = layer.heads * layer.kernel_size[0] ** 2
        self.stride = layer.stride[0]

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = (-(-size // self.stride) for size in input.shape[-2:])
        return input.new_ones(len(input), self.taps, rows, columns)


class ChannelOnes(nn.Module):
    """Replaces a channel branch: (B, C, H, W) -> (B, C, K, K) ones."""

    def __init__(self, layer: DDF2d) -> None:
        super().__init__()
        self.shape = layer.in_channels, *layer.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        return input.new_ones(len(input), *self.shape)


def spatial_only(model: nn.Module) -> None:
    """Leaves every DDF layer its spatial filter, as in the paper's table 3."""
    for layer in _multiplying_layers(model):
        layer.channel_branch = ChannelOnes(layer)


def channel_only(model: nn.Module) -> None:
    """Leaves every DDF layer its channel filter, as in the paper's table 3."""
    for layer in _multiplying_layers(model):
        layer.spatial_branch = SpatialOnes(layer)


def _multiplying_layers(model: nn.Module) -> list[DDF2d]:
    found = [module for module in model.modules() if isinstance(module, DDF2d)]
    if not found or any(layer.combine != "mul" for layer in found):
        raise ValueError("there must be DDF layers, and they must multiply: 1 is neutral in a product alone")
    return found


@dataclass(frozen=True)
class Row:
    """One way to go on from the trained original.

    Attributes:
        name: In the table.
        recipe: Converts and initializes; None leaves the model as it is.
        color: In the plot.
        ablate: Changes the converted model before it is initialized.
        teacher: Learn from the original, as the recipe ``distill`` does, and use no labels.
        dashed: In the plot.
    """

    name: str
    recipe: str | None
    color: str
    ablate: Callable[[nn.Module], None] = lambda model: None
    teacher: bool = False
    dashed: bool = False

    @property
    def losses(self) -> Losses:
        return recipes.load("distill").stage("everything").losses if self.teacher else LABELS_ONLY


ROWS = (
    Row("original, trained on", None, "#7f7f7f"),
    Row("spatial filter alone, random", "paper", "#9ecae1", spatial_only, dashed=True),
    Row("channel filter alone, random", "paper", "#6baed6", channel_only, dashed=True),
    Row("both filters, random (`paper`)", "paper", "#08519c"),
    Row("both, `preserve`", "preserve", "#d62728"),
    Row("both, `calibrate`", "calibrate", "#ff7f0e"),
    Row("both, `preserve`, then the original teaches (`distill`)", "preserve", "#2ca02c", teacher=True),
)


# --- what is measured ---


def main() -> None:
    options = study_parser(__doc__, "one seed, one epoch, fewer digits: to see whether it runs").parse_args()
    seeds, sizes = (SEEDS[:1], (1, 1, 500)) if options.quick else (SEEDS, (FIRST_EPOCHS, MORE_EPOCHS, None))
    run_study(NAME, options, lambda: measure(seeds, *sizes), page, plot)


def measure(seeds: Sequence[int], first_epochs: int, more_epochs: int, limit: int | None) -> dict[str, Any]:
    """Returns the results; ``limit`` is the number of digits to train on."""
    images, labels = digits()
    to_train, to_test = split(labels, TEST)
    to_train = to_train[torch.randperm(len(to_train), generator=torch.Generator().manual_seed(0))[:limit]]
    training, test = (images[to_train], labels[to_train]), (images[to_test], labels[to_test])
    curves: dict[str, list[list[float]]] = {name: [] for name in (ORIGINAL, *(row.name for row in ROWS))}
    costs: dict[str, dict[str, int]] = {}

    def learn(name: str, model: nn.Module, teacher: nn.Module | None, losses: Losses, epochs: int, seed: int) -> None:
        curve = train(model, teacher, losses, epochs, training, test, seed)
        cost = ddf.measure(model, torch.zeros(1, 1, 28, 28))
        curves[name].append(curve)
        costs[name] = {"params": cost.params, "macs": cost.macs}
        print(f"seed {seed}: {name}: {' '.join(f'{100 * value:.1f}' for value in curve)}", flush=True)

    for seed in seeds:
        torch.manual_seed(seed)
        original = SmallResNet()
        learn(ORIGINAL, original, None, LABELS_ONLY, first_epochs, seed)
        for row in ROWS:
            torch.manual_seed(seed)
            model = prepare(row, original, training[0])
            learn(row.name, model, original if row.teacher else None, row.losses, more_epochs, seed)
    return {
        "machine": machine(),
        "seeds": list(seeds),
        "digits": {"training": len(to_train), "test": len(to_test)},
        "epochs": {"original": first_epochs, "others": more_epochs},
        "rows": {name: {**costs[name], "accuracy": runs, "spread": spread(runs)} for name, runs in curves.items()},
    }


def split(labels: Tensor, test: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Returns indices to train and to test on; every class has the same share of the test."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    shuffled = [torch.nonzero(labels == each)[:, 0] for each in range(classes)]
    shuffled = [own[torch.randperm(len(own), generator=generator)] for own in shuffled]
    counts = [round(test * len(own) / len(labels)) for own in shuffled]
    train = torch.cat([own[count:] for own, count in zip(shuffled, counts, strict=True)])
    return train, torch.cat([own[:count] for own, count in zip(shuffled, counts, strict=True)])


def prepare(row: Row, original: nn.Module, images: Tensor, **conversion: Any) -> nn.Module:
    """Returns the model of a row before it learns; tests give further options of the conversion."""
    if row.recipe is None:
        return copy.deepcopy(original)
    recipe = recipes.load(row.recipe)
    model = recipe.convert(original, images[:2], **CONVERSION, **conversion)
    row.ablate(model)
    recipe.initialize(model, original, images.split(64))
    return model


def train(
    model: nn.Module,
    teacher: nn.Module | None,
    losses: Losses,
    epochs: int,
    training: Data,
    test: Data,
    seed: int,
) -> list[float]:
    """Trains with AdamW and a cosine schedule; returns the accuracy before the first epoch and after each."""
    images, labels = training
    recipe = recipes.load("finetune")
    optimizer_settings = Optimizer(opt="adamw", lr=2e-3, weight_decay=0.01)
    stage = recipes.Stage(name="digits", epochs=epochs, optimizer=optimizer_settings, losses=losses)
    objective = recipe.losses(model, stage, teacher)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, stage))
    steps = epochs * math.ceil(len(images) / stage.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    curve = [accuracy(model, test)]
    for _ in range(epochs):
        objective.train()
        for batch in torch.randperm(len(images), generator=generator).split(stage.batch_size):
            optimizer.zero_grad()
            objective(images[batch], labels[batch])["loss"].backward()
            nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), 1.0)
            optimizer.step()
            schedule.step()
        curve.append(accuracy(model, test))
    return curve


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, batch_size: int = 500) -> float:
    """Returns the share of images that are classified right, in evaluation mode."""
    images, labels = data
    was_training, right = model.training, 0
    model.eval()
    for some, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += int((model(some).argmax(1) == targets).sum())
    model.train(was_training)
    return right / len(images)


def spread(runs: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Returns mean, minimum and maximum of several runs, epoch by epoch."""
    epochs = list(zip(*runs, strict=True))
    return {
        "mean": [sum(values) / len(values) for values in epochs],
        "min": [min(values) for values in epochs],
        "max": [max(values) for values in epochs],
    }


# --- the page ---


def page(document: dict[str, Any]) -> Iterator[str]:
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
    shown = sorted({0, 1, 2, 3, epochs["others"]} & set(range(epochs["others"] + 1)))
    body = []
    for name, row in rows.items():
        cells = [_percent(row["spread"], epoch) for epoch in shown]
        if name == ORIGINAL:
            cells = [*[""] * (len(shown) - 1), _percent(row["spread"], -1)]
        body.append([name, f"{row['params']:,}", f"{row['macs'] / 1e6:.2f} M", *cells])
    yield from table(["", "parameters", "MACs", *(f"epoch {epoch}" for epoch in shown)], body, numbers=True)
    yield f"![Accuracy after each epoch]({NAME}.png)"
    yield ""
    means = {name: row["spread"]["mean"] for name, row in rows.items() if name != ORIGINAL}
    for when, epoch in (("Before training", 0), ("After one epoch", 1), ("At the end", -1)):
        order = sorted(means, key=lambda name: -means[name][epoch])
        yield from paragraph(
            f"{when}, best first: {'; '.join(f'{name} {100 * means[name][epoch]:.1f}' for name in order)}."
        )
    yield "One test digit is 0.1 percent: rows whose ranges overlap are not told apart by three seeds."
    yield ""


def _percent(numbers: dict[str, list[float]], epoch: int) -> str:
    mean, least, most = (100 * numbers[key][epoch] for key in ("mean", "min", "max"))
    return f"{mean:.1f} ({least:.1f} to {most:.1f})"


def plot(document: dict[str, Any]) -> Any:
    """Draws wrong answers by epoch: a line for each row, and a band from the best seed to the worst."""
    figure = new_figure(10, 5.5)
    axes = figure.subplots()
    least = 100 / document["digits"]["test"] / 2  # stands for 0, which a logarithmic axis cannot show
    for row in ROWS:
        numbers = document["rows"][row.name]["spread"]
        mean, low, high = ([max(least, 100 * (1 - v)) for v in numbers[key]] for key in ("mean", "max", "min"))
        epochs = range(len(mean))
        style = "--" if row.dashed else "-"
        axes.plot(epochs, mean, style, color=row.color, marker="o", ms=4, label=row.name.replace("`", ""))
        axes.fill_between(epochs, low, high, color=row.color, alpha=0.15, lw=0)
    end = 100 * (1 - document["rows"][ORIGINAL]["spread"]["mean"][-1])
    axes.axhline(max(least, end), color="black", lw=1, ls=":", label="original, before conversion")
    ticks = [value for value in (0.5, 1, 2, 5, 10, 20, 50, 100) if value >= least]
    axes.set(yscale="log", xlabel="epochs of training after the conversion", ylabel="wrong on test digits, percent")
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.grid(True, alpha=0.3)
    axes.legend(loc="upper right", fontsize=9)
    seeds, training = len(document["seeds"]), document["digits"]["training"]
    axes.set_title(f"Small ResNet, {training:,} MNIST digits: mean and range of {seeds} seeds")
    return figure


if __name__ == "__main__":
    sys.exit(exit_code(main))
