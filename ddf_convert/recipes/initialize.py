"""Initialization of new layers: random (paper), from the old weights (preserve), or fitted on images (calibrate)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.recipes.calibrate import BatchNormCalibrator, fit_layer
from ddf_convert.recipes.pairs import ConvPair, Pair, find_pairs
from ddf_convert.recipes.parameters import new_layers
from ddf_convert.recipes.schema import Initialize, Method
from ddf_convert.utils.modules import bare, evaluating


class InitializedLayer(BaseModel):
    """How well one new layer reproduces the convolution or upsampling that it replaced."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Path of the convolution or upsampling in the original.")
    kind: str = Field(description='Its kind, such as "dense 3x3".')
    weight_error: float = Field(
        description="Norm of the difference between the old weights and the preserved ones, over the norm of the old"
        " ones: 0 keeps all, 1 next to nothing. For upsampling, of the linear maps."
    )
    output_error: float | None = Field(
        default=None,
        description="Relative root mean squared error of the layer's outputs on the images before its fit, with all"
        " layers before it fitted; None without a fit.",
    )
    fitted_error: float | None = Field(default=None, description="The same after its fit.")


class Initialized(BaseModel):
    """The result of an initialization."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = Field(description="The method.")
    layers: tuple[InitializedLayer, ...] = Field(default=(), description='Every new layer; empty for "paper".')
    images: int = Field(default=0, description="Number of images that layers were fitted on.")


def initialize(
    model: nn.Module,
    settings: Initialize,
    original: nn.Module | None = None,
    images: Iterable[Any] | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Initialized:
    """Initializes the new layers of a converted model in place: see ``Recipe.initialize``.

    Of other modules only the statistics of batch norms change. After a UsageError the model is unchanged.
    """
    if settings.method == "paper":
        for new in new_layers(model).values():
            for module in new.modules():
                if module is not new and hasattr(module, "reset_parameters"):
                    cast(Any, module).reset_parameters()
        return Initialized(method="paper")
    if original is None:
        raise UsageError(f"{settings.method!r} starts from the old weights: give the original model too")
    pairs = find_pairs(model, original)
    if settings.keep_frozen:
        _freeze(pairs)
    if settings.method == "preserve":
        return Initialized(method="preserve", layers=tuple(_preserve(pair) for pair in pairs))
    if images is None:
        raise UsageError("'calibrate' looks at images: give some, or initialize with 'preserve'")
    model, original = bare(model), bare(original)
    batches = _batches(images, settings.num_images, next(model.parameters()))
    layers = []
    with evaluating(model, original):
        preserved = [_preserve(pair) for pair in pairs]
        norms = BatchNormCalibrator(model, original)
        for number, (pair, layer) in enumerate(zip(pairs, preserved, strict=True), 1):
            if not isinstance(pair, ConvPair) or pair.functional:  # these stay preserved
                layers.append(layer)
                continue
            say(f"Fitting {pair.name} ({number} of {len(pairs)})")
            if settings.batch_norm:
                norms.calibrate(batches, pair.layer, pair.conv)
            errors = fit_layer(model, original, pair, batches, settings)
            if not math.isfinite(errors.after):
                raise DDFError(f"{pair.name} could not be fitted: its outputs are not finite; look at the images")
            layers.append(layer.model_copy(update={"output_error": errors.before, "fitted_error": errors.after}))
        if settings.batch_norm:
            norms.calibrate(batches)
    return Initialized(method="calibrate", layers=tuple(layers), images=sum(map(len, batches)))


def _freeze(pairs: Iterable[Pair]) -> None:
    """Freezes the layers that take over frozen weights; the bias follows the old bias."""
    for pair in pairs:
        if pair.conv is None:
            continue
        pair.layer.requires_grad_(pair.conv.weight.requires_grad)
        if pair.conv.bias is not None and pair.layer.bias is not None:
            pair.layer.bias.requires_grad_(pair.conv.bias.requires_grad)


def _preserve(pair: Pair) -> InitializedLayer:
    return InitializedLayer(name=pair.name, kind=pair.kind, weight_error=pair.preserve())


def _batches(images: Iterable[Any], limit: int, like: Tensor) -> list[Tensor]:
    """The first images, with the device and dtype of ``like``."""
    batches: list[Tensor] = []
    for item in images:
        batch = item[0] if isinstance(item, tuple | list) else item
        if not isinstance(batch, Tensor) or batch.ndim != 4:
            raise UsageError(f"images should come as batches (B, C, H, W), and not as {type(batch).__name__}")
        batches.append(batch[: limit - sum(map(len, batches))].to(like.device, like.dtype))
        if sum(map(len, batches)) >= limit:
            break
    if not batches:
        raise UsageError("there are no images to calibrate on")
    return batches
