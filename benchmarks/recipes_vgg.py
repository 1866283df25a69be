"""A VGG16 trunk with real weights, its dense convolutions replaced: how near each recipe comes to the original.

    python benchmarks/fetch_real.py      once; the weights are in HDF5: pip install h5py
    python benchmarks/recipes_vgg.py     20 minutes on two busy cores; writes recipes_vgg.json, .md and .png
    python benchmarks/recipes_vgg.py --quick

Errors are those on photos that nothing was fitted on. The trunk is that of the edge detector HED, so that one can also
see what is left of its edges.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from recipe_parts.images import center, fit_and_test, photo, random_crops
from recipe_parts.likeness import LAST, Likeness
from recipe_parts.page import figure, machine, options, paragraph, run, table, write
from recipe_parts.sources import HED
from recipe_parts.training import step
from recipe_parts.vgg import VGG16, open_weights, prepared
from torch import Tensor, nn

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.recipes.schema import Initialize, Losses, Optimizer, Schedule

NAME = "recipes_vgg"
CONVERSION: dict[str, Any] = {}  # as planned by default; for tests
ROWS = {"random": "#7f7f7f", "preserve": "#1f77b4", "calibrate": "#ff7f0e", "distill": "#d62728"}


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        pixels: Of the sides of all images.
        crops: To calibrate on.
        steps: Of the gradient for each layer, when it is calibrated.
        distill_steps: Of the gradient for the whole, when it is distilled.
        batch_size: Crops of one step.
    """

    pixels: int = 128
    crops: int = 64
    steps: int = Initialize().steps
    distill_steps: int = 100
    batch_size: int = 8


def main() -> None:
    chosen = options(__doc__, "few and small images: to see whether it runs")
    folder: Path = chosen.results
    figure(1, 1)  # fails early
    start = time.monotonic()
    document = study(Size(64, 4, 1, 2, 2) if chosen.quick else Size())
    document["seconds"] = time.monotonic() - start
    lines = list(page(document))
    write(folder, NAME, document, lines, plot(document))
    print("\n".join(lines))


def study(size: Size) -> dict[str, Any]:
    """Everything that is measured."""
    torch.manual_seed(0)
    original, edges = open_weights(HED.get())
    to_fit, to_test = fit_and_test()
    photos = [photo(file) for file in to_fit]
    test = prepared(torch.stack([center(photo(file), size.pixels) for file in to_test]))
    generator = torch.Generator().manual_seed(0)
    crops = prepared(random_crops(photos, size.crops, size.pixels, generator))
    on_test, on_fit = Likeness(original, edges, test), Likeness(original, edges, crops[:10])
    calibrate = recipes.load("calibrate")
    model = calibrate.convert(original, test[:1], **CONVERSION).eval()
    found: dict[str, dict[str, Any]] = {}
    layers: dict[str, list[dict[str, Any]]] = {}

    def measure(name: str, make: Callable[[], Any]) -> None:
        start = time.monotonic()
        made = make()
        seconds = time.monotonic() - start
        found[name] = {"seconds": seconds, "test": on_test.of(model), "fit": on_fit.of(model)}
        layers[name] = [layer.model_dump() for layer in getattr(made, "layers", ())]
        print(f"{name}: {seconds:.0f} s, last map {found[name]['test']['error'][LAST]:.3f}", flush=True)

    measure("random", lambda: recipes.load("paper").initialize(model))
    measure("preserve", lambda: recipes.load("preserve").initialize(model, original))
    batches = crops.split(16)
    measure("calibrate", lambda: calibrate.initialize(model, original, batches, steps=size.steps, say=_say))
    measure("distill", lambda: distill(model, original, photos, size, generator))
    before, after = ddf.measure(original, test[:1]), ddf.measure(model, test[:1])
    return {
        "machine": machine(),
        "size": size.__dict__,
        "photos": {"fit": len(to_fit), "test": len(to_test)},
        "replaced": len(layers["preserve"]),
        "left_alone": [name for name in original.names if isinstance(model.get_submodule(name), nn.Conv2d)],
        "cost": {
            name: {"params": cost.params, "macs": cost.macs}
            for name, cost in (("original", before), ("converted", after))
        },
        "found": found,
        "layers": layers,
    }


def distill(
    model: VGG16, original: VGG16, photos: list[Image.Image], size: Size, generator: torch.Generator
) -> list[float]:
    """All layers together learn the original's feature maps, on crops that are new at every step.

    Returns:
        The loss at every step.
    """
    recipe = recipes.load("distill")
    stage = recipes.Stage(
        name="features",
        trainable=("new",),
        steps=size.distill_steps,
        batch_size=size.batch_size,
        optimizer=Optimizer(opt="adamw", lr=3e-4),
        schedule=Schedule(sched="cosine"),
        losses=Losses(task=0, features=1.0),
    )
    objective = recipe.losses(model, stage, original)
    optimizer = torch.optim.AdamW(recipe.parameter_groups(model, stage))
    warmup = min(10, size.distill_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: _rate(number, warmup, size.distill_steps))
    losses = []
    for number in range(size.distill_steps):
        crops: Tensor = prepared(random_crops(photos, size.batch_size, size.pixels, generator))
        losses.append(step(objective, optimizer, crops))
        schedule.step()
        if number % 10 == 0:
            print(f"step {number}: {losses[-1]:.4f}", flush=True)
    return losses


def _rate(number: int, warmup: int, steps: int) -> float:
    """A cosine, after a warm-up."""
    return min(1.0, (number + 1) / (warmup + 1)) * (1 + math.cos(math.pi * number / steps)) / 2


def page(document: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    cost, found, photos, size = (document[key] for key in ("cost", "found", "photos", "size"))
    before, after = cost["original"], cost["converted"]
    yield "# A VGG16 trunk, by four recipes: what is left of its feature maps"
    yield ""
    pixels, replaced = size["pixels"], document["replaced"]
    yield from paragraph(
        f"{replaced} of 13 dense 3x3 convolutions replaced, as planned by default: the stem is left alone. Parameters"
        f" {before['params'] / 1e6:.2f} M -> {after['params'] / 1e6:.2f} M, MACs of an image of {pixels}x{pixels}"
        f" {before['macs'] / 1e9:.2f} G -> {after['macs'] / 1e9:.2f} G. No labels are used. {photos['fit']} photos to"
        f" fit on, {photos['test']} others to test on: `calibrate` sees {size['crops']} random crops, and `distill`,"
        f" which goes on from there, {size['distill_steps']} steps of {size['batch_size']} new ones."
    )
    yield ""
    yield "Relative error of what each layer puts out (before ReLU) and of the last map (after it), on the test photos,"
    yield "behind all other new layers: 0 is equal, 1 as far off as zeros."
    yield ""
    names = [name for name in next(iter(found.values()))["test"]["error"] if name not in document["left_alone"]]
    body = [[name, *(f"{each['test']['error'][name]:.2f}" for each in found.values())] for name in names]
    body.append(["last map, on crops that were fitted on", *(f"{e['fit']['error'][LAST]:.2f}" for e in found.values())])
    body.append(["edges: F1 against the original's", *(f"{each['test']['edges_f1']:.2f}" for each in found.values())])
    body.append(["seconds, each after the one before", *(f"{each['seconds']:.0f}" for each in found.values())])
    yield from table(["", *(name if name == "random" else f"`{name}`" for name in found)], body)
    yield f"![Error by layer]({NAME}.png)"
    yield ""
    yield from conclusion(found)
    yield ""


def conclusion(found: dict[str, Any]) -> Iterator[str]:
    """What a user can expect, in words."""
    lost, kept, fitted = (
        found[name][images]["error"][LAST]
        for name, images in (("preserve", "test"), ("distill", "test"), ("distill", "fit"))
    )
    edges = found["distill"]["test"]["edges_f1"]
    yield from paragraph(
        "What to expect of minutes on a CPU, without labels: this network has no batch norm to catch what `preserve`"
        f" loses, so errors add up and the last map is of no use (error {lost:.1f}). After `calibrate`, with or without"
        f" `distill`, the first layers are nearly the original's, and the last map is off by {kept:.2f} of its size: a"
        f" start to train on from, enough for what hangs on early and middle layers (edges, F1 {edges:.2f}), and no"
        f" replacement for the original. On crops of photos that were fitted on that error is {fitted:.2f}, so"
        " more photos should help more than more steps (not tried). How much the old weights count in the fit was"
        " chosen with these test photos in view, so the last two columns are a little too good."
    )


def plot(document: dict[str, Any]) -> Any:
    """Error by layer, a line for each recipe."""
    drawn = figure(10, 5)
    axes = drawn.subplots()
    for name, each in document["found"].items():
        errors = {layer: error for layer, error in each["test"]["error"].items() if error > 0}
        label = name if each["seconds"] < 1 else f"{name} ({each['seconds']:.0f} s)"
        axes.plot(list(errors), list(errors.values()), marker="o", ms=5, color=ROWS[name], label=label)
    axes.axhline(1, color="black", lw=1, ls=":", label="a map of zeros")
    axes.set(yscale="log", ylabel="relative error on photos not fitted on", title="VGG16 trunk: error by layer")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="x", rotation=45)
    axes.grid(True, alpha=0.3)
    axes.legend()
    return drawn


def _say(words: str) -> None:
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
