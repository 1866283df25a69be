"""A VGG16 trunk with real weights, its dense convolutions replaced: how near each recipe comes to the original.

    python benchmarks/fetch_real.py      once; the weights are in HDF5: pip install h5py
    python benchmarks/recipes_vgg.py     20 minutes on two busy cores; writes recipes_vgg.json, .md and .png
    python benchmarks/recipes_vgg.py --quick

Errors are those on photos that nothing was fitted on. The trunk belongs to the edge detector HED, so that its edges can
be compared too.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common.markdown import paragraph, table
from common.results import exit_code, machine, run_study, study_parser
from common.sources import HED, center_crop, photos_to_fit_and_test, random_crops, read_photo
from PIL import Image
from torch import Tensor, nn

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.errors import UsageError
from ddf_convert.recipes.losses import FeatureExtractor
from ddf_convert.recipes.schema import Initialize, Losses, Optimizer, Schedule
from ddf_convert.utils.figures import new_figure

NAME = "recipes_vgg"
CONVERSION: dict[str, Any] = {}  # tests give options
COLORS = {"random": "#7f7f7f", "preserve": "#1f77b4", "calibrate": "#ff7f0e", "distill": "#d62728"}
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN = (104.00699, 116.66877, 122.67892)  # blue, green, red: of Caffe, as these weights expect
LAST = "last map"


# --- HED's trunk and its edges ---


class VGG16(nn.Module):
    """13 convolutions with ReLU; a 2x2 max-pool between blocks, none at the end (as in HED).

    Args:
        blocks: Channels of every convolution, block by block.
    """

    def __init__(self, blocks: Sequence[Sequence[int]] = BLOCKS) -> None:
        super().__init__()
        self.names: list[str] = []  # conv1_1, conv1_2, conv2_1, ...
        self.ends: list[str] = []  # the last of each block
        in_channels = 3
        for block, widths in enumerate(blocks, 1):
            for place, width in enumerate(widths, 1):
                self.names.append(f"conv{block}_{place}")
                self.add_module(self.names[-1], nn.Conv2d(in_channels, width, 3, padding=1))
                in_channels = width
            self.ends.append(self.names[-1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W), BGR minus the mean, to the last map, (B, 512, H/16, W/16)."""
        for name in self.names:
            x = F.relu(self.get_submodule(name)(x))
            if name in self.ends[:-1]:
                x = F.max_pool2d(x, 2)
        return x


class Edges:
    """HED's side outputs and their fusion: edge probabilities from the last map of every block.

    Args:
        file: Arrays by path, as Keras 3 names them.
    """

    def __init__(self, file: Mapping[str, Any]) -> None:
        self.sides = [_kernel_and_bias(file, f"dsn{block}/vars") for block in range(1, len(BLOCKS) + 1)]
        self.fuse = _kernel_and_bias(file, "fuse/vars")

    def __call__(self, ends: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, ...) at the ends of the blocks, after ReLU, to probabilities (B, 1, H, W)."""
        size = ends[0].shape[-2:]
        sides = [
            F.interpolate(F.conv2d(end, *side), size, mode="bilinear", align_corners=False)
            for end, side in zip(ends, self.sides, strict=True)
        ]
        return F.conv2d(torch.cat(sides, 1), *self.fuse).sigmoid()


def open_weights(file: Path) -> tuple[VGG16, Edges]:
    """Returns the trunk and the edges; a UsageError if h5py is missing."""
    try:
        import h5py
    except ImportError as error:
        raise UsageError("these weights are in HDF5, and h5py is missing: pip install h5py") from error
    trunk = VGG16().eval()
    with h5py.File(file) as opened:
        load_trunk(trunk, opened)
        return trunk.requires_grad_(True), Edges(opened)


def load_trunk(model: VGG16, file: Mapping[str, Any]) -> None:
    """Loads the trunk's weights from arrays by path."""
    state = {}
    for name in model.names:
        state[f"{name}.weight"], state[f"{name}.bias"] = _kernel_and_bias(file, keras_path(name))
    model.load_state_dict(state)


def keras_path(name: str) -> str:
    """Returns where Keras 3 keeps a convolution: conv2_1 in block2/layers/conv2d, conv2_2 in .../conv2d_1, ..."""
    block, place = name.removeprefix("conv").split("_")
    return f"block{block}/layers/conv2d" + (f"_{int(place) - 1}" if int(place) > 1 else "") + "/vars"


def _kernel_and_bias(file: Mapping[str, Any], path: str) -> tuple[Tensor, Tensor]:
    kernel, bias = (torch.from_numpy(np.asarray(file[f"{path}/{key}"], dtype=np.float32)) for key in (0, 1))
    return kernel.permute(3, 2, 0, 1).contiguous(), bias  # (K, K, in, out) in the file


def preprocess(images: Tensor) -> Tensor:
    """RGB from 0 to 255 -> BGR minus the mean."""
    return images.flip(-3) - torch.tensor(MEAN).view(3, 1, 1)


class Similarity:
    """Compares models with the original on the same images (B, 3, H, W), preprocessed."""

    def __init__(self, original: VGG16, edges: Edges, images: Tensor, batch_size: int = 5) -> None:
        self.edges = edges
        self.batches = images.split(batch_size)
        self.expected = [feature_maps(original, batch) for batch in self.batches]

    @torch.no_grad()
    def of(self, model: VGG16) -> dict[str, Any]:
        """Returns relative errors of every convolution's output and of the last map, and the F1 of the edges.

        An error is the root of the squared distance over the squared norm, of all images together: 0 is equal, 1 as far
        off as a map of zeros.
        """
        distance = dict.fromkeys([*model.names, LAST], 0.0)
        norm = dict.fromkeys(distance, 0.0)
        both = predicted = wanted = 0
        for batch, expected in zip(self.batches, self.expected, strict=True):
            found = feature_maps(model, batch)
            for name in distance:
                distance[name] += (found[name] - expected[name]).double().square().sum().item()
                norm[name] += expected[name].double().square().sum().item()
            edges, true = (self.edges([maps[end].relu() for end in model.ends]) > 0.5 for maps in (found, expected))
            both += int((edges & true).sum())
            predicted += int(edges.sum())
            wanted += int(true.sum())
        return {
            "error": {name: (distance[name] / norm[name]) ** 0.5 for name in distance},
            "edges_f1": 2 * both / max(1, predicted + wanted),
        }


@torch.no_grad()
def feature_maps(model: VGG16, images: Tensor) -> dict[str, Tensor]:
    """Returns the output of every convolution, and the last map."""
    last, outputs = FeatureExtractor(model, model.names)(images)
    return {**dict(zip(model.names, outputs, strict=True)), LAST: last}


# --- what is measured ---


@dataclass(frozen=True)
class StudySize:
    """How much of everything.

    Attributes:
        pixels: Sides of all images.
        crops: To calibrate on.
        steps: Gradient steps of each layer's calibration.
        distill_steps: Gradient steps of the distillation.
        batch_size: Crops of one such step.
    """

    pixels: int = 128
    crops: int = 64
    steps: int = Initialize().steps
    distill_steps: int = 100
    batch_size: int = 8


def main() -> None:
    options = study_parser(__doc__, "few and small images: to see whether it runs").parse_args()
    size = StudySize(64, 4, 1, 2, 2) if options.quick else StudySize()
    run_study(NAME, options, lambda: measure(size), page, plot)


def measure(size: StudySize) -> dict[str, Any]:
    torch.manual_seed(0)
    original, edges = open_weights(HED.get())
    to_fit, to_test = photos_to_fit_and_test()
    photos = [read_photo(file) for file in to_fit]
    test = preprocess(torch.stack([center_crop(read_photo(file), size.pixels) for file in to_test]))
    generator = torch.Generator().manual_seed(0)
    crops = preprocess(random_crops(photos, size.crops, size.pixels, generator))
    on_test, on_fit = Similarity(original, edges, test), Similarity(original, edges, crops[:10])
    calibrate = recipes.load("calibrate")
    model = calibrate.convert(original, test[:1], **CONVERSION).eval()
    found: dict[str, dict[str, Any]] = {}
    layers: dict[str, list[dict[str, Any]]] = {}

    def compare(name: str, change: Callable[[], Any]) -> None:
        start = time.monotonic()
        report = change()
        seconds = time.monotonic() - start
        found[name] = {"seconds": seconds, "test": on_test.of(model), "fit": on_fit.of(model)}
        layers[name] = [layer.model_dump() for layer in getattr(report, "layers", ())]
        _say(f"{name}: {seconds:.0f} s, last map {found[name]['test']['error'][LAST]:.3f}")

    compare("random", lambda: recipes.load("paper").initialize(model))
    compare("preserve", lambda: recipes.load("preserve").initialize(model, original))
    batches = crops.split(16)
    compare("calibrate", lambda: calibrate.initialize(model, original, batches, steps=size.steps, say=_say))
    compare("distill", lambda: distill(model, original, photos, size, generator))
    costs = {"original": ddf.measure(original, test[:1]), "converted": ddf.measure(model, test[:1])}
    return {
        "machine": machine(),
        "size": asdict(size),
        "photos": {"fit": len(to_fit), "test": len(to_test)},
        "replaced": len(layers["preserve"]),
        "left_alone": [name for name in original.names if isinstance(model.get_submodule(name), nn.Conv2d)],
        "cost": {name: {"params": cost.params, "macs": cost.macs} for name, cost in costs.items()},
        "found": found,
        "layers": layers,
    }


def distill(
    model: VGG16, original: VGG16, photos: list[Image.Image], size: StudySize, generator: torch.Generator
) -> None:
    """Trains all layers on the original's feature maps, with new crops at every step."""
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

    def rate(number: int) -> float:
        cosine = (1 + math.cos(math.pi * number / size.distill_steps)) / 2
        return min(1.0, (number + 1) / (warmup + 1)) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for number in range(size.distill_steps):
        crops = preprocess(random_crops(photos, size.batch_size, size.pixels, generator))
        optimizer.zero_grad()
        loss = objective(crops, None)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]), 1.0)
        optimizer.step()
        schedule.step()
        if number % 10 == 0:
            _say(f"step {number}: {loss.item():.4f}")


def _say(words: str) -> None:
    print(words, flush=True)


# --- the page ---


def page(document: dict[str, Any]) -> Iterator[str]:
    cost, found, photos, size = (document[key] for key in ("cost", "found", "photos", "size"))
    before, after = cost["original"], cost["converted"]
    pixels, replaced = size["pixels"], document["replaced"]
    yield "# A VGG16 trunk, by four recipes: what is left of its feature maps"
    yield ""
    yield from paragraph(
        f"{replaced} of 13 dense 3x3 convolutions replaced, as planned by default: the stem is left alone. Parameters"
        f" {before['params'] / 1e6:.2f} M -> {after['params'] / 1e6:.2f} M, MACs of an image of {pixels}x{pixels}"
        f" {before['macs'] / 1e9:.2f} G -> {after['macs'] / 1e9:.2f} G. No labels are used. {photos['fit']} photos to"
        f" fit on, {photos['test']} others to test on: `calibrate` sees {size['crops']} random crops, and `distill`,"
        f" which goes on from there, {size['distill_steps']} steps of {size['batch_size']} new ones."
    )
    yield "Relative error of what each layer puts out (before ReLU) and of the last map (after it), on the test photos,"
    yield "behind all other new layers: 0 is equal, 1 as far off as zeros."
    yield ""
    names = [name for name in next(iter(found.values()))["test"]["error"] if name not in document["left_alone"]]
    body = [[name, *(f"{each['test']['error'][name]:.2f}" for each in found.values())] for name in names]
    body.append(["last map, on crops that were fitted on", *(f"{e['fit']['error'][LAST]:.2f}" for e in found.values())])
    body.append(["edges: F1 against the original's", *(f"{each['test']['edges_f1']:.2f}" for each in found.values())])
    body.append(["seconds, each after the one before", *(f"{each['seconds']:.0f}" for each in found.values())])
    headings = ["", *(name if name == "random" else f"`{name}`" for name in found)]
    yield from table(headings, body, numbers=True)
    yield f"![Error by layer]({NAME}.png)"
    yield ""
    lost, kept, fitted = (
        found[name][images]["error"][LAST]
        for name, images in (("preserve", "test"), ("distill", "test"), ("distill", "fit"))
    )
    yield from paragraph(
        "What to expect of minutes on a CPU, without labels: this network has no batch norm to catch what `preserve`"
        f" loses, so errors add up and the last map is of no use (error {lost:.1f}). After `calibrate`, with or without"
        f" `distill`, the first layers are nearly the original's, and the last map is off by {kept:.2f} of its size: a"
        " start to train on from, enough for what hangs on early and middle layers (edges, F1"
        f" {found['distill']['test']['edges_f1']:.2f}), and no"
        f" replacement for the original. On crops of photos that were fitted on that error is {fitted:.2f}, so"
        " more photos should help more than more steps (not tried). How much the old weights count in the fit was"
        " chosen with these test photos in view, so the last two columns are a little too good."
    )


def plot(document: dict[str, Any]) -> Any:
    """Draws the error by layer, a line for each recipe."""
    figure = new_figure(10, 5)
    axes = figure.subplots()
    for name, each in document["found"].items():
        errors = {layer: error for layer, error in each["test"]["error"].items() if error > 0}
        label = name if each["seconds"] < 1 else f"{name} ({each['seconds']:.0f} s)"
        axes.plot(list(errors), list(errors.values()), marker="o", ms=5, color=COLORS[name], label=label)
    axes.axhline(1, color="black", lw=1, ls=":", label="a map of zeros")
    axes.set(yscale="log", ylabel="relative error on photos not fitted on", title="VGG16 trunk: error by layer")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="x", rotation=45)
    axes.grid(True, alpha=0.3)
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(exit_code(main))
