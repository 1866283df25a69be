"""Artifacts: a converted model on disk. ``manifest.json`` says what was done to which model, beside its weights.

Loading repeats the recorded decisions and never makes one. Nothing in an artifact is unpickled or executed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, fx, nn

from ddf_convert.bounds import Header, check_arguments, in_proportion, read_header
from ddf_convert.checkpoint import describe_difference, load_checkpoint, state_of
from ddf_convert.copies import check_initialised, meta_copy
from ddf_convert.disk import write_tensors
from ddf_convert.errors import ArtifactError, DDFError, UsageError
from ddf_convert.folder import MANIFEST, FileRecord, check_replaceable, check_writable, finished, read_json, replacing
from ddf_convert.graph.plan import in_one_line
from ddf_convert.graph.record import first_line
from ddf_convert.graph.rewrite import Conversion, recorded
from ddf_convert.graph.swap import prepare, swap
from ddf_convert.graph.trace import describe
from ddf_convert.graph.wrappers import bare
from ddf_convert.rollback import unchanged_on_failure
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
FORMAT_VERSION = 4  # 2: recipes, and the original's weights; 3: upsampling; 4: other filters
WEIGHTS = "model.safetensors"
ORIGINAL = "original.safetensors"
REPORT = "report.json"

# Arguments of timm.create_model that make it read or fetch files: an artifact never carries them.
_READING = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
}

_Scalar = bool | int | float | str | None


class TimmSource(BaseModel):
    """A model that timm can build: ``timm.create_model(name, pretrained=False, **kwargs)``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["timm"] = "timm"
    name: str
    kwargs: dict[str, _Scalar | list[_Scalar]] = {}


class OwnSource(BaseModel):
    """A model of the user's own: it is built by the user and filled by :func:`restore`.

    Attributes:
        model_class: Module and name of its class, to recognise it by; never imported.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["own"] = "own"
    model_class: str = Field(alias="class")


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
        weights: Size and hash of ``model.safetensors``.
        original: Size and hash of ``original.safetensors``, the weights before conversion, if they were kept.
        original_shared: As ``shared``, of these.
        report: Size and hash of ``report.json``, if there is one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ddf_convert"] = "ddf_convert"
    format_version: Literal[1, 2, 3, 4] = 4
    versions: dict[str, str]
    source: Annotated[TimmSource | OwnSource, Field(discriminator="kind")]
    conversion: Conversion
    dtype: str
    shared: dict[str, str] = {}
    weights: FileRecord
    original: FileRecord | None = None
    original_shared: dict[str, str] = {}
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

    Args:
        model: A model that ``convert`` returned, with all its parameters and buffers; of one in an ``nn.DataParallel``
            what that wraps is saved.
        path: The folder; made if need be.
        source: What timm builds the unconverted model from: a name, or a name and arguments. None finds it out for
            timm models; a model that timm does not rebuild exactly is recorded as the user's own, for :func:`restore`.
        report: JSON to keep beside the model as ``report.json``.
        original: The model before conversion, whose weights are kept too, for :func:`load_original`: recipes that
            distil learn from it.

    Raises:
        UsageError: The model has no weights (meta device), or timm does not build it from ``source``.
        ArtifactError: The path is a file, or cannot be written; or files that an artifact there does not account for
            are in the way: nothing but what an earlier ``save`` wrote is replaced.
        DDFError: Writing failed.
    """
    model = bare(model)
    check_initialised(model)
    check_writable(path)
    state_of(model)  # only tensors can be saved
    tensors, shared = _unique(model.state_dict())
    originals, original_shared = _unique(bare(original).state_dict()) if original is not None else ({}, {})
    conversion = recorded(model) or Conversion(source=describe(model))
    origin = _source(model, conversion, source)
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
            weights=FileRecord.of(stage / WEIGHTS),
            original=None if original is None else FileRecord.of(stage / ORIGINAL),
            original_shared=original_shared,
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
            f"{folder} holds a model of your own ({manifest.source.model_class}), which only you can build;"
            " use ddf_convert.restore(fresh_model, folder)"
        )
    return _load(folder, manifest).eval().to(device)


def restore(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Converts a fresh model as a folder records, and loads its weights, in place.

    The model takes the dtype of the saved weights and keeps its device and training mode. If anything fails, the model
    is as it was: its modules, values, hooks and attributes.

    Args:
        model: The unconverted model, built as the one that was converted and saved.
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
        if any(tensor.device.type == "meta" for tensor in inner.state_dict().values()):
            raise UsageError("the model is on the meta device and can hold no weights; build it on a real device")
        _check_fits(meta_copy(inner), describe(inner), manifest, header)
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
        difference = _difference(model, header)
        if difference:
            raise UsageError(f"the original's weights do not fit {describe(model)}: {difference}")
        tensors = _tensors(weights, manifest.original_shared)
        with unchanged_on_failure(model):
            _take(model, tensors)
    return model.eval()


def build_original(path: str | os.PathLike[str]) -> nn.Module:
    """The model that a folder's was before conversion, with fresh weights. Torch's random state stays as it is.

    Raises:
        ArtifactError: The folder is not an artifact, its model is the user's own, or timm no longer builds it.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if isinstance(manifest.source, OwnSource):
        raise ArtifactError(
            f"{path} holds a model of your own ({manifest.source.model_class}), which only you can build: give it"
        )
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
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(f"{file} is damaged: {in_one_line(error)}") from error


# --- filling a model from a folder ---


def _load(folder: Path, manifest: Manifest) -> nn.Module:
    """The model of an artifact that timm can build; first on the meta device, where nothing costs memory."""
    assert isinstance(manifest.source, TimmSource)
    weights, header = _weights(folder, manifest)
    sketch = _built(folder, manifest.source, "meta", header)
    with _named(folder, sketch):
        _check_fits(meta_copy(sketch), describe(sketch), manifest, header)
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
        sketch = swap(sketch, prepare(sketch, manifest.conversion.replaced))
    if difference := _difference(sketch, header):
        versions = ", ".join(f"{package} {version}" for package, version in manifest.versions.items())
        raise UsageError(f"the weights do not fit {name}: {difference}; they were written with {versions}")


def _difference(model: nn.Module, header: Header) -> str:
    """What of a model's state the weights cannot be taken for, in one line; empty if all is right."""
    return describe_difference(state_of(model), header.shapes) or header.unfit_dtypes(model.state_dict())


def _filled(model: nn.Module, manifest: Manifest, tensors: dict[str, Tensor]) -> nn.Module:
    """Converts a model and gives it weights, in place."""
    model = swap(model, prepare(model, manifest.conversion.replaced))
    _take(model, tensors)
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
        raise ArtifactError(f"{folder}: what it records cannot be done to {describe(model)}: {words}") from error


def _built(folder: Path, source: TimmSource, device: str, header: Header) -> nn.Module:
    """A fresh model from timm, if it is no larger than the weights account for."""
    try:
        check_arguments(source.kwargs, header)
        with in_proportion(header):
            return _built_by_timm(source, device)
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


def _take(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Loads weights that fit, with their dtypes."""
    _take_dtypes(model, tensors)
    model.load_state_dict(tensors)


def _take_dtypes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters and buffers the dtypes of the saved tensors, which ``load_state_dict`` would cast away."""
    for name, own in model.state_dict(keep_vars=True).items():
        if own.dtype != tensors[name].dtype:
            own.data = own.data.to(tensors[name].dtype)


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


def _source(model: nn.Module, conversion: Conversion, asked: TimmSource | str | None) -> TimmSource | OwnSource:
    """The source to record: the one asked for, which must be right, or the one that timm's own record leads to."""
    name = describe(model) if asked is None else asked
    guesses = [name] if isinstance(name, TimmSource) else _guesses(model, name)
    reason = f"timm has no model {name!r}"
    for guess in guesses:
        mismatch = _mismatch(model, conversion, guess)
        if mismatch is None:
            return guess
        reason = mismatch
    if asked is not None:
        named = asked.name if isinstance(asked, TimmSource) else asked
        raise UsageError(f"the model cannot be saved as timm's {named}: {reason}")
    # A GraphModule is a class of its own each time: the name of what it was made of says more.
    graph = isinstance(model, fx.GraphModule)
    own = conversion.source if graph else f"{type(model).__module__}.{type(model).__qualname__}"
    return OwnSource.model_validate({"class": own})


def _guesses(model: nn.Module, name: str) -> list[TimmSource]:
    """The arguments that a timm model may have been built with, the most likely ones first."""
    if not timm.is_model(name):
        return []
    kwargs: dict[str, _Scalar | list[_Scalar]] = {}
    configuration = getattr(model, "pretrained_cfg", None) or {}
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != configuration.get("num_classes"):
        kwargs["num_classes"] = classes
    first = configuration.get("first_conv")
    modules = dict(model.named_modules())
    channels = getattr(modules.get(first), "in_channels", None) if isinstance(first, str) else None
    plain = TimmSource(name=name, kwargs=kwargs)
    if not isinstance(channels, int) or channels == 3:
        return [plain]
    # Either the image has so many channels, or the model folds pixels into channels before its first convolution.
    return [TimmSource(name=name, kwargs={**kwargs, "in_chans": channels}), plain]


def _mismatch(model: nn.Module, conversion: Conversion, source: TimmSource) -> str | None:
    """Why timm's model, converted, would not be this one; None if names, shapes and the printed trees agree."""
    try:
        built = _built_by_timm(source, "meta")
        built = swap(built, prepare(built, conversion.replaced))
    except UsageError as error:
        return str(error)
    difference = describe_difference(state_of(built), {name: tuple(t.shape) for name, t in model.state_dict().items()})
    if difference:
        return difference
    # The text of the tree shows activations, strides, dropout and the like, which no weight has.
    for mine, theirs in zip_longest(repr(model).splitlines(), repr(built).splitlines(), fillvalue="nothing"):
        if mine != theirs:
            return f"it has {mine.strip()} where timm builds {theirs.strip()}"
    return None


def _built_by_timm(source: TimmSource, device: str) -> nn.Module:
    """A fresh model from timm; nothing is downloaded or read, and torch's random state stays as it is."""
    if not timm.is_model(source.name):
        raise UsageError(f"timm {timm.__version__} has no model {source.name!r}")
    reading = [name for name in source.kwargs if name in _READING]
    if reading:
        raise UsageError(f"{reading[0]} is not an argument that an artifact may give to timm")
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            arguments: dict[str, Any] = dict(source.kwargs)
            return timm.create_model(source.name, pretrained=False, **arguments)
    except UsageError:  # it becomes too large, on any device
        raise
    except Exception as error:
        if device == "meta":  # some models look at values while they are built
            return _built_by_timm(source, "cpu")
        raise UsageError(f"timm {timm.__version__} cannot build {source.name}: {first_line(error)}") from error
