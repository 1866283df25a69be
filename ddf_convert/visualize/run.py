"""Measures and draws the filters of a model on images: what the command ``visualize`` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddf_convert.errors import DDFError, UsageError, first_line
from ddf_convert.training.diagnostics import memory_explained
from ddf_convert.training.setup import open_trained
from ddf_convert.utils.device import choose
from ddf_convert.utils.figures import require_matplotlib
from ddf_convert.utils.patterns import matching_names, pattern_hint
from ddf_convert.visualize import photos
from ddf_convert.visualize.capture import DDFLayer, filters, find_ddf_layers
from ddf_convert.visualize.layer_filters import LayerFilters
from ddf_convert.visualize.picture import Tap, encoded, picture, spread

KINDS = ("png", "pdf", "svg")


@dataclass(frozen=True)
class VisualizeRequest:
    """Model, images, and the layers and filters to draw.

    Attributes:
        name: A run, a converted folder, or any model that ``ddf_convert.artifacts.source.open_model`` opens.
        images: Files; the first one is drawn, all are measured.
        layers: Names, globs or ``re:`` patterns of the layers to draw; if empty, six of them, evenly spread.
        head: Index of the head of each layer.
        branch: Index of the branch of DDF-Up layers.
        taps: (row, column) of taps to draw large.
        checkpoint: Weights for a model that is not in a folder.
        arguments: Arguments of ``timm.create_model`` for such a model.
        model: ``package.module:callable`` that builds the user's own model before conversion.
        input_size: (C, H, W) of the images; None is the model's.
        plain: Use images as values from 0 to 1, not normalized.
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
class VisualizeResult:
    """The filters of a model's layers, and what the picture needs.

    Attributes:
        name: Of the model.
        images: Files.
        photo: (H, W, 3) from 0 to 1, the first image as the model saw it.
        input_size: (C, H, W) of the images.
        layers: All layers of the model.
        drawn: The layers for the picture.
        request: The request.
        notes: Hints for the user.
    """

    name: str
    images: Sequence[Path]
    photo: Tensor
    input_size: tuple[int, int, int]
    layers: list[LayerFilters]
    drawn: list[LayerFilters]
    request: VisualizeRequest
    notes: list[str]

    def ranked(self) -> list[LayerFilters]:
        """Returns the layers, the most dynamic first."""
        return sorted(self.layers, key=lambda layer: -layer.dynamics.total)

    def picture(self, kind: str = "png") -> bytes:
        """Draws everything and returns the content of a file; raises an ImportError if matplotlib is missing."""
        figure = picture(
            self.layers,
            self.photo,
            self.drawn,
            head=self.request.head,
            branch=self.request.branch,
            taps=self.request.taps,
            heading=f"{self.name}: the filters for {self.images[0].name}",
        )
        return encoded(figure, kind)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything for JSON, the most dynamic layer first."""
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
    """Returns the kind of a picture file; raises a UsageError if it cannot be drawn, before any work is done."""
    kind = file.suffix.lower().removeprefix(".")
    if kind not in KINDS:
        raise UsageError(f"--output {file}: pictures are {', '.join(KINDS)}; give a name that ends in .png")
    require_matplotlib("--output")
    return kind


def run(request: VisualizeRequest) -> VisualizeResult:
    """Runs a model on the images, one by one, and measures its filters.

    Raises:
        UsageError: There is no such model, image, layer, head, branch or tap, or they do not fit each other.
        ArtifactError: The folder is not a whole artifact.
    """
    device = choose(request.device, use="used")
    pictures = [photos.read_photo(file) for file in request.images]
    name, model, notes = _open_model(request)
    layers = find_ddf_layers(model)
    if not layers:
        raise UsageError(f"{name} has no DDF layers: `ddf-convert convert {name} -o DIR` gives a model that has")
    selected = _select(layers, request.layers)
    _check_indices(selected, request)
    settings = photos.settings_of(model, request.input_size, request.plain)
    batch = photos.as_batch(pictures, settings)
    measured = _concatenated([_filters_of(model.to(device), image, name) for image in batch.split(1)])
    names = {layer.name for layer in selected}
    drawn = [layer for layer in measured if layer.name in names]
    if not drawn:
        raise UsageError(f"--layer: {name} calls none of {', '.join(sorted(names))} in a forward pass")
    return VisualizeResult(
        name=name,
        images=request.images,
        photo=photos.shown(batch[0], settings),
        input_size=settings.input_size,
        layers=measured,
        drawn=drawn if request.layers else spread(drawn),
        request=request,
        notes=[*notes, *_notes(measured)],
    )


def _open_model(request: VisualizeRequest) -> tuple[str, nn.Module, list[str]]:
    """Returns the name to show, the model, and notes on its weights."""
    torch.manual_seed(0)  # random weights are the same every time
    name, model, folder = open_trained(request.name, request.model, request.checkpoint, arguments=request.arguments)
    random = folder is None and request.checkpoint is None and ":" not in request.name
    notes = [f"the weights of {request.name} are random: --checkpoint FILE gives it better ones"] if random else []
    return name, model, notes


def _select(layers: Sequence[DDFLayer], patterns: Sequence[str]) -> list[DDFLayer]:
    names = [layer.name for layer in layers]
    chosen: set[str] = set()
    for pattern in patterns:
        selected = matching_names("--layer", pattern, names)
        if not selected:
            hint = pattern_hint(pattern, names) or f"; there is {names[0]}, for one"
            raise UsageError(f"--layer: {pattern!r} matches no DDF layer{hint}")
        chosen |= selected
    return [layer for layer in layers if not patterns or layer.name in chosen]


def _check_indices(layers: Sequence[DDFLayer], request: VisualizeRequest) -> None:
    """Raises a UsageError unless every layer that is drawn has the head, the branch and the taps."""
    for each in layers:
        heads, size = each.layer.heads, each.layer.kernel_size[0]
        if request.head >= heads:
            counted = f"{heads} heads, counted from 0" if heads > 1 else "1 head, number 0"
            raise UsageError(f"--head {request.head}: {each.name} has {counted}; --layer chooses others")
        branches = each.scale_factor**2
        if branches > 1 and request.branch >= branches:
            raise UsageError(f"--branch {request.branch}: {each.name} has {branches} branches, counted from 0")
        for row, column in request.taps:
            if max(row, column) >= size:
                raise UsageError(
                    f"--tap {row},{column}: the filters of {each.name} are {size}x{size}, with taps from 0,0 to"
                    f" {size - 1},{size - 1}; --layer chooses others"
                )


def _filters_of(model: nn.Module, image: Tensor, name: str) -> list[LayerFilters]:
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


def _concatenated(runs: Sequence[list[LayerFilters]]) -> list[LayerFilters]:
    """Joins the filters of several images to those of a batch."""
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


def _notes(layers: Sequence[LayerFilters]) -> list[str]:
    """Explains numbers that are 0."""
    notes = []
    for untouched, reason in ((True, ": nothing dynamic was learned yet"), (False, "")):
        count = sum(layer.untouched == untouched and (untouched or layer.dynamics.pixels == 0) for layer in layers)
        if count:
            where = "all" if count == len(layers) else f"{count} of {len(layers)}"
            notes.append(f"in {where} layers the spatial filters are the same everywhere{reason}")
    return notes
