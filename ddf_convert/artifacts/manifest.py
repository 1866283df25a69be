"""``manifest.json``: what was done to which model, in all formats that were ever written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from ddf_convert.artifacts.atomic import MANIFEST, FileRecord, read_json
from ddf_convert.artifacts.provenance import OwnSource, TimmSource
from ddf_convert.conversion.eligibility import with_narrow_squeeze
from ddf_convert.conversion.record import Conversion
from ddf_convert.errors import ArtifactError, in_one_line

FORMAT = "ddf_convert"
FORMAT_VERSION = 5
"""2 added recipes and the original's weights; 3 upsampling; 4 other filters; 5 why a source is the user's own, extra
states, functions of parts, and squeezes of at least min(4, C). Fields that a format lacks have their defaults."""
_FORMAT_OF_WIDE_SQUEEZES = 5
WEIGHTS = "model.safetensors"
ORIGINAL = "original.safetensors"
REPORT = "report.json"


class Manifest(BaseModel):
    """The content of ``manifest.json``.

    Attributes:
        format: Always "ddf_convert".
        format_version: Version of this schema.
        versions: Versions of ddf_convert, torch and timm that wrote it.
        source: The model before conversion.
        conversion: What was done to it.
        dtype: Dtype of its floating-point parameters, for people; each tensor has its own in the weights.
        shared: Tensors that are stored under another name: name to that name.
        extra_states: JSON values of modules' ``get_extra_state``, by name in the state dict.
        weights: Record of ``model.safetensors``.
        original: Record of ``original.safetensors``, the weights before conversion, if they were kept.
        original_shared: ``shared`` of the weights before conversion.
        original_extra_states: ``extra_states`` of the model before conversion.
        report: Record of ``report.json``, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ddf_convert"] = "ddf_convert"
    format_version: Literal[1, 2, 3, 4, 5] = 5
    versions: dict[str, str]
    source: Annotated[TimmSource | OwnSource, Field(discriminator="kind")]
    conversion: Conversion
    dtype: str
    shared: dict[str, str] = {}
    extra_states: dict[str, JsonValue] = {}
    weights: FileRecord
    original: FileRecord | None = None
    original_shared: dict[str, str] = {}
    original_extra_states: dict[str, JsonValue] = {}
    report: FileRecord | None = None

    def files(self) -> dict[str, FileRecord]:
        """Returns the records of the files beside the manifest."""
        files = {WEIGHTS: self.weights, ORIGINAL: self.original, REPORT: self.report}
        return {name: record for name, record in files.items() if record is not None}


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Returns the manifest of a folder, migrated from older formats; raises ArtifactError if there is none."""
    folder = Path(path)
    file = folder / MANIFEST
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    if not file.is_file():
        raise ArtifactError(f"{folder} is not an artifact of ddf_convert: it has no {MANIFEST}")
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ArtifactError(f"{file} is not a manifest of ddf_convert")
    version = content.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} was written by a newer ddf_convert (format {version}, this one reads {FORMAT_VERSION});"
            " upgrade ddf_convert"
        )
    try:
        return _migrated(Manifest.model_validate(content))
    except ValidationError as error:
        raise ArtifactError(f"{file} is damaged: {in_one_line(error)}") from error


def file_entries(content: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the file records in the content of a manifest of any version; None if another program wrote it."""
    if content.get("format") != FORMAT:
        return None
    return {WEIGHTS: content.get("weights"), ORIGINAL: content.get("original"), REPORT: content.get("report")}


def _migrated(manifest: Manifest) -> Manifest:
    """Adds to a manifest of an older format the options whose defaults have changed."""
    if manifest.format_version >= _FORMAT_OF_WIDE_SQUEEZES:
        return manifest
    replaced = tuple(
        step.model_copy(update={"replacement": with_narrow_squeeze(step.replacement)})
        for step in manifest.conversion.replaced
    )
    return manifest.model_copy(update={"conversion": manifest.conversion.model_copy(update={"replaced": replaced})})
