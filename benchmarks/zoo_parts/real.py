"""What is checked with real numbers: a step of training, and the artifact, loaded in another process."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ddf_convert as ddf
from zoo_parts.catalogue import Architecture, build, example_inputs
from zoo_parts.forward import on_shapes, tensors
from zoo_parts.pool import Worker
from zoo_parts.record import WrongError, line_of, noting
from zoo_parts.shapes import EVERYTHING

SIZES = (64, 96, 128)  # tried before the model's own, which may be slow
SECONDS = 300  # for loading one model

_loader = Worker(daemon=True)


def check_real(architecture: Architecture) -> dict[str, Any]:
    """Trains one converted model for a step; saves it, and has another process load it and run it."""
    with line_of(architecture, "real") as line, noting(line, "build"):
        torch.manual_seed(0)
        model = build(architecture, "cpu")
        size = line["size"] = _size(architecture, model)
        image = example_inputs(architecture, model, size)
        with noting(line, "convert"):
            converted = ddf.convert(model, example_input=image, inplace=True, **EVERYTHING)
            line["replaced"] = len(converted.ddf_conversion.replaced)  # type: ignore[union-attr]
            with noting(line, "training"):
                _train(converted, example_inputs(architecture, model, size, batch=2))
            with noting(line, "artifact"), tempfile.TemporaryDirectory() as folder:
                _save(architecture, converted.eval(), image, Path(folder))
                difference = _loader.ask(SECONDS, load, architecture, folder)
                if difference:
                    raise WrongError(difference)
    return line


def _size(architecture: Architecture, model: nn.Module) -> int | None:
    """The smallest side of an image that the model takes; None for its own."""
    own = tensors(example_inputs(architecture, model))[0].shape[-1]
    for size in SIZES:
        with suppress(Exception):
            if size < own:
                on_shapes(model, example_inputs(architecture, model, size))
                return size
    return None


def _train(model: nn.Module, images: tuple[Any, ...]) -> None:
    """Forward and backward in training mode leave nothing that is not finite, and reach every new layer."""
    model.train()
    outputs = [tensor for tensor in tensors(model(*images)) if tensor.requires_grad]
    _finite({f"output {place}": tensor for place, tensor in enumerate(outputs)})
    torch.stack([tensor.square().mean() for tensor in outputs]).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    _finite(gradients)
    new = [tuple(f"{name}." for name in step.names) for step in model.ddf_conversion.replaced]  # type: ignore[union-attr]
    unreached = [names[0] for names in new if not any(key.startswith(names) for key in gradients)]
    if unreached:
        raise WrongError(f"{len(unreached)} of {len(new)} new layers got no gradient, such as {unreached[0]}*")


def _finite(values: dict[str, Tensor]) -> None:
    wrong = [name for name, value in values.items() if not value.isfinite().all()]
    if wrong:
        raise WrongError(f"{len(wrong)} of {len(values)} are not finite, such as {wrong[0]}")


@torch.no_grad()
def _save(architecture: Architecture, model: nn.Module, images: tuple[Any, ...], folder: Path) -> None:
    manifest = ddf.save(model, folder / "model")
    if architecture.library == "timm" and manifest.source.kind != "timm":
        raise WrongError("it was saved as a model of the user's own")
    torch.save((images, tensors(model(*images))), folder / "numbers.pt")


@torch.no_grad()
def load(architecture: Architecture, folder: str) -> str:
    """Loads a model in this process; what its outputs differ in from those that were saved, in words."""
    if architecture.library == "timm":
        model = ddf.load(Path(folder, "model"))
    else:
        model = ddf.restore(build(architecture, "cpu"), Path(folder, "model"))
    images, expected = torch.load(Path(folder, "numbers.pt"), weights_only=True)
    found = tensors(model(*images))
    if len(found) != len(expected):
        return f"{len(expected)} outputs became {len(found)}"
    wrong = [place for place, pair in enumerate(zip(expected, found, strict=True)) if not torch.equal(*pair)]
    return f"{len(wrong)} of {len(found)} outputs differ" if wrong else ""
