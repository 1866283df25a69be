"""The architectures of timm and torchvision: their names, how to build them, and what they take."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from architectures.forward import device_of

LIBRARIES = ("timm", "torchvision")
INPUT_SIZE = (3, 224, 224)

# Input shapes of torchvision's models, by how their file's name starts; the first that fits counts.
_TORCHVISION_SHAPES = {
    "torchvision.models.optical_flow": ((1, 3, 128, 128), (1, 3, 128, 128)),  # the least that RAFT takes
    "torchvision.models.video.mvit": ((1, 3, 16, 224, 224),),  # fixed by position embeddings
    "torchvision.models.video.s3d": ((1, 3, 16, 224, 224),),
    "torchvision.models.video": ((1, 3, 16, 112, 112),),
    "torchvision.models": ((1, *INPUT_SIZE),),
}


@dataclass(frozen=True)
class Architecture:
    """An architecture of a library.

    Attributes:
        library: "timm" or "torchvision"; in tests any other word, for a function of ``file`` without arguments.
        name: In the library's own list.
        file: The module that defines it, e.g. "timm.models.resnet".
    """

    library: str
    name: str
    file: str


def catalog() -> list[Architecture]:
    """Returns everything that timm and torchvision can build, sorted by file."""
    # Without the DDF-ResNets that ddf_convert registers in timm.
    ours = [name for name in timm.list_models() if not timm.model_entrypoint(name).__module__.startswith("ddf_convert")]
    found = [Architecture("timm", name, timm.model_entrypoint(name).__module__) for name in ours]
    for name in torchvision.models.list_models():
        found.append(Architecture("torchvision", name, torchvision.models.get_model_builder(name).__module__))
    return sorted(found, key=lambda architecture: (architecture.library, architecture.file, architecture.name))


def build(architecture: Architecture, device: str = "meta", **options: Any) -> nn.Module:
    """Builds a model in evaluation mode without pretrained weights; on the CPU if it cannot be built on meta."""
    try:
        with torch.device(device):
            return _build(architecture, options).eval()
    except Exception:
        if device == "cpu":
            raise
        return build(architecture, "cpu", **options)  # some models look at values while they are built


def _build(architecture: Architecture, options: dict[str, Any]) -> nn.Module:
    if architecture.library == "timm":
        return timm.create_model(architecture.name, pretrained=False, **options)
    if architecture.library == "torchvision":
        builder = torchvision.models.get_model_builder(architecture.name)
        weights = {"weights", "weights_backbone"} & inspect.signature(builder).parameters.keys()
        return builder(**dict.fromkeys(weights), **options)
    return getattr(importlib.import_module(architecture.file), architecture.name)(**options)


def example_inputs(architecture: Architecture, model: nn.Module, size: int | None = None, batch: int = 1) -> Any:
    """Returns random arguments for the model's forward, on its device.

    ``size`` is rows and columns, instead of those that the library gives; ``batch`` is the number of images.
    """
    device = device_of(model)
    shapes = _shapes(architecture, model)
    if size is not None:
        shapes = tuple((*shape[:-2], size, size) for shape in shapes)
    inputs = tuple(torch.rand((batch, *shape[1:]), device=device) for shape in shapes)
    if architecture.file.startswith("torchvision.models.detection"):
        return (list(inputs[0]),)  # images one by one, which may differ in size
    return inputs


def _shapes(architecture: Architecture, model: nn.Module) -> tuple[tuple[int, ...], ...]:
    if architecture.library == "torchvision":
        return next(s for file, s in _TORCHVISION_SHAPES.items() if architecture.file.startswith(file))
    configuration = getattr(model, "pretrained_cfg", None) or {}
    return ((1, *(configuration.get("input_size") or INPUT_SIZE)),)
