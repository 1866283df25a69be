"""A trained network on disk: ``manifest.json`` says what it is, ``model.safetensors`` are its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ddf_convert.depth.lowres import Downsampling
from ddf_convert.depth.maps import Unit
from ddf_convert.errors import ArtifactError
from ddf_convert.folder import MANIFEST, FileRecord, finished, replacing
from ddf_convert.models.ddf_upnet import DDFUpNet, JointConvUpNet, JointUpNet
from ddf_convert.version import __version__

_WEIGHTS = "model.safetensors"
Upsampler = Literal["ddf", "conv"]
_CLASSES: dict[Upsampler, type[JointUpNet]] = {"ddf": DDFUpNet, "conv": JointConvUpNet}


class Manifest(BaseModel):
    """What a network is, and what it learned from.

    Attributes:
        kind: Tells such a folder from others.
        format_version: Of the folder.
        upsampler: "ddf" (:class:`DDFUpNet`) or "conv" (:class:`JointConvUpNet`).
        arguments: Of the class, by name.
        unit: Of the depth maps that it learned from.
        downsample: How small depth maps were made of them.
        recipe: That it was trained with, as data.
        steps: That were taken.
        versions: Of the package that wrote it.
        files: What the other files must be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ddf_convert depth upsampling"] = "ddf_convert depth upsampling"
    format_version: Literal[1] = 1
    upsampler: Upsampler
    arguments: dict[str, int | str]
    unit: str
    downsample: Downsampling
    recipe: dict[str, Any] | None = None
    steps: int = 0
    versions: dict[str, str] = {"ddf_convert": __version__}
    files: dict[str, FileRecord] = {}

    @property
    def scale_factor(self) -> int:
        """The network's factor."""
        return int(self.arguments["scale_factor"])


def build(upsampler: Upsampler, **arguments: Any) -> JointUpNet:
    """A network, untrained.

    Raises:
        ValueError: An argument does not fit.
        TypeError: There is no such argument.
    """
    return _CLASSES[upsampler](**arguments)


def save(model: JointUpNet, folder: str | os.PathLike[str], unit: Unit, **said: Any) -> None:
    """Writes a network: the folder holds the old one or the new one, whole, whenever this is interrupted.

    Args:
        model: The network.
        folder: Made if need be.
        unit: Of the depth maps that it learned from.
        **said: ``downsample``, ``recipe`` and ``steps``, as in :class:`Manifest`.

    Raises:
        ArtifactError: The folder cannot be written.
        DDFError: Writing failed, for instance because the disk is full.
    """
    upsampler: Upsampler = "ddf" if isinstance(model, DDFUpNet) else "conv"
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(folder) as stage:
        save_file(weights, stage / _WEIGHTS)
        manifest = Manifest(
            upsampler=upsampler,
            arguments=model.arguments,
            unit=unit.name,
            files={_WEIGHTS: FileRecord.of(stage / _WEIGHTS)},
            **said,
        )
        (stage / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(folder: str | os.PathLike[str]) -> tuple[JointUpNet, Manifest]:
    """A network from its folder, in evaluation mode on the CPU. No code is run from it, and nothing unpickled.

    Raises:
        ArtifactError: It is missing, damaged, or something else.
    """
    place = Path(folder)
    manifest = read_manifest(place)
    try:
        weights = load_file(finished(place, manifest.files)[_WEIGHTS])
        model = build(manifest.upsampler, **manifest.arguments)
        model.load_state_dict(weights)
    except (KeyError, SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ArtifactError):
            raise ArtifactError(str(error).replace("; save the model again", "")) from error
        raise ArtifactError(f"{place}: weights and manifest do not belong together: {_short(error)}") from error
    return model.eval(), manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a network's folder.

    Raises:
        ArtifactError: There is none, or it is something else's.
    """
    file = folder / MANIFEST
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        what = "is no folder of a trained network: it has no manifest.json" if folder.is_dir() else "does not exist"
        raise ArtifactError(f"checkpoint {folder} {what}; `ddf-convert upsample-train` makes one") from None
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ArtifactError(
            f"{file} is damaged, of another version, or of a model that is no depth upsampling network"
        ) from error


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
