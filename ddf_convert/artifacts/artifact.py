"""Artifacts: a converted model on disk, as ``manifest.json`` and weights.

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
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, fx, nn

from ddf_convert.artifacts.atomic import (
    MANIFEST,
    FileRecord,
    atomic_folder,
    check_replaceable,
    check_writable,
    locate_files,
    write_tensors,
)
from ddf_convert.artifacts.bounds import Header, check_arguments, limit_construction, read_header
from ddf_convert.artifacts.checkpoint import load_checkpoint
from ddf_convert.artifacts.manifest import (
    FORMAT,
    FORMAT_VERSION,
    ORIGINAL,
    REPORT,
    WEIGHTS,
    Manifest,
    file_entries,
    read_manifest,
)
from ddf_convert.artifacts.provenance import OwnSource, TimmSource, build_source, find_source
from ddf_convert.artifacts.rollback import unchanged_on_failure
from ddf_convert.artifacts.state import (
    describe_difference,
    extra_state_names,
    split_shared,
    split_state,
    state_shapes,
)
from ddf_convert.conversion.record import Conversion, check_whole, outstanding, recorded
from ddf_convert.conversion.rewriter import apply_replacements
from ddf_convert.errors import ArtifactError, DDFError, UsageError, first_line
from ddf_convert.utils.fake_copy import check_initialized, meta_copy
from ddf_convert.utils.logging import warn_once
from ddf_convert.utils.modules import bare, model_name
from ddf_convert.version import __version__

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Manifest",
    "OwnSource",
    "TimmSource",
    "build_original",
    "check_free",
    "check_writable",
    "load",
    "load_checkpoint",
    "load_original",
    "read_manifest",
    "restore",
    "save",
]

_SAVE_WITH_SOURCE = "if timm can build it, save it with source=TimmSource(name, kwargs)"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    source: TimmSource | str | None = None,
    report: Mapping[str, Any] | None = None,
    original: nn.Module | None = None,
) -> Manifest:
    """Writes a converted model to a folder, atomically: until the end the folder holds what it held before.

    Parts count: a model of your own around a converted one is saved with its record, and so is a part of a converted
    model. DDF layers that your own class builds are part of its code, and in no record.

    The source is timm only if timm provably builds the same network: the same weights by name and shape, and the same
    classes, attributes (rates, epsilons, flags) and constant buffers in every module. The arguments that timm was given
    are found and recorded. A timm model that timm does not rebuild exactly is saved as your own, and a warning says
    why. Hooks, training modes and timm's ``grad_checkpointing`` are not part of the network.

    Args:
        model: A model that ``convert`` returned, or one that contains such a model, with all its parameters and
            buffers. Of an ``nn.DataParallel`` the wrapped model is saved. Extra states (``get_extra_state``) have to be
            tensors or JSON.
        path: The folder; it is made if it does not exist.
        source: What timm builds the unconverted model from: a name, or ``TimmSource(name, kwargs)``. None: it is found
            for timm models; other models are recorded as your own, for :func:`restore`.
        report: JSON to store beside the model as ``report.json``.
        original: The model before conversion, whose weights are stored too, for :func:`load_original` and recipes that
            distill.

    Returns:
        The manifest.

    Raises:
        UsageError: The model has no weights (meta device), holds only half of what was replaced together, has an extra
            state that cannot be stored, or timm does not build it from ``source``.
        ArtifactError: The path is a file or cannot be written, or holds files that no earlier ``save`` wrote there.
        DDFError: Writing failed, for instance because the disk is full.
    """
    model = bare(model)
    check_initialized(model)
    check_writable(path)
    check_whole(model)
    state, extra_states = split_state(model)
    tensors, shared = split_shared(state)
    original_state, original_extra_states = split_state(bare(original)) if original is not None else ({}, {})
    original_tensors, original_shared = split_shared(original_state)
    conversion = recorded(model) or Conversion(source=model_name(model))
    origin = find_source(model, conversion, source)
    if isinstance(origin, OwnSource) and origin.reason:
        warn_once(
            f"the model is saved as one of your own, and not as timm's {model_name(model)}: {origin.reason}. Only"
            f" restore(fresh_model, folder) will read it; {_SAVE_WITH_SOURCE}"
        )
    names = [WEIGHTS, *([ORIGINAL] if original is not None else []), *([REPORT] if report is not None else [])]
    with atomic_folder(path, names, file_entries) as stage:
        write_tensors(tensors, stage / WEIGHTS)
        if original is not None:
            write_tensors(original_tensors, stage / ORIGINAL)
        if report is not None:
            (stage / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        manifest = Manifest(
            versions={"ddf_convert": __version__, "torch": torch.__version__, "timm": timm.__version__},
            source=origin,
            conversion=conversion,
            dtype=_dtype_names(model),
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
    """Checks that :func:`save` can write to a folder without replacing a file that it did not write.

    Args:
        path: The folder; it need not exist.
        original: Whether the weights before conversion will be stored too.

    Raises:
        ArtifactError: It cannot be written, or something is in the way; the message names it.
    """
    check_writable(path)
    check_replaceable(path, [WEIGHTS, REPORT, *([ORIGINAL] if original else [])], file_entries)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> nn.Module:
    """Loads a converted model of timm, in evaluation mode. Torch's random state stays unchanged.

    Args:
        path: The folder.
        device: Where to put the model.

    Raises:
        ArtifactError: The folder is not a whole artifact of this or an older version, its model is your own (use
            :func:`restore`), or timm no longer builds the same model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if isinstance(manifest.source, OwnSource):
        alternative = f", or {_SAVE_WITH_SOURCE}" if manifest.source.reason else ""
        raise ArtifactError(
            f"{folder} holds {_describe_own(manifest.source)}, which only you can build; use"
            f" ddf_convert.restore(fresh_model, folder){alternative}"
        )
    weights, header = _open_weights(folder, manifest)
    sketch = _build(folder, manifest.source, "meta", header)  # checked first, where nothing costs memory
    with _errors_name(folder, sketch):
        _check_fits(meta_copy(sketch), model_name(sketch), manifest, header)
        model = _build(folder, manifest.source, "cpu", header)
        model = _convert_and_fill(model, manifest, _read_tensors(weights, manifest.shared))
    return model.eval().to(device)


def restore(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Converts a fresh model as a folder records, and loads its weights, in place.

    The model takes over the dtype of the saved weights, and keeps its device and training mode. If anything fails, the
    model is unchanged: its modules, values, hooks and attributes.

    Args:
        model: The unconverted model, built like the one that was saved. Parts of it that its constructor converts are
            kept, if they were converted as the folder records.
        path: The folder.

    Returns:
        The same model; or its GraphModule, if convolutions that it calls as functions were replaced.

    Raises:
        ArtifactError: The folder is not a whole artifact, or it does not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    weights, header = _open_weights(folder, manifest)
    inner = bare(model)
    with _errors_name(folder, inner):
        if any(tensor.device.type == "meta" for tensor in (*inner.parameters(), *inner.buffers())):
            raise UsageError("the model is on the meta device and can hold no weights; build it on a real device")
        _check_fits(meta_copy(inner), model_name(inner), manifest, header)
        tensors = _read_tensors(weights, manifest.shared)
        with unchanged_on_failure(inner):
            filled = _convert_and_fill(inner, manifest, tensors)
    return filled if isinstance(filled, fx.GraphModule) else model


def load_original(path: str | os.PathLike[str], fresh_model: nn.Module | None = None) -> nn.Module | None:
    """Loads the model before conversion, in evaluation mode, if a folder stores its weights.

    Args:
        path: The folder.
        fresh_model: The unconverted model, if it is your own, which only you can build; it is filled in place.

    Returns:
        The model; None if the folder does not store its weights.

    Raises:
        ArtifactError: The folder is not a whole artifact, or it does not fit the model.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.original is None:
        return None
    weights = locate_files(folder, {ORIGINAL: manifest.original})[ORIGINAL]
    header = read_header(weights, manifest.original_shared)
    model = bare(build_original(folder) if fresh_model is None else fresh_model)
    with _errors_name(folder, model):
        difference = _state_difference(model, header, manifest.original_extra_states)
        if difference:
            raise UsageError(f"the original's weights do not fit {model_name(model)}: {difference}")
        tensors = _read_tensors(weights, manifest.original_shared)
        with unchanged_on_failure(model):
            _fill(model, tensors, manifest.original_extra_states)
    return model.eval()


def build_original(path: str | os.PathLike[str]) -> nn.Module:
    """Builds the model before conversion, with fresh weights. Torch's random state stays unchanged.

    Raises:
        ArtifactError: The folder is not an artifact, its model is your own, or timm no longer builds it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if isinstance(manifest.source, OwnSource):
        raise ArtifactError(f"{path} holds {_describe_own(manifest.source)}, which only you can build: give it")
    _, header = _open_weights(folder, manifest)
    return _build(folder, manifest.source, "cpu", header)


# --- checks before a model is changed ---


def _open_weights(folder: Path, manifest: Manifest) -> tuple[Path, Header]:
    """Returns the weights file and its header, after checking its hash and the size of the manifest's record."""
    with suppress(ArtifactError):  # the report is for people: a damaged one does not prevent loading
        locate_files(folder, {REPORT: manifest.report} if manifest.report else {})
    weights = locate_files(folder, {WEIGHTS: manifest.weights})[WEIGHTS]
    header = read_header(weights, manifest.shared)
    _check_record(folder, manifest, header)
    return weights, header


def _check_record(folder: Path, manifest: Manifest, header: Header) -> None:
    """Raises ArtifactError if the record replaces a layer twice, or names more layers than the weights can have."""
    steps = manifest.conversion.replaced
    places = [place for step in steps for place in step.places]
    twice = next((place for place, count in Counter(places).items() if count > 1), None)
    if twice is not None:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: {twice} is replaced twice")
    named, tensors = len(places) + sum(len(step.removed) + len(step.apart) for step in steps), len(header.shapes)
    if named > 1000 + 4 * tensors:
        raise ArtifactError(f"{folder / MANIFEST} is damaged: it names {named:,} layers for {tensors:,} weights")


def _check_fits(sketch: nn.Module, name: str, manifest: Manifest, header: Header) -> None:
    """Converts a meta copy of a model and compares it with the weights' header; raises UsageError if they differ."""
    with limit_construction(header, sketch):
        sketch = apply_replacements(sketch, outstanding(sketch, manifest.conversion.replaced))
    if difference := _state_difference(sketch, header, manifest.extra_states):
        versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
        raise UsageError(f"the weights do not fit {name}: {difference}; they were written with {versions}")


def _state_difference(model: nn.Module, header: Header, extra_states: Mapping[str, Any]) -> str:
    """Returns how a model's state differs from a folder's in names, shapes and dtypes; empty if it does not."""
    names = extra_state_names(model)
    expected = state_shapes(model, extra_states=False) | dict.fromkeys(names, ())
    # Extra states that are tensors have any shape.
    found = header.shapes | dict.fromkeys((*extra_states, *(names & header.shapes.keys())), ())
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return describe_difference(expected, found) or header.unfit_dtypes(tensors)


# --- building and filling ---


def _build(folder: Path, source: TimmSource, device: str, header: Header) -> nn.Module:
    """Builds a fresh timm model, within the limits of the weights' header."""
    try:
        check_arguments(source.kwargs, header)
        with limit_construction(header):
            return build_source(source, device)
    except UsageError as error:
        raise ArtifactError(f"{folder}: {error}") from error


def _convert_and_fill(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor]) -> nn.Module:
    model = apply_replacements(model, outstanding(model, manifest.conversion.replaced))
    _fill(model, tensors, manifest.extra_states)
    model.ddf_conversion = manifest.conversion  # type: ignore[assignment]
    return model


def _fill(model: nn.Module, tensors: dict[str, Tensor], extra_states: Mapping[str, Any]) -> None:
    """Loads weights that fit, with their dtypes, and the extra states."""
    _cast(model, tensors)
    model.load_state_dict({**tensors, **copy.deepcopy(dict(extra_states))})


def _cast(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Casts parameters and buffers to the dtypes of saved tensors, which ``load_state_dict`` would cast instead."""
    extra = extra_state_names(model)
    for name, own in model.state_dict(keep_vars=True).items():
        if name not in extra and own.dtype != tensors[name].dtype:
            own.data = own.data.to(tensors[name].dtype)


def _read_tensors(weights: Path, shared: Mapping[str, str]) -> dict[str, Tensor]:
    """Returns the tensors of a file, the shared ones by all their names; raises ArtifactError if it is damaged."""
    try:
        tensors = safetensors.torch.load_file(weights)
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged: {first_line(error)}") from error
    return {**tensors, **{name: tensors[stored] for name, stored in shared.items()}}


@contextmanager
def _errors_name(folder: Path, model: nn.Module) -> Iterator[None]:
    """Turns every error on the way from a folder to a model into one that names the folder."""
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


def _describe_own(source: OwnSource) -> str:
    reason = f"; timm does not build it: {source.reason}" if source.reason else ""
    return f"a model of your own ({source.model_class}{reason})"


def _dtype_names(model: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return "+".join(sorted(dtypes)) or "none"
