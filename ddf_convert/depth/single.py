"""One photo and one small depth map, from files to the content of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddf_convert.depth import checkpoint, picture
from ddf_convert.depth.inference import interpolate, upsample
from ddf_convert.depth.maps import Unit, encode_depth, read_depth, read_photo, unit_of
from ddf_convert.depth.metrics import errors
from ddf_convert.errors import UsageError
from ddf_convert.utils.device import choose
from ddf_convert.utils.images import exif_orientation_note

_NAMES = {"ddf": "DDF-Up-Net", "conv": "joint convolutions"}


@dataclass(frozen=True)
class Request:
    """What to upsample.

    Attributes:
        photo: File.
        depth: File of the small depth map.
        checkpoint: Folder of a trained network.
        output: File that will be written; its suffix says as what.
        factor: That the user expects; None is the network's.
        truth: File of the true large depth map, or None.
        unit: Of the depth files' numbers; None is millimetres in PNG, else metres.
        allow_8bit: Take depth in PNG of 8 bits.
        device: "cpu", "cuda" or "cuda:N"; None is the GPU if there is one.
    """

    photo: Path
    depth: Path
    checkpoint: Path
    output: Path
    factor: int | None = None
    truth: Path | None = None
    unit: str | None = None
    allow_8bit: bool = False
    device: str | None = None


@dataclass(frozen=True)
class Row:
    """Of the table that is shown.

    Attributes:
        name: Of the depth map.
        width: In pixels.
        height: In pixels.
        range: Least and largest measurement.
        rmse: Against the truth, in the unit of the numbers; None if it was not measured.
    """

    name: str
    width: int
    height: int
    range: tuple[float, float]
    rmse: float | None = None


@dataclass(frozen=True)
class Upsampled:
    """What came out.

    Attributes:
        photo: (3, H, W) uint8.
        maps: Small depth map, bicubic interpolation and the network's, by name.
        truth: (1, H, W), or None.
        rows: Of the table.
        unit: Of the numbers in the maps.
        written: Unit of the numbers in the file.
        factor: Of the network.
        content: Of the file.
        notes: What the user should know.
    """

    photo: Tensor
    maps: dict[str, Tensor]
    truth: Tensor | None
    rows: list[Row]
    unit: Unit
    written: Unit
    factor: int
    content: bytes
    notes: list[str]

    @property
    def measured(self) -> bool:
        """Whether there was a truth."""
        return self.truth is not None

    def picture(self) -> bytes:
        """Everything side by side, as PNG.

        Raises:
            ImportError: matplotlib is missing.
        """
        return picture.png(picture.draw(self.photo, list(self.maps.items()), self.truth, self.unit))

    def to_dict(self) -> dict[str, Any]:
        """As JSON; errors are in ``rmse_unit``."""
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


def upsample_files(request: Request) -> Upsampled:
    """Upsamples, and writes nothing.

    Raises:
        UsageError: A file cannot be read, sizes do not fit, or the network has another factor.
    """
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
    truth = None if request.truth is None else _truth(request, photo, unit)
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
    rows = [_row("input", depth), _row("bicubic", bicubic, truth), _row(name, found, truth)]
    if truth is not None:
        rows.append(_row("truth", truth))
    return Upsampled(photo, maps, truth, rows, unit, written, factor, content, notes)


def _truth(request: Request, photo: Tensor, unit: Unit) -> Tensor:
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


def _row(name: str, depth: Tensor, truth: Tensor | None = None) -> Row:
    measured = depth[depth > 0]
    rmse = None if truth is None else errors(depth, truth).rmse
    return Row(name, depth.shape[-1], depth.shape[-2], (float(measured.min()), float(measured.max())), rmse)
