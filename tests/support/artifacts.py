"""Models for the tests of artifacts, and comparisons of their states."""

import json
from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn

from ddf_convert.artifacts import atomic
from ddf_convert.conversion import convert

IMAGE = torch.empty(1, 3, 64, 64)
SMALL = "resnet10t"


def shaken(model):
    """Every parameter and buffer moved off its initial value, batch norm statistics included."""
    generator = torch.Generator().manual_seed(7)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor) * 0.1)
        else:
            tensor.add_(3)
    return model.eval()


def converted(name=SMALL, **options):
    torch.manual_seed(0)
    return shaken(convert(timm.create_model(name, **{"num_classes": 5, **options}), example_input=IMAGE))


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


def tiny(value: float = 1.0) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 2, 1))
    nn.init.constant_(model[0].weight, value)
    return model


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def edit_manifest(edit):
    """Returns what edits the manifest of a folder; ``edit`` gets its content."""

    def change(path):
        content = json.loads((path / "manifest.json").read_text())
        edit(content)
        (path / "manifest.json").write_text(json.dumps(content))

    return change


def edit(**changes):
    return edit_manifest(lambda content: content.update(changes))


def recast(name, dtype):
    """One tensor of the weights in another dtype, under a manifest that vouches for the file."""

    def change(path):
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        tensors[name] = tensors[name].to(dtype)
        safetensors.torch.save_file(tensors, path / "model.safetensors")
        edit(weights=atomic.FileRecord.of(path / "model.safetensors").model_dump())(path)

    return change
