"""Upsampling of disparity on Middlebury's Motorcycle: DDF-Up-Net beside interpolation, filters and convolutions.

    python benchmarks/fetch_real.py        once
    pip install opencv-contrib-python-headless==5.0.0.93    once, for two of the baselines
    python benchmarks/depth_motorcycle.py  half an hour on two idle cores; writes depth_motorcycle.json, .md and .png
    python benchmarks/depth_motorcycle.py --quick
    python benchmarks/depth_motorcycle.py --choose    on the last columns of the left part, where settings were chosen

Networks and parameters of filters learn from the left 60 % of the scene and are tested on the rest, which no choice
looked at. Every row is written when it is measured, and a study that was stopped goes on; --fresh begins again.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from common.markdown import paragraph, table
from common.pool import LostError, call_each
from common.results import RESULTS, ResumableLines, exit_code, machine, png, run_study, study_parser
from common.sources import MOTORCYCLE
from torch import Tensor

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.depth import checkpoint
from ddf_convert.depth.inference import upsample
from ddf_convert.depth.lowres import downsample
from ddf_convert.depth.maps import Unit, read_photo
from ddf_convert.depth.metrics import errors
from ddf_convert.depth.picture import draw
from ddf_convert.depth.trainer import DepthSettings, DepthTrainer
from ddf_convert.errors import UsageError
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.models.depth_holes import fill_holes
from ddf_convert.recipes import Recipe, load
from ddf_convert.utils.figures import new_figure

NAME = "depth_motorcycle"
OPENCV = "opencv-contrib-python-headless==5.0.0.93"
FACTORS = (4, 8, 16)
SEEDS = (0, 1, 2)
STEPS = 500
BATCH = 4
LR = 4e-3
CROP = 96
CELL = 16  # pixels of the photo for one of the small map, at the largest factor
LEFT = 0.6  # of the width
STRIP = 96  # columns at the left part's end, on which settings of the networks were chosen
PICTURE_FACTOR = 8
PICTURE = RESULTS.parents[1] / "docs" / "depth_8x.png"
UNTRAINED = "untrained"
HOUR = 3600.0
PIXELS = Unit("px")


# --- the scene ---


@dataclass(frozen=True)
class ScenePart:
    """Some columns of the scene; also a dataset of one pair.

    Attributes:
        photo: (3, H, W) uint8.
        disparity: (1, H, W) float32, in pixels; holes 0.
    """

    photo: Tensor
    disparity: Tensor
    unit: Unit = PIXELS
    names: tuple[str, ...] = ("motorcycle",)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.photo, self.disparity

    def columns(self, first: int, last: int) -> ScenePart:
        """Returns the columns from the first to before the last."""
        return ScenePart(self.photo[..., first:last].contiguous(), self.disparity[..., first:last].contiguous())

    @property
    def whole_cells(self) -> ScenePart:
        """Without the last rows and the first columns that are no whole cell."""
        height, width = (length // CELL * CELL for length in self.disparity.shape[-2:])
        return ScenePart(self.photo[:, :height, -width:].contiguous(), self.disparity[:, :height, -width:].contiguous())

    @property
    def guide(self) -> Tensor:
        """The photo from 0 to 1."""
        return self.photo.float() / 255

    def small(self, factor: int) -> Tensor:
        """Returns the small disparity map, (1, h, w), which takes one pixel of each cell."""
        return downsample(self.disparity[None], factor, "nearest")[0]


def read_scene() -> ScenePart:
    photo = read_photo(MOTORCYCLE.get("motorcycle_left.png"))
    with np.load(MOTORCYCLE.get("motorcycle_disp.npz"), allow_pickle=False) as file:
        disparity = torch.from_numpy(file["arr_0"].astype(np.float32))[None]
    return ScenePart(photo, torch.where(torch.isfinite(disparity), disparity, 0.0))


def split(scene: ScenePart, choosing: bool = False) -> tuple[ScenePart, ScenePart]:
    """Returns the part to learn from and the part to test on; ``choosing`` divides the left part alone."""
    width = scene.disparity.shape[-1]
    left = int(width * LEFT)
    if choosing:
        return scene.columns(0, left - STRIP), scene.columns(left - STRIP, left).whole_cells
    return scene.columns(0, left), scene.columns(left, width).whole_cells


# --- the methods ---


@dataclass(frozen=True)
class Baseline:
    """A way to upsample that learns nothing.

    Attributes:
        name: In the table.
        run: Returns (1, s*h, s*w) for a photo (3, s*h, s*w) from 0 to 1, a small depth map (1, h, w), the factor s and
            parameters.
        grid: Values to try for each parameter.
    """

    name: str
    run: Callable[..., Tensor]
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def choose(self, part: ScenePart, factor: int) -> dict[str, Any]:
        """Returns the parameters with the least RMSE."""
        photo, small = part.guide, part.small(factor)
        choices = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return min(choices, key=lambda each: errors(self.run(photo, small, factor, **each), part.disparity).rmse)


def interpolate(photo: Tensor, small: Tensor, factor: int, mode: str) -> Tensor:
    """Interpolates between pixels that were taken at ``(factor - 1) // 2`` of each cell.

    Ordinary interpolation takes them for the cells' middles, which moves every map by half a pixel.
    """
    filled, _ = fill_holes(small[None])
    lines = []
    for length in small.shape[-2:]:
        places = (torch.arange(length * factor) - (factor - 1) // 2) / factor  # in pixels of the small map
        lines.append((2 * places + 1) / length - 1)
    rows, columns = torch.meshgrid(*lines, indexing="ij")
    grid = torch.stack((columns, rows), -1)[None]
    return F.grid_sample(filled, grid, mode=mode, padding_mode="border", align_corners=False)[0]


def guided_filter(photo: Tensor, small: Tensor, factor: int, radius: float, eps: float) -> Tensor:
    """Filters the bilinear map with OpenCV's guided filter; the radius is in pixels of the small map.

    Source: He, Sun, Tang, "Guided Image Filtering", ECCV 2010.
    """
    large = interpolate(photo, small, factor, "bilinear")[0].numpy()
    found = opencv().ximgproc.guidedFilter(_channels_last(photo), large, max(1, round(radius * factor)), eps)
    return torch.from_numpy(found)[None]


def joint_bilateral(photo: Tensor, small: Tensor, factor: int, space: float, color: float, of: str) -> Tensor:
    """Filters with OpenCV's joint bilateral filter; ``space`` is in pixels of the small map, ``color`` from 0 to 1.

    It filters the bilinear map (``of="interpolated"``) or the measurements alone (``of="measurements"``), which is
    joint bilateral upsampling; interpolation remains where no measurement is near enough in color.

    Source: Kopf et al., "Joint Bilateral Upsampling", SIGGRAPH 2007.
    """
    large = interpolate(photo, small, factor, "bilinear")[0]
    joint = _channels_last(photo)

    def filtered(image: Tensor) -> Tensor:
        three = np.ascontiguousarray(np.repeat(image.numpy()[..., None], 3, 2))  # as many channels as the photo
        found = opencv().ximgproc.jointBilateralFilter(joint, three, -1, color, space * factor)
        return torch.from_numpy(np.ascontiguousarray(found[..., 0]))

    if of == "interpolated":
        return filtered(large)[None]
    known, values = torch.zeros_like(large), torch.zeros_like(large)
    center = (factor - 1) // 2
    known[center::factor, center::factor] = (small[0] > 0).float()
    values[center::factor, center::factor] = small[0]
    weights, least = filtered(known), 1e-6
    return torch.where(weights > least, filtered(values) / weights.clamp_min(least), large)[None]


def opencv() -> Any:
    """Returns the module ``cv2``; a UsageError if it or its extra modules are missing."""
    try:
        import cv2
    except ImportError as error:
        raise UsageError(f"the baselines need OpenCV: pip install '{OPENCV}'") from error
    if not hasattr(cv2, "ximgproc"):
        raise UsageError(f"OpenCV is there without its extra modules: pip install '{OPENCV}'")
    return cv2


def _channels_last(photo: Tensor) -> Any:
    return np.ascontiguousarray(photo.permute(1, 2, 0).numpy())


_RADII, _EPS = (0.125, 0.25, 0.5, 1.0, 2.0), (1e-4, 1e-3, 1e-2, 1e-1)
_SPACES, _COLORS = (0.25, 0.5, 1.0), (0.02, 0.04, 0.08, 0.16)
BILATERAL = Baseline(
    "joint bilateral",
    joint_bilateral,
    {"space": _SPACES, "color": _COLORS, "of": ("interpolated", "measurements")},
)
BASELINES = (
    Baseline("nearest", interpolate, {"mode": ("nearest",)}),
    Baseline("bilinear", interpolate, {"mode": ("bilinear",)}),
    Baseline("bicubic", interpolate, {"mode": ("bicubic",)}),
    Baseline("guided filter", guided_filter, {"radius": _RADII, "eps": _EPS}),
    BILATERAL,
)


@dataclass(frozen=True)
class Network:
    """A network of the table; the arguments of both give about as many parameters."""

    name: str
    upsampler: checkpoint.Upsampler
    arguments: dict[str, int]

    def build(self, factor: int, seed: int) -> JointUpNet:
        torch.manual_seed(seed)
        return checkpoint.build(self.upsampler, scale_factor=factor, **self.arguments)


_WIDTHS = {"width": 12, "guide_width": 12, "head_width": 12}
DDF_UP_NET = Network("DDF-Up-Net", "ddf", _WIDTHS)
NETWORKS = (Network("joint convolutions", "conv", {**_WIDTHS, "squeeze": 5}), DDF_UP_NET)


# --- what is measured ---


def main() -> None:
    parser = study_parser(__doc__, "one seed, few steps: to see whether it runs")
    parser.add_argument("--choose", action="store_true", help="train and test within the left part, and write nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--factor", type=int, choices=FACTORS, action="append", help="this one; repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="networks trained side by side, on a thread each")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    options = parser.parse_args()
    steps, seeds = (5, SEEDS[:1]) if options.quick else (options.steps, SEEDS)
    factors = tuple(options.factor or FACTORS)
    if options.page_only:
        run_study(NAME, options, dict, page, plot)
        return
    opencv()
    parts = split(read_scene(), options.choose)
    if options.choose:
        measure(parts, factors, SEEDS[:1], steps, MeasuredRows(None))
        return
    name = f"{NAME}_quick" if options.quick else NAME
    file = options.results / f"{name}.jsonl"
    if options.fresh:
        file.unlink(missing_ok=True)
    rows = MeasuredRows(file)
    torch.set_num_threads(1)  # as in the processes beside this one
    train_in_parallel(factors, seeds, steps, rows, options.jobs)
    run_study(name, options, lambda: measure(parts, factors, seeds, steps, rows), page, plot)
    if PICTURE_FACTOR in factors and not options.quick:
        write_file(PICTURE, picture(parts, steps, rows))


class MeasuredRows(ResumableLines):
    """Lines with a row's key, the row (``found``) and the seconds that it took."""

    def __init__(self, file: Path | None) -> None:
        super().__init__(file, lambda line: line["key"])

    @property
    def seconds(self) -> float:
        """Seconds that all rows took."""
        return sum(line["took"] for line in self.lines.values())

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return _line_key(key) in self.lines

    def get(self, key: tuple[object, ...], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a row, which is measured if it is not there."""
        if key not in self:
            start = time.monotonic()
            row = measure()
            self.put(key, row, time.monotonic() - start)
        return self.lines[_line_key(key)]["found"]

    def put(self, key: tuple[object, ...], row: dict[str, Any], seconds: float) -> None:
        """Keeps a row and prints it."""
        self.add({"key": _line_key(key), "took": seconds, "found": row})
        print(f"{_line_key(key)}: {row['rmse']:.3f} px ({seconds:.0f} s)", flush=True)


def _line_key(key: tuple[object, ...]) -> str:
    return " ".join(map(str, key))


def measure(
    parts: tuple[ScenePart, ScenePart], factors: Sequence[int], seeds: Sequence[int], steps: int, measured: MeasuredRows
) -> dict[str, Any]:
    """Returns the RMSE of each method and seed at each factor, on the part to test on."""
    learned, tested = parts
    rows: dict[str, dict[str, Any]] = {}
    for factor in factors:
        for baseline in BASELINES:
            rows.setdefault(baseline.name, {})[str(factor)] = baseline_row(baseline, parts, factor, measured)
        for network in NETWORKS:
            of_seeds = [
                measured.get(
                    (factor, network.name, seed, steps),
                    lambda n=network, f=factor, s=seed: network_row(n, parts, f, s, steps),
                )
                for seed in seeds
            ]
            rmses = [row["rmse"] for row in of_seeds]
            rows.setdefault(network.name, {})[str(factor)] = {
                "rmse": sum(rmses) / len(rmses),
                "seeds": rmses,
                UNTRAINED: [row[UNTRAINED] for row in of_seeds],
                "params": of_seeds[0]["params"],
                "seconds": [row["seconds"] for row in of_seeds],
            }
    return {
        "machine": machine(),
        "factors": list(factors),
        "seeds": list(seeds),
        "steps": steps,
        "crop": CROP,
        "pixels": {"learned": list(learned.disparity.shape[1:]), "tested": list(tested.disparity.shape[1:])},
        "rows": rows,
        "seconds": measured.seconds,
    }


def train_in_parallel(
    factors: Sequence[int], seeds: Sequence[int], steps: int, measured: MeasuredRows, jobs: int
) -> None:
    """Trains the missing networks, a process each: their maps are too small to gain from a second thread."""
    tasks = [
        (factor, network, seed, steps)
        for factor, network, seed in itertools.product(factors, NETWORKS, seeds)
        if (factor, network.name, seed, steps) not in measured
    ]
    if jobs < 2:
        return
    for (factor, network, seed, _), row in call_each(_train_task, tasks, jobs, HOUR):
        if isinstance(row, LostError):
            raise row
        measured.put((factor, network.name, seed, steps), row, row["seconds"])


def _train_task(task: tuple[int, Network, int, int]) -> dict[str, Any]:
    factor, network, seed, steps = task
    return network_row(network, split(read_scene()), factor, seed, steps)


def baseline_row(
    baseline: Baseline, parts: tuple[ScenePart, ScenePart], factor: int, measured: MeasuredRows
) -> dict[str, Any]:
    """Chooses the parameters on one part, and measures on the other."""

    def measure() -> dict[str, Any]:
        learned, tested = parts
        parameters = baseline.choose(learned.whole_cells, factor)
        found = baseline.run(tested.guide, tested.small(factor), factor, **parameters)
        return {"rmse": errors(found, tested.disparity).rmse, "parameters": parameters}

    return measured.get((factor, baseline.name), measure)


def network_row(
    network: Network, parts: tuple[ScenePart, ScenePart], factor: int, seed: int, steps: int
) -> dict[str, Any]:
    """Trains a network on one part, and measures on the other, before and after."""
    model = network.build(factor, seed)
    before = rmse(model, parts[1])
    start = time.monotonic()
    trained = train(model, parts[0], seed, steps)
    return {
        "rmse": rmse(trained, parts[1]),
        UNTRAINED: before,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.monotonic() - start,
    }


def train(model: JointUpNet, part: ScenePart, seed: int, steps: int) -> JointUpNet:
    settings = DepthSettings(crop=CROP, seed=seed, turned=0.5)
    return cast(JointUpNet, DepthTrainer(model, recipe(steps), part, settings).run())


def recipe(steps: int) -> Recipe:
    """Returns the built-in recipe for a single image and few steps."""
    changed = load("depth-upsample").changed(steps=steps, batch_size=BATCH, lr=LR, ema_decay=0.995)
    stage = changed.stages[0]
    assert stage.augmentation is not None
    varied = stage.augmentation.model_copy(update={"vflip": 0.5})
    return changed.model_copy(update={"stages": (stage.model_copy(update={"augmentation": varied}),)})


def rmse(model: JointUpNet, part: ScenePart) -> float:
    """Returns a network's RMSE in pixels of disparity."""
    found, _ = upsample(model, part.photo, part.small(model.scale_factor))
    return errors(found, part.disparity).rmse


# --- the page ---


def page(document: dict[str, Any]) -> Iterator[str]:
    factors, sizes, rows = document["factors"], document["pixels"], document["rows"]
    seeds = ", ".join(map(str, document["seeds"]))
    yield "# Disparity of Middlebury's Motorcycle, upsampled"
    yield ""
    yield from paragraph(
        "RMSE of disparity, in pixels of the photo (741 x 500), over the pixels where the truth is known. The left 60 %"
        f" ({sizes['learned'][1]} columns) are learned from; the last {sizes['tested'][1]} columns, which no choice"
        " looked at, are tested. The small map takes one pixel of each cell. Filters: OpenCV's, with the parameters of"
        f" a grid that are best on the left part. Networks: {document['steps']} steps of {BATCH} crops of"
        f" {document['crop']} x {document['crop']} of the left part; mean of seeds {seeds} (least to most)."
    )
    networks = {network.name for network in NETWORKS}
    body = []
    for name, row in rows.items():
        found = [row[str(factor)] for factor in factors]
        params = " / ".join(f"{of['params']:,}" for of in found) if name in networks else ""
        body.append([name, *map(_cell, found), params])
        if name in networks:
            before = [of[UNTRAINED] for of in found]
            body.append([f"{name}, untrained", *(f"{sum(of) / len(of):.3f}" for of in before), ""])
    yield from table(["", *(f"{factor}x" for factor in factors), "parameters"], body, numbers=True)
    yield f"![RMSE by factor]({NAME}.png)"
    yield ""
    for factor in map(str, factors):
        best = min(BASELINES, key=lambda baseline: rows[baseline.name][factor]["rmse"]).name
        least = rows[best][factor]["rmse"]
        shares = [
            f"{network.name} {100 * (rows[network.name][factor]['rmse'] / least - 1):+.1f} %" for network in NETWORKS
        ]
        chosen = ", ".join(f"{key} {value}" for key, value in rows[best][factor]["parameters"].items())
        yield from paragraph(f"{factor}x: the best peer is {best} ({chosen}); against it {'; '.join(shares)}.")
    yield "One scene, of which one part is learned and another tested: a small study, and no benchmark."
    yield ""


def _cell(found: dict[str, Any]) -> str:
    if "seeds" not in found:
        return f"{found['rmse']:.3f}"
    return f"{found['rmse']:.3f} ({min(found['seeds']):.3f} to {max(found['seeds']):.3f})"


def plot(document: dict[str, Any]) -> Any:
    """Draws the RMSE by factor, a line for each method."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    networks = {network.name for network in NETWORKS}
    factors = document["factors"]
    places = range(len(factors))
    for name, row in document["rows"].items():
        values = [row[str(factor)]["rmse"] for factor in factors]
        style, width = ("o-", 2) if name in networks else ("o--", 1)
        axes.plot(places, values, style, label=name, lw=width)
        if name in networks:
            bounds = [[bound(row[str(factor)]["seeds"]) for factor in factors] for bound in (min, max)]
            axes.fill_between(places, *bounds, alpha=0.2, lw=0)
    axes.set_xticks(places, [f"{factor}x" for factor in factors])
    axes.set(
        ylabel="RMSE of disparity, pixels", ylim=(0, None), title="Motorcycle: the right 40 %, learned on the left"
    )
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def picture(parts: tuple[ScenePart, ScenePart], steps: int, measured: MeasuredRows) -> bytes:
    """Draws the tested part at 8x: small map, bicubic, the best baseline, DDF-Up-Net, and their errors.

    The photo and the truth are Middlebury's, and not for this repository.
    """
    learned, tested = parts
    factor, photo, low = PICTURE_FACTOR, tested.guide, tested.small(PICTURE_FACTOR)
    parameters = baseline_row(BILATERAL, parts, factor, measured)["parameters"]
    model = train(DDF_UP_NET.build(factor, SEEDS[0]), learned, SEEDS[0], steps)
    maps = [
        (f"input, {low.shape[-1]}x{low.shape[-2]}", low),
        ("bicubic", interpolate(photo, low, factor, "bicubic")),
        (BILATERAL.name, BILATERAL.run(photo, low, factor, **parameters)),
        (DDF_UP_NET.name, upsample(model, tested.photo, low)[0]),
    ]
    return png(draw(None, maps, tested.disparity, tested.unit, what="disparity", show_truth=False), dpi=80)


if __name__ == "__main__":
    sys.exit(exit_code(main))
