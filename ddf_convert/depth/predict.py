"""Upsamples one small depth map with a photo, from files to the content of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddf_convert.depth import checkpoint
from ddf_convert.depth.inference import interpolate, upsample
from ddf_convert.depth.maps import Unit, encode_depth, read_depth, read_photo, unit_of
from ddf_convert.depth.metrics import errors
from ddf_convert.depth.picture import draw
from ddf_convert.errors import UsageError
from ddf_convert.utils.device import choose
from ddf_convert.utils.figures import encode_figure
from ddf_convert.utils.images import exif_orientation_note

_DPI = 130
_NAMES = {"ddf": "DDF-Up-Net", "conv": "joint convolutions"}


@dataclass(frozen=True)
class PredictRequest:
    """What to upsample."""

    photo: Path
    depth: Path  # the small depth map
    checkpoint: Path  # folder of a trained network
    output: Path  # its suffix gives the format
    factor: int | None = None  # that the user expects; None: the network's
    truth: Path | None = None  # the true large depth map
    unit: str | None = None  # of the depth files' numbers; None: millimetres in PNG, else metres
    allow_8bit: bool = False  # take depth in PNG of 8 bits
    device: str | None = None  # cpu, cuda or cuda:N; None: the GPU if there is one


@dataclass(frozen=True)
class DepthMapSummary:
    """A depth map as a row of a table."""

    name: str
    width: int
    height: int
    range: tuple[float, float]  # smallest and largest measurement
    rmse: float | None = None  # against the truth, in the unit of the numbers; None if not measured


@dataclass(frozen=True)
class Upsampled:
    """The result for one photo.

    Attributes:
        photo: (3, H, W) uint8.
        maps: Small depth map, bicubic interpolation and the network's output, by name.
        truth: (1, H, W), or None.
        rows: A summary of each map.
        unit: Unit of the numbers in the maps.
        written: Unit of the numbers in the file.
        factor: The network's factor.
        content: Content of the file to write.
        notes: Notes for the user.
    """

    photo: Tensor
    maps: dict[str, Tensor]
    truth: Tensor | None
    rows: list[DepthMapSummary]
    unit: Unit
    written: Unit
    factor: int
    content: bytes
    notes: list[str]

    @property
    def measured(self) -> bool:
        """Whether a truth was given."""
        return self.truth is not None

    def picture(self) -> bytes:
        """Returns everything side by side, as PNG."""
        figure = draw(self.photo, list(self.maps.items()), self.truth, self.unit)
        return encode_figure(figure, dpi=_DPI, metadata={"Software": None})

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as JSON; errors are in ``rmse_unit``."""
        return {
            "factor": self.factor,
            "unit": self.written.name,
            "rmse_unit": self.unit.shown if self.measured else None,
            "maps": [
                {
                    "name": row.name,
                    "width": row.width,
                    "height": row.height,
                    "range": list(row.range),
                    "rmse": None if row.rmse is None else self.unit.show(row.rmse),
                }
                for row in self.rows
            ],
            "notes": self.notes,
        }


def upsample_files(request: PredictRequest) -> Upsampled:
    """Upsamples a depth map, and writes nothing."""
    device = choose(request.device, use="used")
    manifest = checkpoint.read_manifest(request.checkpoint)
    factor = manifest.scale_factor
    if request.factor is not None and request.factor != factor:
        raise UsageError(
            f"--factor {request.factor}: {request.checkpoint} upsamples by {factor}; give --factor {factor}, or"
            " another checkpoint"
        )
    photo, depth = read_photo(request.photo), read_depth(request.depth, request.allow_8bit)
    unit = unit_of(request.depth, request.unit)
    truth = None if request.truth is None else _read_truth(request, photo, unit)
    model, _ = checkpoint.load(request.checkpoint)
    try:
        found, padded = upsample(model.to(device), photo, depth)
    except UsageError as error:  # the sizes do not fit
        raise UsageError(f"{error}{exif_orientation_note(request.photo)}") from error
    bicubic = interpolate(depth, factor, photo.shape[-2:])
    whole = bool((depth == depth.round()).all())
    content, written = encode_depth(found, request.output, unit, whole)
    notes = [] if padded is None else [padded]
    if written != unit:
        notes.append(
            f"{request.output} is in {written.name}: PNG holds whole numbers, and {request.depth} is in {unit.name}"
        )
    name = _NAMES[manifest.upsampler]
    maps = {f"input, {depth.shape[-1]}x{depth.shape[-2]}": depth, "bicubic": bicubic, name: found}
    rows = [_summarize("input", depth), _summarize("bicubic", bicubic, truth), _summarize(name, found, truth)]
    if truth is not None:
        rows.append(_summarize("truth", truth))
    return Upsampled(photo, maps, truth, rows, unit, written, factor, content, notes)


def _read_truth(request: PredictRequest, photo: Tensor, unit: Unit) -> Tensor:
    assert request.truth is not None
    truth = read_depth(request.truth, request.allow_8bit)
    if truth.shape[-2:] != photo.shape[-2:]:
        sizes = [f"{image.shape[-1]}x{image.shape[-2]}" for image in (truth, photo)]
        raise UsageError(
            f"--truth {request.truth}: is {sizes[0]}, and the photo is {sizes[1]}{exif_orientation_note(request.photo)}"
        )
    other = unit_of(request.truth, request.unit)
    if other != unit:
        raise UsageError(
            f"--truth {request.truth} would be in {other.name} and {request.depth} in {unit.name}: say with --unit what"
            " both are in"
        )
    return truth


def _summarize(name: str, depth: Tensor, truth: Tensor | None = None) -> DepthMapSummary:
    measured = depth[depth > 0]
    rmse = None if truth is None else errors(depth, truth).rmse
    return DepthMapSummary(name, depth.shape[-1], depth.shape[-2], (float(measured.min()), float(measured.max())), rmse)
