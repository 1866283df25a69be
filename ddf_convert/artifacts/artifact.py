"""Artifacts: a converted model on disk. ``manifest.json`` says what was done to which model, beside its weights.

Loading repeats the recorded decisions and never makes one. Nothing in an artifact is unpickled or executed.
"""

from __future__ import annotations

import copy
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from torch import Tensor, fx, nn

from ddf_convert.artifacts.atomic import (
    MANIFEST,
    FileRecord,
    check_replaceable,
    check_writable,
    finished,
    read_json,
    replacing,
    write_tensors,
)
from ddf_convert.artifacts.bounds import Header, check_arguments, in_proportion, read_header
from ddf_convert.artifacts.checkpoint import describe_difference, load_checkpoint, state_of
from ddf_convert.artifacts.extra_state import extra_state_names, split_state
from ddf_convert.artifacts.provenance import OwnSource, TimmSource, built_by_timm, find_source
from ddf_convert.artifacts.rollback import unchanged_on_failure
from ddf_convert.conversion.eligibility import with_narrow_squeeze
from ddf_convert.conversion.record import Conversion, check_whole, outstanding, recorded
from ddf_convert.conversion.rewriter import apply_replacements
from ddf_convert.errors import ArtifactError, DDFError, UsageError, first_line, in_one_line
from ddf_convert.utils.fake_copy import check_initialized, meta_copy
from ddf_convert.utils.logging import warn_once
from ddf_convert.utils.modules import bare, model_name
from ddf_convert.version import __version__

__all__ = [
    "Manifest",
    "OwnSource",
    "TimmSource",
    "build_original",
    "check_writable",
    "load",
    "load_checkpoint",
    "load_original",
    "read_manifest",
    "restore",
    "save",
]

FORMAT = "ddf_convert"
FORMAT_VERSION = 5
# 2: recipes, and the original's weights; 3: upsampling; 4: other filters; 5: why a source is the user's own, extra
# states, functions of parts
_WITH_SOURCE = "if timm can build it, save it with source=TimmSource(name, kwargs)"
_FORMAT_OF_WIDE_SQUEEZES = 5  # the first whose layers have squeezes of at least min(4, C)
WEIGHTS = "model.safetensors"
ORIGINAL = "original.safetensors"
REPORT = "report.json"


class Manifest(BaseModel):
    """``manifest.json``.

    Attributes:
        format: Always "ddf_convert".
        format_version: Of this schema.
        versions: Of ddf_convert, torch and timm when it was written.
        source: The model before conversion.
        conversion: What was done to it.
        dtype: Of its floating-point parameters, for people; each tensor has its own in the weights.
        shared: Tensors that are the same as another one, which alone is in the weights: name to that name.
        extra_states: What modules gave as their ``get_extra_state`` and is no tensor, by its name in the state dict.
        weights: Size and hash of ``model.safetensors``.
        original: Size and hash of ``original.safetensors``, the weights before conversion, if they were kept.
        original_shared: As ``shared``, of these.
        original_extra_states: As ``extra_states``, of the model before conversion.
        report: Size and hash of ``report.json``, if there is one.
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
        """The files beside the manifest."""
        files = {WEIGHTS: self.weights, ORIGINAL: self.original, REPORT: self.report}
        return {name: record for name, record in files.items() if record is not None}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    source: TimmSource | str | None = None,
    report: Mapping[str, Any] | None = None,
    original: nn.Module | None = None,
) -> Manifest:
    """Writes a converted model to a folder, whole or not at all; what the folder held before stays until then.

    Conversions of parts count: a model of your own around a converted one is saved with its record, and so is a part of
    a converted model. DDF layers that your own class builds by hand are part of its code, and in no record.

    timm is the source of a model only if it provably builds the same network: the same weights by name and shape, and
    the same classes, attributes (rates, epsilons, flags) and constant buffers in every module. The arguments that timm
    was given are found and recorded. A timm model that timm does not rebuild exactly is saved as your own; a warning
    says so, and why. Hooks, training modes and timm's ``grad_checkpointing`` are not part of the network.

    Args:
        model: A model that ``convert`` returned, or one that holds such a model, with all its parameters and buffers;
            of one in an ``nn.DataParallel`` what that wraps is saved. Extra states of its modules (``get_extra_state``)
            have to be tensors or JSON.
        path: The folder; made if need be.
        source: What timm builds the unconverted model from: a name, or ``TimmSource(name, kwargs)``. None finds it out
            for timm models; a model that timm does not rebuild exactly is recorded as the user's own, for
            :func:`restore`.
        report: JSON to keep beside the model as ``report.json``.
        original: The model before conversion, whose weights are kept too, for :func:`load_original`: recipes that
            distil learn from it.

    Raises:
        UsageError: The model has no weights (meta device), holds only half of what was replaced together, has an extra
            state that cannot be kept, or timm does not build it from ``source``.
        ArtifactError: The path is a file, or cannot be written; or files that an artifact there does not account for
            are in the way: nothing but what an earlier ``save`` wrote is replaced.
        DDFError: Writing failed.
    """
    model = bare(model)
    check_initialized(model)
    check_writable(path)
    check_whole(model)
    state, extra_states = split_state(model)
    tensors, shared = _unique(state)
    original_state, original_extra_states = split_state(bare(original)) if original is not None else ({}, {})
    originals, original_shared = _unique(original_state)
    conversion = recorded(model) or Conversion(source=model_name(model))
    origin = find_source(model, conversion, source)
    if isinstance(origin, OwnSource) and origin.reason:
        warn_once(
            f"the model is saved as one of your own, and not as timm's {model_name(model)}: {origin.reason}. Only"
            f" restore(fresh_model, folder) will read it; {_WITH_SOURCE}"
        )
    folder = Path(path)
    names = [WEIGHTS, *([ORIGINAL] if original is not None else []), *([REPORT] if report is not None else [])]
    with replacing(folder, names, _files_of) as stage:
        write_tensors(tensors, stage / WEIGHTS)
        if original is not None:
            write_tensors(originals, stage / ORIGINAL)
        if report is not None:
            (stage / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            versions={"ddf_convert": __version__, "torch": torch.__version__, "timm": timm.__version__},
            source=origin,
            conversion=conversion,
            dtype=_dtype(model),
            shared=shared,
            extra_states=extra_states,
            weights=FileRecord.of(stage / WEIGHTS),
            original=None if original is None else FileRecord.of(stage / ORIGINAL),
            original_shared=original_shared,
            original_extra_states=original_extra_states,
            report=None if report is None else FileRecord.of(stage / REPORT),
        )
        (stage / MANIFEST).write_text(manifest.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")
    return manifest


def check_free(path: str | os.PathLike[str], original: bool = True) -> None:
    """Makes sure that :func:`save` can write to a folder without losing a file that it did not write.

    Args:
        path: The folder; it need not exist.
        original: Whether the weights before conversion will be kept too.

    Raises:
        ArtifactError: It cannot be written, or something is in the way; the message names it.
    """
    check_writable(path)
    check_replaceable(path, [WEIGHTS, REPORT, *([ORIGINAL] if original else [])], _files_of)


def _files_of(content: dict[str, Any]) -> dict[str, Any] | None:
    """What the content of a manifest of any version says of the files beside it; None if it is something else's."""
    if content.get("format") != FORMAT:
        return None
    return {WEIGHTS: content.get("weights"), ORIGINAL: content.get("original"), REPORT: content.get("report")}


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """The converted model of a folder, in evaluation mode. Torch's random state stays as it is.

    Raises:
        ArtifactError: The folder is not a whole artifact of this or an older version, its model is the user's own (use
            :func:`restore`), or timm no longer builds the model that it was.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if isinstance(manifest.source, OwnSource):
        raise ArtifactError(
            f"{folder} holds {_own(manifest.source)}, which only you can build; use"
            " ddf_convert.restore(fresh_model, folder)" + (f", or {_WITH_SOURCE}" if manifest.source.reason else "")
        )
    return _load(folder, manifest).eval().to(device)


def restore(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Converts a fresh model as a folder records, and loads its weights, in place.

    The model takes the dtype of the saved weights and keeps its device and training mode. If anything fails, the model
    is as it was: its modules, values, hooks and attributes.

    Args:
        model: The unconverted model, built as the one that was converted and saved. Parts of it that its constructor
            converts stay as they are, if they were converted as the folder records.
        path: The folder.

    Returns:
        The same model; or its GraphModule, if convolutions that it calls as functions were replaced.

    Raises:
        ArtifactError: The folder is not a whole artifact, or it does not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    weights, header = _weights(folder, manifest)
    inner = bare(model)
    with _named(folder, inner):
        if any(tensor.device.type == "meta" for tensor in (*inner.parameters(), *inner.buffers())):
            raise UsageError("the model is on the meta device and can hold no weights; build it on a real device")
        _check_fits(meta_copy(inner), model_name(inner), manifest, header)
        tensors = _tensors(weights, manifest.shared)
        with unchanged_on_failure(inner):
            filled = _filled(inner, manifest, tensors)
    return filled if isinstance(filled, fx.GraphModule) else model


def load_original(path: str | os.PathLike[str], fresh_model: nn.Module | None = None) -> nn.Module | None:
    """The model before conversion, in evaluation mode, from the weights that a folder keeps beside the converted one.

    Args:
        path: The folder.
        fresh_model: The unconverted model, where it is the user's own, which only the user can build; it is filled.

    Returns:
        The model; None if the folder does not keep its weights.

    Raises:
        ArtifactError: As for :func:`load` and :func:`restore`.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.original is None:
        return None
    weights = finished(folder, {ORIGINAL: manifest.original})[ORIGINAL]
    header = read_header(weights, manifest.original_shared)
    model = bare(build_original(folder) if fresh_model is None else fresh_model)
    with _named(folder, model):
        difference = _difference(model, header, manifest.original_extra_states)
        if difference:
            raise UsageError(f"the original's weights do not fit {model_name(model)}: {difference}")
        tensors = _tensors(weights, manifest.original_shared)
        with unchanged_on_failure(model):
            _take(model, tensors, manifest.original_extra_states)
    return model.eval()


def build_original(path: str | os.PathLike[str]) -> nn.Module:
    """The model that a folder's was before conversion, with fresh weights. Torch's random state stays as it is.

    Raises:
        ArtifactError: The folder is not an artifact, its model is the user's own, or timm no longer builds it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if isinstance(manifest.source, OwnSource):
        raise ArtifactError(f"{path} holds {_own(manifest.source)}, which only you can build: give it")
    _, header = _weights(folder, manifest)
    return _built(folder, manifest.source, "cpu", header)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """What a folder says of itself; the weights are not looked at.

    Raises:
        ArtifactError: It is not an artifact, is damaged, or was written by a newer ddf_convert.
    """
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
        return _in_todays_terms(Manifest.model_validate(content))
    except ValidationError as error:
        raise ArtifactError(f"{file} is damaged: {in_one_line(error)}") from error


def _in_todays_terms(manifest: Manifest) -> Manifest:
    """Adds to the record of an older format what today's defaults would decide otherwise."""
    if manifest.format_version >= _FORMAT_OF_WIDE_SQUEEZES:
        return manifest
    replaced = tuple(
        each.model_copy(update={"replacement": with_narrow_squeeze(each.replacement)})
        for each in manifest.conversion.replaced
    )
    return manifest.model_copy(update={"conversion": manifest.conversion.model_copy(update={"replaced": replaced})})


# --- filling a model from a folder ---


def _load(folder: Path, manifest: Manifest) -> nn.Module:
    """The model of an artifact that timm can build; first on the meta device, where nothing costs memory."""
    assert isinstance(manifest.source, TimmSource)
    weights, header = _weights(folder, manifest)
    sketch = _built(folder, manifest.source, "meta", header)
    with _named(folder, sketch):
        _check_fits(meta_copy(sketch), model_name(sketch), manifest, header)
        model = _built(folder, manifest.source, "cpu", header)
        return _filled(model, manifest, _tensors(weights, manifest.shared))


def _weights(folder: Path, manifest: Manifest) -> tuple[Path, Header]:
    """The file of the weights, whole, and its header, which the rest of the manifest agrees with in size."""
    with suppress(ArtifactError):  # the report is for people: a damaged one stands in no model's way
        finished(folder, {REPORT: manifest.report} if manifest.report else {})
    weights = finished(folder, {WEIGHTS: manifest.weights})[WEIGHTS]
    header = read_header(weights, manifest.shared)
    _check_steps(folder, manifest, header)
    return weights, header


def _check_steps(folder: Path, manifest: Manifest, header: Header) -> None:
    """Whether the manifest replaces each layer once, and no more of them than there can be weights for.

    Raises:
        ArtifactError: It does not.
    """
    steps = manifest.conversion.replaced
    places = [place for step in steps for place in step.places]
    twice = next((place for place, count in Counter(places).items() if count > 1), None)
    if twice is not None:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {twice} is replaced twice")
    named, most = len(places) + sum(len(step.removed) + len(step.apart) for step in steps), len(header.shapes)
    if named > 1000 + 4 * most:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it names {named:,} layers for {most:,} weights")


def _check_fits(sketch: nn.Module, name: str, manifest: Manifest, header: Header) -> None:
    """Converts a copy without weights and compares it with the header of the weights.

    Raises:
        UsageError: They do not fit.
    """
    with in_proportion(header, sketch):
        sketch = apply_replacements(sketch, outstanding(sketch, manifest.conversion.replaced))
    if difference := _difference(sketch, header, manifest.extra_states):
        versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
        raise UsageError(f"the weights do not fit {name}: {difference}; they were written with {versions}")


def _difference(model: nn.Module, header: Header, extra_states: Mapping[str, Any]) -> str:
    """What of a model's state a folder does not have, has too much, or cannot be taken for; empty if all is right."""
    names = extra_state_names(model)
    expected = state_of(model, extra_states=False) | dict.fromkeys(names, ())
    # Extra states that are tensors have any shape.
    found = header.shapes | dict.fromkeys((*extra_states, *(names & header.shapes.keys())), ())
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return describe_difference(expected, found) or header.unfit_dtypes(tensors)


def _filled(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor]) -> nn.Module:
    """Converts a model and gives it weights, in place."""
    model = apply_replacements(model, outstanding(model, manifest.conversion.replaced))
    _take(model, tensors, manifest.extra_states)
    model.ddf_conversion = manifest.conversion  # type: ignore[assignment]
    return model


@contextmanager
def _named(folder: Path, model: nn.Module) -> Iterator[None]:
    """A context in which every error on the way from a folder to a model becomes one that names the folder."""
    try:
        yield
    except ArtifactError:
        raise
    except UsageError as error:
        raise ArtifactError(f"{folder}: {error}") from error
    except (DDFError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {first_line(error)}"
        raise ArtifactError(f"{folder}: what it records cannot be done to {model_name(model)}: {words}") from error


def _built(folder: Path, source: TimmSource, device: str, header: Header) -> nn.Module:
    """A fresh model from timm, if it is no larger than the weights account for."""
    try:
        check_arguments(source.kwargs, header)
        with in_proportion(header):
            return built_by_timm(source, device)
    except UsageError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _tensors(weights: Path, shared: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of a file, the shared ones by all their names.

    Raises:
        ArtifactError: The file is damaged.
    """
    try:
        tensors = safetensors.torch.load_file(weights)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged: {first_line(error)}") from error
    return {**tensors, **{name: tensors[kept] for name, kept in shared.items()}}


def _take(model: nn.Module, tensors: dict[str, Tensor], extra_states: Mapping[str, Any]) -> None:
    """Loads weights that fit, with their dtypes, and the extra states."""
    _take_dtypes(model, tensors)
    model.load_state_dict({**tensors, **copy.deepcopy(dict(extra_states))})


def _take_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters and buffers the dtypes of the saved tensors, which ``load_state_dict`` would cast away."""
    extra = extra_state_names(model)
    for name, own in model.state_dict(keep_vars=True).items():
        if name not in extra and own.dtype != tensors[name].dtype:
            own.data = own.data.to(tensors[name].dtype)


def _own(source: OwnSource) -> str:
    """What a folder holds, in words."""
    reason = f"; timm does not build it: {source.reason}" if source.reason else ""
    return f"a model of your own ({source.model_class}{reason})"


# --- what to write ---


def _unique(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, each once and contiguous, and the names that share one: name to the name written."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.device.type == "meta":
            raise UsageError(
                f"{name} is on the meta device and has no weights to save; build the model on a real device"
            )
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and identity in names:
            shared[name] = names[identity]
        else:
            names[identity] = name
            # A clone: safetensors refuses tensors that are parts of one memory, such as views of a flat buffer.
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            detached = tensor.detach()
            tensors[name] = detached if whole else detached.clone(memory_format=torch.contiguous_format)
    return tensors, shared


def _dtype(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return "+".join(sorted(dtypes)) or "none"
