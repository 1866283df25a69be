"""A model before and after its conversion: images a second, in inference and in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ddf_convert.bench.measure import (
    DTYPES,
    LAYOUTS,
    BenchSettings,
    Progress,
    convolution_settings,
    keep_freed_memory,
    no_progress,
    peak_mib,
)
from ddf_convert.conversion import Plan, convert
from ddf_convert.cost.timing import median_ms
from ddf_convert.errors import DDFError, first_line

BATCH = {"cuda": 64, "cpu": 4}


@dataclass(frozen=True, kw_only=True)
class ModelSettings(BenchSettings):
    """How to run the models. ``dtype`` is the model's in inference and autocast's in training.

    Attributes:
        input_size: (C, H, W) of an image.
        layout: A key of ``LAYOUTS``.
        tf32: Whether float32 products may be TF32 on a GPU.
    """

    input_size: tuple[int, int, int]
    layout: str
    tf32: bool


def run(
    name: str, model: nn.Module, plan: Plan, settings: ModelSettings, progress: Progress = no_progress
) -> dict[str, Any]:
    """Measures a model before and after its conversion.

    Args:
        name: Name of the model.
        model: The model; it is moved, trained a few steps and converted to the dtype.
        plan: What to convert.
        settings: How to run both models.
        progress: Receives what is measured next.

    Returns:
        ``results["before"]`` and ``["after"]`` are the figures of :func:`throughput`, with ``parameters`` and, of one
        image, ``macs``; beside them, the settings.

    Raises:
        DDFError: The model does not run with these settings, or does not fit the memory.
    """
    results = {}
    pairs = (("before", model, plan.before), ("after", convert(model, plan), plan.after))
    for when, version, cost in pairs:
        progress(f"Measuring {name} {when} conversion")
        try:
            figures = throughput(version, settings)
        except torch.OutOfMemoryError as error:
            raise DDFError(f"{name} {when} conversion: out of memory; give a smaller --batch") from error
        except (RuntimeError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            shape = "x".join(map(str, (settings.batch, *settings.input_size)))
            raise DDFError(
                f"{name} {when} conversion does not run on an input of {shape} ({reason});"
                " try another --batch or --input-size"
            ) from error
        finally:
            version.cpu()
        results[when] = {**figures, "parameters": cost.params, "macs": cost.macs}
    return settings.document("model", model=name, settings=settings.to_dict(), results=results)


def throughput(model: nn.Module, settings: ModelSettings) -> dict[str, float | None]:
    """Measures the images a second of one model, as a program sees them: the host's time is not hidden.

    A step of training is a forward pass, a loss, a backward pass and a step of SGD with momentum. The model is moved to
    the device, trained a few steps, and converted to the dtype.

    Returns:
        ``inference_images_per_s``, ``training_images_per_s``, and ``inference_mib`` and ``training_mib``: memory at
        the peak beyond weights, gradients and momenta.
    """
    device, dtype, layout = settings.device, DTYPES[settings.dtype], LAYOUTS[settings.layout]
    torch.manual_seed(0)
    model.to(device=device, dtype=torch.float32, memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(settings.batch, *settings.input_size, device=device).to(memory_format=layout)
    with keep_freed_memory(), convolution_settings(settings.tf32):
        model.train()
        train = _training_step(model, images, lambda: torch.autocast(device.type, dtype, dtype != torch.float32))
        for _ in range(2):  # the first step allocates the momenta
            train()
        training_ms = median_ms(train, device, settings.seconds, hide_host=False)
        training_mib = peak_mib(train, device)

        for parameter in model.parameters():
            parameter.grad = None
        model.eval().to(dtype)
        images = images.to(dtype)

        def infer() -> Any:
            with torch.inference_mode():
                return model(images)

        infer()
        inference_ms = median_ms(infer, device, settings.seconds, hide_host=False)
        inference_mib = peak_mib(infer, device)
    return {
        "inference_images_per_s": settings.batch / inference_ms * 1e3,
        "training_images_per_s": settings.batch / training_ms * 1e3,
        "inference_mib": inference_mib,
        "training_mib": training_mib,
    }


def _training_step(
    model: nn.Module, images: Tensor, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[], None]:
    # Small enough that the weights stay finite, whatever the model: speed must not depend on infinities.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            outputs = model(images)
        # The model may return anything: a classifier's scores, or the maps of a detector.
        tensors = [leaf for leaf in _pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        torch.stack([tensor.float().square().mean() for tensor in tensors]).sum().backward()
        optimizer.step()

    return step
