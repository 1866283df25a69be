"""The MODEL of the command line: a timm name, a converted folder, or ``package.module:callable``."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from ddf_convert.errors import ArtifactError, DDFError, UsageError, first_line
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.imports import call, find_callable
from ddf_convert.utils.modules import bare

if TYPE_CHECKING:
    from ddf_convert.artifacts.artifact import TimmSource

INPUT_SIZE = (3, 224, 224)
_FILES = re.compile(r"pretrained|checkpoint_path$|cache_dir$")  # arguments of timm that name files
_REMOTE = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's words for models that are configured by files of others


@dataclass(frozen=True)
class Opened:
    """A model, and how it was asked for.

    Attributes:
        name: What the user called it, with the arguments that timm was given.
        model: In evaluation mode; on the meta device if weights were not asked for and it could be built there.
        input_size: (C, H, W) that it expects.
        example_input: What to call it with, if whoever built it said so.
        source: What timm built it from, if arguments were given.
    """

    name: str
    model: nn.Module
    input_size: tuple[int, int, int]
    example_input: ExampleInput | None = None
    source: TimmSource | None = None


def open_model(
    name: str, weights: bool = False, pretrained: bool = False, arguments: Mapping[str, Any] | None = None
) -> Opened:
    """Finds and builds a model.

    Args:
        name: A timm name, a folder written by ``save``, or ``package.module:callable``, which returns the model, or the
            model and an example input.
        weights: Whether the weights matter; without, timm models are built on the meta device where possible.
        pretrained: Download timm's weights.
        arguments: Further ones of ``timm.create_model``, such as num_classes and in_chans, of types that JSON has.

    Raises:
        UsageError: There is no such model, it cannot be built, or it is not timm's and arguments were given.
        ArtifactError: The folder is not a whole artifact.
        DDFError: The weights could not be downloaded.
    """
    if arguments and (":" in name or os.sep in name or Path(name, "manifest.json").exists()):
        raise UsageError(
            f"--num-classes, --in-chans and --model-kwargs are arguments of timm's models, and {name} is not one"
        )
    # Whatever a model prints while it is built must not get between the lines of --json.
    with contextlib.redirect_stdout(sys.stderr):
        if os.path.isdir(name) and (Path(name, "manifest.json").exists() or not timm.is_model(name)):
            opened = _from_folder(name)
        elif not timm.is_model(name) and (meant := _meant(name)) is not None:
            spelled = (
                "have no 'timm/' in front" if "timm" in name.lower().removesuffix(meant) else "are written exactly"
            )
            raise UsageError(f"{name!r} is no model: timm names {spelled}: {meant}")
        elif name.startswith(_REMOTE):
            raise UsageError(
                f"{name}: models of a hub are not opened; give the timm name, and its file with --checkpoint"
            )
        elif ":" in name:
            opened = _from_callable(name)
        elif os.sep in name:
            raise ArtifactError(f"{name}: no such folder")
        else:
            return _from_timm(name, weights, pretrained, dict(arguments or {}))
    if pretrained:
        raise UsageError(f"--pretrained is for timm models, and {name} is not one; use --checkpoint FILE")
    return opened


def _from_folder(folder: str) -> Opened:
    from ddf_convert.artifacts import artifact

    model = artifact.load(folder).eval()
    kwargs = getattr(artifact.read_manifest(folder).source, "kwargs", {})
    return Opened(folder, model, _input_size(model, kwargs))


def _from_timm(name: str, weights: bool, pretrained: bool, arguments: dict[str, Any]) -> Opened:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "give a timm name, a converted folder or module:callable"
        )
        raise UsageError(f"unknown model {name!r}: {hint}")
    _check_tag(name)
    if pretrained and not timm.is_model_pretrained(name):
        raise UsageError(f"{name} has no pretrained weights; use --checkpoint FILE, or leave --pretrained out")
    source = _source(name, arguments) if arguments else None
    kwargs: dict[str, Any] = dict(source.kwargs) if source else {}
    if pretrained:
        if kwargs:  # so that what is wrong with them is not taken for a failed download
            _built_by_timm(name, "meta", kwargs)
        try:
            model = timm.create_model(name, pretrained=True, **kwargs)
        except DDFError:
            raise
        except Exception as error:
            raise DDFError(
                f"could not get the pretrained weights of {name} ({first_line(error).partition('. ')[0]});"
                " check the network, or give a file with --checkpoint"
            ) from error
    else:
        model = _built_by_timm(name, "cpu" if weights else "meta", kwargs)
    if not isinstance(model, nn.Module):
        raise UsageError(f"timm's {name} with these arguments is {type(model).__name__}, not a torch.nn.Module")
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return Opened(f"{name}({given})" if given else name, model.eval(), _input_size(model, kwargs), source=source)


def _meant(name: str) -> str | None:
    """The timm name in a name that is written as a hub writes it, or with other capitals, spaces or a slash."""
    bare = name.strip().lower().rstrip("/")
    for prefix in (*_REMOTE, "timm/", "timm:"):
        bare = bare.removeprefix(prefix)
    return bare if bare != name and timm.is_model(bare) else None


def _check_tag(name: str) -> None:
    """Raises unless timm knows the name's part behind the dot, which says how weights were trained."""
    architecture, _, tag = name.partition(".")
    if not tag:
        return
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_pretrained(f"{architecture}.*")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"{architecture} has no pretrained tag {tag!r}: {hint}known are {', '.join(known) or 'none'}"
        ) from error


def _source(name: str, arguments: dict[str, Any]) -> TimmSource:
    """The record of a model that timm builds with arguments; their values are what they are once read from JSON.

    Raises:
        UsageError: One names a file, or JSON cannot hold its value.
    """
    from ddf_convert.artifacts.artifact import TimmSource

    reading = next(filter(_FILES.match, arguments), None)
    if reading:
        raise UsageError(
            f"--model-kwargs {reading}: arguments do not read files; use --pretrained or --checkpoint FILE"
        )
    kwargs = {}
    for key, value in arguments.items():
        try:
            kwargs[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UsageError(f"--model-kwargs {key}={value!r}: cannot be saved as JSON: {first_line(error)}") from error
    try:
        return TimmSource(name=name, kwargs=kwargs)
    except ValueError as error:
        raise UsageError("--model-kwargs: a value is not a number, a text, True, False or a list of those") from error


def _built_by_timm(name: str, device: str, kwargs: dict[str, Any]) -> nn.Module:
    try:
        with torch.device(device):
            return timm.create_model(name, pretrained=False, **kwargs)
    except DDFError:
        raise
    except Exception as error:
        if device == "meta":  # some models look at values while they are built
            return _built_by_timm(name, "cpu", kwargs)
        reason = f"it knows no {error}" if isinstance(error, KeyError) else first_line(error)
        hint = _nearest_argument(name, error) if kwargs else ""
        raise UsageError(f"timm cannot build {name}: {reason}{hint}") from error


def _nearest_argument(name: str, error: Exception) -> str:
    """The arguments that a model of timm takes and that are spelt nearly like one that it refused."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if not unknown:
        return ""
    try:
        with torch.device("meta"):
            known = inspect.signature(type(timm.create_model(name, pretrained=False))).parameters
    except Exception:  # the hint is not worth an error
        return ""
    near = difflib.get_close_matches(unknown[1], [*known, "features_only", "out_indices"], n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def built_by(name: str) -> tuple[nn.Module, ExampleInput | None]:
    """The model that a user's function returns, and the example input, if it returns one beside it.

    Args:
        name: ``package.module:callable``.

    Raises:
        UsageError: There is no such callable, it fails, or it returns something else.
    """
    found = find_callable(name, "a model")
    if isinstance(found, nn.Module):
        raise UsageError(f"{name} is a model, not a callable that returns one; write a function that builds it")
    model = call(name, found)
    example = None
    if isinstance(model, tuple) and len(model) == 2:
        model, example = model
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() returned {type(model).__name__}, not a torch.nn.Module")
    return model, example


def _from_callable(name: str) -> Opened:
    model, example = built_by(name)
    model = bare(model)
    return Opened(name, model.eval(), _input_size(model), example)


def _input_size(model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """The size that timm gives for the model, or ImageNet's, unless the model was built for another one."""
    configuration = getattr(model, "pretrained_cfg", None)
    size = configuration.get("input_size") if configuration and hasattr(configuration, "get") else None
    channels, *sides = size or INPUT_SIZE
    kwargs = kwargs or {}
    image = kwargs.get("img_size") or sides
    height, width = image if isinstance(image, list | tuple) else (image, image)
    return kwargs.get("in_chans") or channels, height, width


@dataclass(frozen=True)
class ConvertedFolder:
    """A folder with a converted model, and how to build the model before conversion.

    Attributes:
        folder: As ``ddf_convert.save`` wrote it.
        callable: ``package.module:callable`` that builds the model before conversion, if that is the user's own.
    """

    folder: Path
    callable: str | None = None

    def converted(self) -> nn.Module:
        """Returns the converted model with its weights, on the CPU.

        Raises:
            UsageError: It is the user's own, and ``callable`` is None; or the callable fails.
            ArtifactError: The folder is not a whole artifact, or holds another model.
        """
        from ddf_convert.artifacts import artifact

        manifest = artifact.read_manifest(self.folder)
        if self.callable is not None:
            return artifact.restore(self._built(), self.folder)
        if isinstance(manifest.source, artifact.OwnSource):
            raise UsageError(
                f"{self.folder} holds a model of your own ({manifest.source.model_class}): say how to build it"
                " before conversion, with --model package.module:callable"
            )
        return artifact.load(self.folder)

    def original(self, checkpoint: Path | None = None) -> nn.Module | None:
        """Returns the model before conversion, in evaluation mode; None if its weights are nowhere.

        Args:
            checkpoint: Its weights, instead of those that the folder keeps.

        Raises:
            UsageError: The checkpoint does not fit.
            ArtifactError: The folder is not a whole artifact.
        """
        from ddf_convert.artifacts import artifact

        manifest = artifact.read_manifest(self.folder)
        if checkpoint is None:
            if manifest.original is None:
                return None
            return artifact.load_original(self.folder, self._built() if self.callable is not None else None)
        if self.callable is None and isinstance(manifest.source, artifact.OwnSource):
            raise UsageError(f"{self.folder} holds a model of your own: --teacher-checkpoint needs --model too")
        model = artifact.build_original(self.folder) if self.callable is None else self._built()
        artifact.load_checkpoint(model, checkpoint)
        return model.eval()

    def _built(self) -> nn.Module:
        with contextlib.redirect_stdout(sys.stderr):
            return built_by(self.callable or "")[0]
