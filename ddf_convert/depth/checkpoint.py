"""A trained network on disk: ``manifest.json`` says what it is, ``model.safetensors`` are its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors.torch import load_file

from ddf_convert.artifacts.atomic import (
    MANIFEST,
    FileRecord,
    atomic_folder,
    check_replaceable,
    locate_files,
    write_tensors,
)
from ddf_convert.artifacts.bounds import check_arguments, limit_construction, read_header
from ddf_convert.artifacts.state import describe_difference
from ddf_convert.depth.lowres import Downsampling
from ddf_convert.depth.maps import Unit
from ddf_convert.errors import ArtifactError, first_line
from ddf_convert.models.ddf_upnet import SCALE_FACTORS, DDFUpNet, JointConvUpNet, JointUpNet
from ddf_convert.version import __version__

_WEIGHTS = "model.safetensors"
_KIND: Literal["ddf_convert depth upsampling"] = "ddf_convert depth upsampling"
Upsampler = Literal["ddf", "conv"]
_CLASSES: dict[Upsampler, type[JointUpNet]] = {"ddf": DDFUpNet, "conv": JointConvUpNet}


class DepthManifest(BaseModel):
    """The manifest of a network: what it is, and what it learned from.

    Attributes:
        kind: Distinguishes such a folder from others.
        format_version: Version of the folder's format.
        upsampler: "ddf" (:class:`DDFUpNet`) or "conv" (:class:`JointConvUpNet`).
        arguments: Arguments of the class.
        unit: Unit of the depth maps that it learned from.
        downsample: How small depth maps were made of them.
        recipe: The recipe that it was trained with.
        steps: Steps taken.
        versions: Version of the package that wrote it.
        files: Sizes and hashes of the other files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ddf_convert depth upsampling"] = _KIND
    format_version: Literal[1] = 1
    upsampler: Upsampler
    arguments: dict[str, int | str]
    unit: str
    downsample: Downsampling
    recipe: dict[str, Any] | None = None
    steps: int = 0
    versions: dict[str, str] = {"ddf_convert": __version__}
    files: dict[str, FileRecord] = {}

    @field_validator("arguments")
    @classmethod
    def _has_factor(cls, arguments: dict[str, int | str]) -> dict[str, int | str]:
        if arguments.get("scale_factor") not in SCALE_FACTORS:
            raise ValueError("the arguments need a scale_factor")
        return arguments

    @property
    def scale_factor(self) -> int:
        """The factor of the network."""
        return int(self.arguments["scale_factor"])


def build(upsampler: Upsampler, **arguments: Any) -> JointUpNet:
    """Builds a network, untrained."""
    return _CLASSES[upsampler](**arguments)


def save(
    model: JointUpNet,
    folder: str | os.PathLike[str],
    unit: Unit,
    downsample: Downsampling,
    recipe: dict[str, Any] | None = None,
    steps: int = 0,
) -> None:
    """Writes a network: the folder holds the old one or the new one, whole, whenever this is interrupted."""
    upsampler: Upsampler = "ddf" if isinstance(model, DDFUpNet) else "conv"
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_folder(folder, [_WEIGHTS], _files_of) as stage:
        write_tensors(weights, stage / _WEIGHTS)
        manifest = DepthManifest(
            upsampler=upsampler,
            arguments=model.arguments,
            unit=unit.name,
            downsample=downsample,
            recipe=recipe,
            steps=steps,
            files={_WEIGHTS: FileRecord.of(stage / _WEIGHTS)},
        )
        (stage / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(folder: str | os.PathLike[str]) -> tuple[JointUpNet, DepthManifest]:
    """A network from its folder, in evaluation mode on the CPU. No code is run from it, and nothing unpickled.

    Raises:
        ArtifactError: It is missing, damaged, or something else.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    try:
        weights = locate_files(place, manifest.files)[_WEIGHTS]
        header = read_header(weights, {})
        check_arguments(manifest.arguments, header)
        with limit_construction(header), torch.device("meta"):
            sketch = build(manifest.upsampler, **manifest.arguments)
        state = sketch.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if difference := describe_difference(shapes, header.shapes) or header.unfit_dtypes(state):
            raise ValueError(difference)
        model = build(manifest.upsampler, **manifest.arguments)
        model.load_state_dict(load_file(weights))
    except ArtifactError as error:
        raise ArtifactError(str(error).replace("; save the model again", "")) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the arguments are whatever the manifest says
        raise ArtifactError(f"{place}: weights and manifest do not belong together: {first_line(error)}") from error
    return model.eval(), manifest


def check_free(folder: Path) -> None:
    """Makes sure that :func:`save` can write to a folder without losing a file that it did not write."""
    check_replaceable(folder, [_WEIGHTS], _files_of)


def _files_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the files that a manifest lists; None if it is not a network's."""
    files = content.get("files")
    return files if content.get("kind") == _KIND and isinstance(files, dict) else None


def read_manifest(folder: Path) -> DepthManifest:
    """Reads the manifest of a network's folder."""
    file = folder / MANIFEST
    try:
        return DepthManifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        what = "is no folder of a trained network: it has no manifest.json" if folder.is_dir() else "does not exist"
        raise ArtifactError(f"checkpoint {folder} {what}; `ddf-convert depth train` makes one") from None
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{file} is damaged, of another version, or of a model that is no depth upsampling network"
        ) from error
