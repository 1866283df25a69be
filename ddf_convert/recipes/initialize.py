"""What new layers start from: chance (paper), the old weights (preserve), or those fitted on images (calibrate)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.recipes.batch_norm import BatchNorms
from ddf_convert.recipes.calibrate import calibrate
from ddf_convert.recipes.factors import best_for_weights
from ddf_convert.recipes.pairs import Pair, pairs
from ddf_convert.recipes.parameters import new_layers
from ddf_convert.recipes.schema import Initialize, Method
from ddf_convert.recipes.upsampling import UpPair
from ddf_convert.utils.modules import bare, evaluating


class InitializedLayer(BaseModel):
    """One layer, and what of the old convolution it could not keep.

    Attributes:
        name: Of the convolution.
        kind: Of the convolution.
        weight_error: Norm of the difference between the old weights and those that the layer started with, over that
            of the old weights: 0 is all kept, 1 as good as nothing. Of an interpolation that is the linear map (see
            ``upsampling.alignment_error``).
        output_error: Root of the mean squared difference between the layer's outputs and the convolution's, over that
            of the convolution's, on the images, once preserved and with all layers before it fitted; None without
            images, and for upsampling.
        fitted_error: The same at the end of the fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    weight_error: float
    output_error: float | None = None
    fitted_error: float | None = None


class Initialized(BaseModel):
    """What was done.

    Attributes:
        method: How.
        layers: Every layer; empty for "paper", which keeps nothing.
        images: How many were looked at.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    layers: tuple[InitializedLayer, ...] = ()
    images: int = 0


def initialize(
    model: nn.Module,
    settings: Initialize,
    original: nn.Module | None = None,
    images: Iterable[Any] | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Initialized:
    """Initializes the DDF layers of a converted model, in place; nothing else changes but batch norms' statistics.

    Args:
        model: The converted model.
        settings: The method, and how much of it.
        original: The model before conversion; not needed for "paper". It stays as it is.
        images: Batches (B, C, H, W), or tuples that begin with one, prepared as for evaluation; for "calibrate".
        say: Told what is being done.

    Raises:
        UsageError: What the method needs is missing, or the original is another model. The model is then as it was.
        DDFError: The fit gave numbers that are not finite.
    """
    if settings.method == "paper":
        for new in new_layers(model).values():
            for module in new.modules():
                if module is not new and hasattr(module, "reset_parameters"):
                    cast(Any, module).reset_parameters()
        return Initialized(method="paper")
    if original is None:
        raise UsageError(f"{settings.method!r} starts from the old weights: give the original model too")
    found = pairs(model, original)
    if settings.keep_frozen:
        _freeze(found)
    if settings.method == "preserve":
        return Initialized(method="preserve", layers=tuple(_preserve(pair) for pair in found))
    if images is None:
        raise UsageError("'calibrate' looks at images: give some, or initialize with 'preserve'")
    model, original = bare(model), bare(original)
    batches = _batches(images, settings.num_images, next(model.parameters()))
    layers = []
    with evaluating(model, original):
        preserved = [_preserve(pair) for pair in found]
        norms = BatchNorms(model, original)
        for number, (pair, layer) in enumerate(zip(found, preserved, strict=True), 1):
            if isinstance(pair, UpPair) or pair.functional:  # these are as they were preserved
                layers.append(layer)
                continue
            say(f"Fitting {pair.name} ({number} of {len(found)})")
            if settings.batch_norm:
                norms.adjust(batches, pair.layer, pair.conv)
            fitted = calibrate(model, original, pair, batches, settings)
            if not math.isfinite(fitted.after):
                raise DDFError(f"{pair.name} could not be fitted: its outputs are not finite; look at the images")
            layers.append(layer.model_copy(update={"output_error": fitted.before, "fitted_error": fitted.after}))
        if settings.batch_norm:
            norms.adjust(batches)
    return Initialized(method="calibrate", layers=tuple(layers), images=sum(map(len, batches)))


def _freeze(found: Iterable[Pair | UpPair]) -> None:
    """Freezes the layers that take over frozen weights; the bias follows the old bias."""
    for pair in found:
        if pair.conv is None:
            continue
        pair.layer.requires_grad_(pair.conv.weight.requires_grad)
        if pair.conv.bias is not None and pair.layer.bias is not None:
            pair.layer.bias.requires_grad_(pair.conv.bias.requires_grad)


def _preserve(pair: Pair | UpPair) -> InitializedLayer:
    if isinstance(pair, UpPair):
        return InitializedLayer(name=pair.name, kind=pair.kind, weight_error=pair.preserve())
    weight = pair.weight()
    factors = best_for_weights(weight, pair.mix is not None)
    pair.take(factors, pair.conv.bias)
    error = (factors.product() - weight).norm() / weight.norm().clamp_min(1e-30)
    return InitializedLayer(name=pair.name, kind=pair.kind, weight_error=error.item())


def _batches(images: Iterable[Any], limit: int, like: Tensor) -> list[Tensor]:
    """The first images, where the model is."""
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
