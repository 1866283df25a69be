"""Opens the MODEL of the command line: a timm name, a converted folder, or ``package.module:callable``."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ddf_convert.artifacts import artifact
from ddf_convert.artifacts.provenance import FILE_ARGUMENTS, OwnSource, TimmSource, build_timm_model, is_json
from ddf_convert.errors import ArtifactError, DDFError, UsageError, first_line
from ddf_convert.utils.example_input import ExampleInput
from ddf_convert.utils.imports import call, find_callable
from ddf_convert.utils.modules import bare

_IMAGENET_SIZE = (3, 224, 224)
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")  # timm's, for models that are configured by files of others


@dataclass(frozen=True)
class OpenedModel:
    """A model as the command line named it.

    Attributes:
        name: The name that the user gave, with the arguments that timm was given.
        model: In evaluation mode; on the meta device if weights were not requested and it could be built there.
        input_size: (C, H, W) that it expects.
        example_input: Given by the user's callable, if it returned one.
        source: What timm built it from, if arguments were given.
    """

    name: str
    model: nn.Module
    input_size: tuple[int, int, int]
    example_input: ExampleInput | None = None
    source: TimmSource | None = None

    def make_example(self, input_size: tuple[int, int, int] | None = None, real: bool = False) -> ExampleInput:
        """Returns the example input: the callable's unless a size (C, H, W) is given, or one image.

        The image is on the meta device, or has random values in the dtype of the model if ``real``.
        """
        if input_size is None and self.example_input is not None:
            return self.example_input
        size = input_size or self.input_size
        if min(size) < 1:
            raise UsageError(f"--input-size {' '.join(map(str, size))}: every number must be at least 1")
        if not real:
            return torch.empty(1, *size, device="meta")
        first = next((each for each in self.model.parameters() if each.is_floating_point()), torch.empty(0))
        return torch.randn(1, *size, generator=torch.Generator().manual_seed(0)).to(first.dtype)


def open_model(
    name: str, weights: bool = False, pretrained: bool = False, arguments: Mapping[str, Any] | None = None
) -> OpenedModel:
    """Finds and builds a model.

    Args:
        name: A timm name, a folder written by ``save``, or ``package.module:callable``, which returns the model, or the
            model and an example input.
        weights: Whether weights are needed; if not, timm models are built on the meta device where possible.
        pretrained: Download timm's weights.
        arguments: Further arguments of ``timm.create_model``, of types that JSON has.
    """
    if arguments and (":" in name or os.sep in name or Path(name, "manifest.json").exists()):
        raise UsageError(
            f"--num-classes, --in-chans and --model-kwargs are arguments of timm's models, and {name} is not one"
        )
    # What a model prints while it is built must not mix with the output of --json.
    with contextlib.redirect_stdout(sys.stderr):
        if os.path.isdir(name) and (Path(name, "manifest.json").exists() or not timm.is_model(name)):
            opened = _open_folder(name)
        elif not timm.is_model(name) and (meant := _timm_spelling(name)) is not None:
            spelled = (
                "have no 'timm/' in front" if "timm" in name.lower().removesuffix(meant) else "are written exactly"
            )
            raise UsageError(f"{name!r} is no model: timm names {spelled}: {meant}")
        elif name.startswith(_HUB_PREFIXES):
            raise UsageError(
                f"{name}: models of a hub are not opened; give the timm name, and its file with --checkpoint"
            )
        elif ":" in name:
            opened = _open_callable(name)
        elif os.sep in name:
            raise ArtifactError(f"{name}: no such folder")
        else:
            return _open_timm(name, weights, pretrained, dict(arguments or {}))
    if pretrained:
        raise UsageError(f"--pretrained is for timm models, and {name} is not one; use --checkpoint FILE")
    return opened


@dataclass(frozen=True)
class ConvertedFolder:
    """A folder written by ``save``, and what builds its model before conversion if that is the user's own.

    Attributes:
        folder: The folder.
        callable: ``package.module:callable`` that returns the model before conversion.
    """

    folder: Path
    callable: str | None = None

    def load(self) -> nn.Module:
        """Loads the converted model, on the CPU."""
        manifest = artifact.read_manifest(self.folder)
        if self.callable is not None:
            return artifact.restore(self._build(self.callable), self.folder)
        if isinstance(manifest.source, OwnSource):
            raise UsageError(
                f"{self.folder} holds a model of your own ({manifest.source.model_class}): say how to build it"
                " before conversion, with --model package.module:callable"
            )
        return artifact.load(self.folder)

    def load_original(self, checkpoint: Path | None = None) -> nn.Module | None:
        """Loads the model before conversion, with the weights of a checkpoint or those in the folder, if any."""
        manifest = artifact.read_manifest(self.folder)
        if checkpoint is None:
            if manifest.original is None:
                return None
            return artifact.load_original(self.folder, self._build(self.callable) if self.callable else None)
        if self.callable is None and isinstance(manifest.source, OwnSource):
            raise UsageError(f"{self.folder} holds a model of your own: --teacher-checkpoint needs --model too")
        model = self._build(self.callable) if self.callable else artifact.build_original(self.folder)
        artifact.load_checkpoint(model, checkpoint)
        return model.eval()

    def _build(self, name: str) -> nn.Module:
        with contextlib.redirect_stdout(sys.stderr):
            return _call_builder(name)[0]


def _open_folder(folder: str) -> OpenedModel:
    model = artifact.load(folder).eval()
    kwargs = getattr(artifact.read_manifest(folder).source, "kwargs", {})
    return OpenedModel(folder, model, _input_size(model, kwargs))


def _open_callable(name: str) -> OpenedModel:
    model, example = _call_builder(name)
    model = bare(model)
    return OpenedModel(name, model.eval(), _input_size(model), example)


def _call_builder(name: str) -> tuple[nn.Module, ExampleInput | None]:
    """Returns the model of ``package.module:callable``, and the example input if it returns one; raises UsageError."""
    builder = find_callable(name, "a model")
    if isinstance(builder, nn.Module):
        raise UsageError(f"{name} is a model, not a callable that returns one; write a function that builds it")
    model = call(name, builder)
    example = None
    if isinstance(model, tuple) and len(model) == 2:
        model, example = model
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}() returned {type(model).__name__}, not a torch.nn.Module")
    return model, example


def _open_timm(name: str, weights: bool, pretrained: bool, arguments: dict[str, Any]) -> OpenedModel:
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else "give a timm name, a converted folder or module:callable"
        )
        raise UsageError(f"unknown model {name!r}: {hint}")
    _check_tag(name)
    if pretrained and not timm.is_model_pretrained(name):
        raise UsageError(f"{name} has no pretrained weights; use --checkpoint FILE, or leave --pretrained out")
    source = _timm_source(name, arguments) if arguments else None
    kwargs: dict[str, Any] = dict(source.kwargs) if source else {}
    if pretrained:
        if kwargs:  # so that wrong arguments are not reported as a failed download
            build_timm_model(name, kwargs, "meta")
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
        model = build_timm_model(name, kwargs, "cpu" if weights else "meta")
    if not isinstance(model, nn.Module):
        raise UsageError(f"timm's {name} with these arguments is {type(model).__name__}, not a torch.nn.Module")
    given = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return OpenedModel(f"{name}({given})" if given else name, model.eval(), _input_size(model, kwargs), source=source)


def _timm_spelling(name: str) -> str | None:
    """Returns the timm name in a name with a hub's prefix, other capitals, spaces or a slash."""
    spelling = name.strip().lower().rstrip("/")
    for prefix in (*_HUB_PREFIXES, "timm/", "timm:"):
        spelling = spelling.removeprefix(prefix)
    return spelling if spelling != name and timm.is_model(spelling) else None


def _check_tag(name: str) -> None:
    """Raises UsageError if timm does not know the tag behind the dot, which identifies pretrained weights."""
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


def _timm_source(name: str, arguments: dict[str, Any]) -> TimmSource:
    """Returns the record of a timm model with arguments; raises UsageError if one names a file, or is not JSON."""
    reading = next((argument for argument in arguments if argument in FILE_ARGUMENTS), None)
    if reading:
        raise UsageError(
            f"--model-kwargs {reading}: arguments do not read files; use --pretrained or --checkpoint FILE"
        )
    for argument, value in arguments.items():
        if not is_json(value):
            raise UsageError(
                f"--model-kwargs {argument}={value!r}: cannot be saved as JSON: give numbers, texts, True, False or"
                " lists of those"
            )
    return TimmSource(name, arguments)


def _input_size(model: nn.Module, kwargs: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """Returns (C, H, W): the arguments', timm's default for the model, or ImageNet's."""
    configuration = getattr(model, "pretrained_cfg", None)
    size = configuration.get("input_size") if configuration and hasattr(configuration, "get") else None
    channels, *sides = size or _IMAGENET_SIZE
    kwargs = kwargs or {}
    image = kwargs.get("img_size") or sides
    height, width = image if isinstance(image, list | tuple) else (image, image)
    return kwargs.get("in_chans") or channels, height, width
