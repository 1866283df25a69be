"""Upsampling of disparity on Middlebury's Motorcycle: DDF-Up-Net beside what does without it.

    python benchmarks/fetch_real.py        once
    pip install opencv-contrib-python-headless==5.0.0.93    once, for two of the peers
    python benchmarks/depth_motorcycle.py  half an hour on two idle cores; writes depth_motorcycle.json, .md and .png
    python benchmarks/depth_motorcycle.py --quick
    python benchmarks/depth_motorcycle.py --choose    on the last columns of the left part, where settings were chosen

Networks and parameters of filters learn from the left 60 % of the scene and are tested on the rest, which no choice
looked at. What was measured is kept after every row: the same command goes on where another was stopped; --fresh begins
anew.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from depth_parts.peers import PEERS, Peer, interpolated, opencv
from depth_parts.scene import Part, parts, scene
from recipe_parts.page import RESULTS, figure, machine, paragraph, run, table, write
from torch import Tensor

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.depth import checkpoint
from ddf_convert.depth.inference import upsample
from ddf_convert.depth.lowres import downsample
from ddf_convert.depth.metrics import errors
from ddf_convert.depth.picture import draw
from ddf_convert.depth.trainer import DepthSettings, DepthTrainer
from ddf_convert.models.ddf_upnet import JointUpNet
from ddf_convert.recipes import Recipe, load

NAME = "depth_motorcycle"
FACTORS = (4, 8, 16)
SEEDS = (0, 1, 2)
STEPS = 500
BATCH = 4
LR = 4e-3
CROP = 96
PICTURE_FACTOR = 8
PICTURE = RESULTS.parents[1] / "docs" / "depth_8x.png"
UNTRAINED = "untrained"


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Attributes:
        name: In words.
        upsampler: "ddf" or "conv".
        arguments: Of its class; so chosen that both have as many parameters.
    """

    name: str
    upsampler: checkpoint.Upsampler
    arguments: dict[str, int]

    def build(self, factor: int, seed: int) -> JointUpNet:
        """Untrained."""
        torch.manual_seed(seed)
        return checkpoint.build(self.upsampler, scale_factor=factor, **self.arguments)


_WIDTHS = {"width": 12, "guide_width": 12, "head_width": 12}
NETWORKS = (
    Network("joint convolutions", "conv", {**_WIDTHS, "squeeze": 5}),
    Network("DDF-Up-Net", "ddf", _WIDTHS),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: to see whether it runs")
    parser.add_argument("--choose", action="store_true", help="train and test within the left part, and write nothing")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--factor", type=int, choices=FACTORS, action="append", help="this one; repeatable")
    parser.add_argument("--jobs", type=int, default=2, help="networks trained side by side, on a thread each")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the results are written")
    chosen = parser.parse_args()
    opencv()
    figure(1, 1)  # fail early
    steps, seeds = (5, SEEDS[:1]) if chosen.quick else (chosen.steps, SEEDS)
    factors = tuple(chosen.factor or FACTORS)
    if chosen.choose:
        study(parts(scene(), choosing=True), factors, SEEDS[:1], steps, Kept(None))
        return
    kept = Kept(chosen.results / f"{NAME}{'_quick' if chosen.quick else ''}.jsonl", chosen.fresh)
    torch.set_num_threads(1)  # as in the processes beside this one
    divided = parts(scene())
    train_ahead(factors, seeds, steps, kept, chosen.jobs)
    document = study(divided, factors, seeds, steps, kept)
    lines = list(page(document))
    write(chosen.results, NAME + ("_quick" if chosen.quick else ""), document, lines, plot(document))
    if PICTURE_FACTOR in factors and not chosen.quick:
        write_file(PICTURE, picture(divided, steps, kept))
    print("\n".join(lines))


def study(
    divided: tuple[Part, Part], factors: Sequence[int], seeds: Sequence[int], steps: int, kept: Kept
) -> dict[str, Any]:
    """Everything that is measured: RMSE of each method and seed at each factor, on the part to test on."""
    learned, tested = divided
    rows: dict[str, dict[str, Any]] = {}
    for factor in factors:
        for peer in PEERS:
            found = kept.row(lambda p=peer, f=factor: of_peer(p, learned, tested, f), factor, peer.name)
            rows.setdefault(peer.name, {})[str(factor)] = found
        for network in NETWORKS:
            of_seeds = []
            for seed in seeds:
                key = (factor, network.name, seed, steps)
                measured = kept.row(lambda n=network, f=factor, s=seed: of_network(n, divided, f, s, steps), *key)
                of_seeds.append(measured)
            rows.setdefault(network.name, {})[str(factor)] = together(of_seeds)
    return {
        "machine": machine(),
        "factors": list(factors),
        "seeds": list(seeds),
        "steps": steps,
        "crop": CROP,
        "pixels": {"learned": list(learned.disparity.shape[1:]), "tested": list(tested.disparity.shape[1:])},
        "rows": rows,
        "seconds": kept.seconds,
    }


def train_ahead(factors: Sequence[int], seeds: Sequence[int], steps: int, kept: Kept, jobs: int) -> None:
    """Trains the networks side by side: their maps are so small that a second thread for each would gain nothing."""
    tasks = {
        (factor, network.name, seed, steps): (place, factor, seed, steps)
        for factor in factors
        for place, network in enumerate(NETWORKS)
        for seed in seeds
    }
    missing = {key: task for key, task in tasks.items() if not kept.has(*key)}
    if jobs < 2 or not missing:
        return
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawned, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(_of_network_alone, *task): key for key, task in missing.items()}
        for future in as_completed(futures):
            found = future.result()
            kept.add(found, found["seconds"], *futures[future])


def _of_network_alone(place: int, factor: int, seed: int, steps: int) -> dict[str, Any]:
    return of_network(NETWORKS[place], parts(scene()), factor, seed, steps)


def of_peer(peer: Peer, learned: Part, tested: Part, factor: int) -> dict[str, Any]:
    """Chooses the parameters on one part, and measures on the other."""
    own = learned.whole_cells
    parameters = peer.choose(scaled(own.photo), small(own, factor), own.disparity, factor)
    found = peer.run(scaled(tested.photo), small(tested, factor), factor, **parameters)
    return {"rmse": errors(found, tested.disparity).rmse, "parameters": parameters}


def of_network(network: Network, divided: tuple[Part, Part], factor: int, seed: int, steps: int) -> dict[str, Any]:
    """Trains a network on one part, and measures on the other; also as it was before."""
    model = network.build(factor, seed)
    before = rmse(model, divided[1])
    began = time.monotonic()
    trained = train(model, divided[0], seed, steps)
    return {
        "rmse": rmse(trained, divided[1]),
        UNTRAINED: before,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": time.monotonic() - began,
    }


def train(model: JointUpNet, part: Part, seed: int, steps: int) -> JointUpNet:
    """As the built-in recipe says, but for the number of steps, and a learning rate for so few of them."""
    settings = DepthSettings(crop=CROP, seed=seed, turned=0.5)
    return cast(JointUpNet, DepthTrainer(model, recipe(steps), part, settings).run())


def recipe(steps: int) -> Recipe:
    """The built-in recipe for a single image."""
    changed = load("depth-upsample").changed(steps=steps, batch_size=BATCH, lr=LR, ema_decay=0.995)
    stage = changed.stages[0]
    assert stage.augmentation is not None
    varied = stage.augmentation.model_copy(update={"vflip": 0.5})
    return changed.model_copy(update={"stages": (stage.model_copy(update={"augmentation": varied}),)})


def rmse(model: JointUpNet, part: Part) -> float:
    """Of a network, in pixels of disparity."""
    found, _ = upsample(model, part.photo, small(part, model.scale_factor))
    return errors(found, part.disparity).rmse


def small(part: Part, factor: int) -> Tensor:
    """The small disparity map, (1, h, w): every pixel is one of the large map."""
    return downsample(part.disparity[None], factor, "nearest")[0]


def scaled(photo: Tensor) -> Tensor:
    """From 0 to 1."""
    return photo.float() / 255


def together(of_seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The seeds of one network at one factor."""
    found = [row["rmse"] for row in of_seeds]
    return {
        "rmse": sum(found) / len(found),
        "seeds": found,
        UNTRAINED: [row[UNTRAINED] for row in of_seeds],
        "params": of_seeds[0]["params"],
        "seconds": [row["seconds"] for row in of_seeds],
    }


class Kept:
    """What was measured, in a file, so that a study that was stopped goes on.

    Args:
        file: Its lines are rows; None keeps nothing.
        fresh: Forget them.
    """

    def __init__(self, file: Path | None, fresh: bool = False) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        if file is not None and fresh:
            file.unlink(missing_ok=True)
        if file is not None and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                content = json.loads(line)
                self.rows[content["key"]] = content

    @property
    def seconds(self) -> float:
        """That all of it took."""
        return sum(row["took"] for row in self.rows.values())

    def row(self, measure: Any, *key: object) -> dict[str, Any]:
        """A row, measured if it is not there, and shown."""
        if not self.has(*key):
            began = time.monotonic()
            found = measure()
            self.add(found, time.monotonic() - began, *key)
        found_before: dict[str, Any] = self.rows[" ".join(map(str, key))]["found"]
        return found_before

    def has(self, *key: object) -> bool:
        """Whether a row was measured."""
        return " ".join(map(str, key)) in self.rows

    def add(self, found: dict[str, Any], took: float, *key: object) -> None:
        """Keeps a row, and shows it."""
        name = " ".join(map(str, key))
        self.rows[name] = {"key": name, "took": took, "found": found}
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, "".join(json.dumps(row) + "\n" for row in self.rows.values()))
        print(f"{name}: {found['rmse']:.3f} px ({took:.0f} s)", flush=True)


def page(document: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    factors, sizes = document["factors"], document["pixels"]
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
    yield ""
    networks = {network.name for network in NETWORKS}
    body = []
    for name, row in document["rows"].items():
        found = [row[str(factor)] for factor in factors]
        params = " / ".join(f"{of['params']:,}" for of in found) if name in networks else ""
        body.append([name, *map(_cell, found), params])
        if name in networks:
            before = [of[UNTRAINED] for of in found]
            body.append([f"{name}, untrained", *(f"{sum(of) / len(of):.3f}" for of in before), ""])
    yield from table(["", *(f"{factor}x" for factor in factors), "parameters"], body)
    yield f"![RMSE by factor]({NAME}.png)"
    yield ""
    yield from conclusion(document)
    yield ""


def conclusion(document: dict[str, Any]) -> Iterator[str]:
    """How the networks compare with the best peer."""
    rows = document["rows"]
    for factor in map(str, document["factors"]):
        best = min(PEERS, key=lambda peer: rows[peer.name][factor]["rmse"]).name
        least = rows[best][factor]["rmse"]
        shares = [
            f"{network.name} {100 * (rows[network.name][factor]['rmse'] / least - 1):+.1f} %" for network in NETWORKS
        ]
        chosen = ", ".join(f"{key} {value}" for key, value in rows[best][factor]["parameters"].items())
        yield from paragraph(f"{factor}x: the best peer is {best} ({chosen}); against it {'; '.join(shares)}.")
        yield ""
    yield "One scene, of which one part is learned and another tested: a small study, and no benchmark."


def _cell(found: dict[str, Any]) -> str:
    if "seeds" not in found:
        return f"{found['rmse']:.3f}"
    return f"{found['rmse']:.3f} ({min(found['seeds']):.3f} to {max(found['seeds']):.3f})"


def plot(document: dict[str, Any]) -> Any:
    """RMSE by factor, a line for each method."""
    drawn = figure(7, 4.5)
    axes = drawn.subplots()
    names = {network.name for network in NETWORKS}
    factors = document["factors"]
    places = range(len(factors))
    for name, row in document["rows"].items():
        values = [row[str(factor)]["rmse"] for factor in factors]
        axes.plot(places, values, "o-" if name in names else "o--", label=name, lw=2 if name in names else 1)
        if name in names:
            bounds = [[bound(row[str(factor)]["seeds"]) for factor in factors] for bound in (min, max)]
            axes.fill_between(places, *bounds, alpha=0.2, lw=0)
    axes.set_xticks(places, [f"{factor}x" for factor in factors])
    axes.set(
        ylabel="RMSE of disparity, pixels", ylim=(0, None), title="Motorcycle: the right 40 %, learned on the left"
    )
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9)
    return drawn


def picture(divided: tuple[Part, Part], steps: int, kept: Kept) -> bytes:
    """The part that was tested at 8x: small map, bicubic, the best peer, DDF-Up-Net, and their errors.

    The photo and the truth are Middlebury's, and not for this repository.
    """
    learned, tested = divided
    factor, photo = PICTURE_FACTOR, scaled(tested.photo)
    bilateral = PEERS[-1]
    parameters = kept.row(lambda: of_peer(bilateral, learned, tested, factor), factor, bilateral.name)["parameters"]
    low = small(tested, factor)
    model = train(NETWORKS[-1].build(factor, SEEDS[0]), learned, SEEDS[0], steps)
    maps = [
        (f"input, {low.shape[-1]}x{low.shape[-2]}", low),
        ("bicubic", interpolated(photo, low, factor, "bicubic")),
        (bilateral.name, bilateral.run(photo, low, factor, **parameters)),
        ("DDF-Up-Net", upsample(model, tested.photo, low)[0]),
    ]
    content = io.BytesIO()
    drawn = draw(None, maps, tested.disparity, tested.unit, what="disparity", show_truth=False)
    drawn.savefig(content, format="png", dpi=80, metadata={"Software": None})
    return content.getvalue()


if __name__ == "__main__":
    sys.exit(run(main))
