"""From the command's options to numbers and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.layers import DDFUp2d
from ddf_convert.training.diagnostics import memory_explained
from ddf_convert.training.setup import open_trained
from ddf_convert.utils.device import choose
from ddf_convert.utils.figures import require_matplotlib
from ddf_convert.utils.patterns import matching_names, pattern_hint
from ddf_convert.visualize import photos
from ddf_convert.visualize.capture import LayerFilters, Place, ddf_layers, filters
from ddf_convert.visualize.picture import Tap, encoded, picture, spread

KINDS = ("png", "pdf", "svg")


@dataclass(frozen=True)
class Request:
    """What to look at.

    Attributes:
        name: A run, a converted folder, or any model that ``ddf_convert.artifacts.source.open_model`` opens.
        images: Files; the first one is drawn, the numbers are of all.
        layers: Names, globs or ``re:`` patterns of the layers to draw; empty is some, evenly spread.
        head: Which of each layer's.
        branch: Of DDF-Up layers, whose taps are drawn.
        taps: To draw large.
        checkpoint: Weights of a model that is not in a folder.
        arguments: Of ``timm.create_model``, for such a model.
        model: ``package.module:callable`` that builds the user's own model before conversion.
        input_size: (C, H, W) of the images; None is the model's.
        plain: Images as values from 0 to 1.
        device: "cpu", "cuda" or "cuda:N"; None is the GPU if there is one.
    """

    name: str
    images: Sequence[Path]
    layers: Sequence[str] = ()
    head: int = 0
    branch: int = 0
    taps: Sequence[Tap] = ()
    checkpoint: Path | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    input_size: tuple[int, int, int] | None = None
    plain: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Seen:
    """What was found.

    Attributes:
        name: Of the model.
        images: Files.
        photo: (H, W, 3) from 0 to 1, the first image as the model was shown it.
        input_size: (C, H, W) of the images.
        layers: All of the model.
        drawn: Those for the picture.
        request: What was asked.
        notes: What the user should know.
    """

    name: str
    images: Sequence[Path]
    photo: Tensor
    input_size: tuple[int, int, int]
    layers: list[LayerFilters]
    drawn: list[LayerFilters]
    request: Request
    notes: list[str]

    def ranked(self) -> list[LayerFilters]:
        """The layers, the most dynamic first."""
        return sorted(self.layers, key=lambda layer: -layer.dynamics.total)

    def picture(self, kind: str = "png") -> bytes:
        """Everything as the content of a file.

        Raises:
            ImportError: matplotlib is missing.
        """
        heading = f"{self.name}: the filters for {self.images[0].name}"
        request = self.request
        figure = picture(
            self.layers,
            self.photo,
            self.drawn,
            head=request.head,
            branch=request.branch,
            taps=request.taps,
            heading=heading,
        )
        return encoded(figure, kind)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, the most dynamic layer first."""
        drawn = {id(layer) for layer in self.drawn}
        return {
            "model": self.name,
            "images": [str(file) for file in self.images],
            "input_size": list(self.input_size),
            "layers": [
                {
                    "name": layer.name,
                    "call": layer.call,
                    "kind": layer.kind,
                    "kernel_size": layer.kernel_size,
                    "channels": layer.channels,
                    "heads": layer.heads,
                    "combine": layer.combine,
                    "scale_factor": layer.scale_factor,
                    "size": list(layer.size),
                    "dynamic": layer.dynamics.to_dict(),
                    "untouched": layer.untouched,
                    "drawn": id(layer) in drawn,
                }
                for layer in self.ranked()
            ],
            "notes": self.notes,
        }


def check_output(file: Path) -> str:
    """Fails early where nothing could be drawn.

    Returns:
        The kind of file, by its suffix.

    Raises:
        UsageError: matplotlib is missing, or no such kind is drawn.
    """
    kind = file.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UsageError(f"--output {file}: pictures are {', '.join(KINDS)}; give a name that ends in .png")
    require_matplotlib("--output")
    return kind


def look(request: Request) -> Seen:
    """Runs a model on the images, one by one, and measures its filters.

    Raises:
        UsageError: There is no such model, image, layer, head, branch or tap, or they do not fit each other.
        ArtifactError: The folder is not a whole artifact.
    """
    device = choose(request.device, use="used")
    pictures = [photos.read_photo(file) for file in request.images]
    name, model, notes = _opened(request)
    places = ddf_layers(model)
    if not places:
        raise UsageError(f"{name} has no DDF layers: `ddf-convert convert {name} -o DIR` gives a model that has")
    wanted = _select(places, request.layers)
    _check(wanted, request)
    settings = photos.settings_of(model, request.input_size, request.plain)
    batch = photos.as_batch(pictures, settings)
    found = _joined([_run(model.to(device), image, name) for image in batch.split(1)])
    names = {place.name for place in wanted}
    drawn = [layer for layer in found if layer.name in names]
    if not drawn:
        raise UsageError(f"--layer: {name} calls none of {', '.join(sorted(names))} in a forward pass")
    return Seen(
        name=name,
        images=request.images,
        photo=photos.shown(batch[0], settings),
        input_size=settings.input_size,
        layers=found,
        drawn=drawn if request.layers else spread(drawn),
        request=request,
        notes=[*notes, *_remarks(found)],
    )


def _opened(request: Request) -> tuple[str, nn.Module, list[str]]:
    """The name to show, the model in evaluation mode, and what there is to say of its weights."""
    torch.manual_seed(0)  # random weights are the same every time
    name, model, folder = open_trained(request.name, request.model, request.checkpoint, arguments=request.arguments)
    random = folder is None and request.checkpoint is None and ":" not in request.name
    notes = [f"the weights of {request.name} are random: --checkpoint FILE gives it better ones"] if random else []
    return name, model, notes


def _select(places: Sequence[Place], patterns: Sequence[str]) -> list[Place]:
    names = [place.name for place in places]
    chosen: set[str] = set()
    for pattern in patterns:
        selected = matching_names("--layer", pattern, names)
        if not selected:
            hint = pattern_hint(pattern, names) or f"; there is {names[0]}, for one"
            raise UsageError(f"--layer: {pattern!r} matches no DDF layer{hint}")
        chosen |= selected
    return [place for place in places if not patterns or place.name in chosen]


def _check(places: Sequence[Place], request: Request) -> None:
    """Whether every layer that is drawn has the head, the branch and the taps."""
    for place in places:
        heads, size = place.layer.heads, place.layer.kernel_size[0]
        if request.head >= heads:
            counted = f"{heads} heads, counted from 0" if heads > 1 else "1 head, number 0"
            raise UsageError(f"--head {request.head}: {place.name} has {counted}; --layer chooses others")
        branches = place.layer.scale_factor**2 if isinstance(place.layer, DDFUp2d) else 0
        if branches and request.branch >= branches:
            raise UsageError(f"--branch {request.branch}: {place.name} has {branches} branches, counted from 0")
        for row, column in request.taps:
            if max(row, column) >= size:
                raise UsageError(
                    f"--tap {row},{column}: the filters of {place.name} are {size}x{size}, with taps from 0,0 to"
                    f" {size - 1},{size - 1}; --layer chooses others"
                )


def _run(model: nn.Module, image: Tensor, name: str) -> list[LayerFilters]:
    try:
        with memory_explained(1):
            return filters(model, image)
    except DDFError:
        raise
    except Exception as error:
        size = " x ".join(map(str, image.shape[1:]))
        raise UsageError(
            f"{name} does not take images of {size} ({first_line(error)}); give --input-size C H W"
        ) from error


def _joined(runs: Sequence[list[LayerFilters]]) -> list[LayerFilters]:
    """The filters of several images as those of a batch."""
    if any([layer.title for layer in run] != [layer.title for layer in runs[0]] for run in runs):
        raise UsageError("the model does not call the same DDF layers for every image: look at them one by one")
    return [
        replace(
            layers[0],
            spatial=torch.cat([layer.spatial for layer in layers]),
            channel=torch.cat([layer.channel for layer in layers]),
        )
        for layers in zip(*runs, strict=True)
    ]


def _remarks(layers: Sequence[LayerFilters]) -> list[str]:
    """What the numbers mean, where they are 0."""
    untouched = [layer for layer in layers if layer.untouched]
    same = [layer for layer in layers if layer.dynamics.pixels == 0 and not layer.untouched]
    notes = []
    for found, words in (
        (untouched, "the spatial filters are the same everywhere: nothing dynamic was learned yet"),
        (same, "the spatial filters are the same everywhere"),
    ):
        if found:
            where = "all" if len(found) == len(layers) else f"{len(found)} of {len(layers)}"
            notes.append(f"in {where} layers {words}")
    return notes
