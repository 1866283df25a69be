"""Calibration: each new layer in turn is fitted to what the original's convolution puts out, on unlabelled images.

The layers before it have been fitted already, so it learns to make good what they could not keep. First comes the best
fixed filter, in closed form; then a few gradient steps of the whole layer, its dynamic parts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddf_convert.recipes.capture import input_of, output_of
from ddf_convert.recipes.factors import Moments, best_for_moments
from ddf_convert.recipes.losses import relative_error
from ddf_convert.recipes.pairs import Pair
from ddf_convert.recipes.schema import Initialize

_POSITIONS = 8  # for each unknown of a layer's second moments, at least; more is time without use
_KEPT = 2**29  # bytes of maps that are kept for the gradient steps


@dataclass(frozen=True)
class Fitted:
    """Relative errors of a layer's output against the convolution's, as roots of mean squares.

    Attributes:
        before: With the weights that it came with, behind layers that have been fitted.
        after: At the end.
    """

    before: float
    after: float


def calibrate(
    model: nn.Module, original: nn.Module, pair: Pair, images: Sequence[Tensor], settings: Initialize
) -> Fitted:
    """Fits one layer.

    Args:
        model: The converted model, in evaluation mode; the layer's parameters change.
        original: The model before conversion, in evaluation mode.
        pair: The layer and its convolution.
        images: Batches, (B, C, H, W), on the models' device.
        settings: Steps and learning rate.
    """
    observed = _Observed(pair, images)
    kept: list[tuple[Tensor, Tensor]] = []
    room = _KEPT
    for number, batch in enumerate(images):
        given = _batched(input_of(model, pair.layer, batch))
        wanted = _batched(output_of(original, pair.conv, batch))
        observed.add(given, wanted, number)
        room -= given.nbytes + wanted.nbytes
        if not kept or room > 0:
            kept.append((given, wanted))
    before = _error(pair.layer, kept)
    start = _state(pair.layer)
    factors = best_for_moments(observed.moments(), pair.weight(), pair.mix is not None)
    pair.take(factors, observed.bias(factors.product()))
    closed = _error(pair.layer, kept)
    if closed > before:  # too few images for so many unknowns
        pair.layer.load_state_dict(start)
        closed = before
    if settings.steps:
        start = _state(pair.layer)
        _descend(pair.layer, kept, settings)
        after = _error(pair.layer, kept)
        if after < closed:
            return Fitted(before, after)
        pair.layer.load_state_dict(start)
    return Fitted(before, closed)


def _batched(maps: Tensor) -> Tensor:
    """A single map, (C, H, W), as a batch of one."""
    return maps.unsqueeze(0) if maps.dim() == 3 else maps


class _Observed:
    """Gathers the moments of one layer, from a sample of positions of every image."""

    def __init__(self, pair: Pair, images: Sequence[Tensor]) -> None:
        self.pair = pair
        weight = pair.weight()
        self.groups, self.outputs, self.inputs, self.taps = weight.shape
        unknowns = self.inputs * self.taps
        count = sum(len(batch) for batch in images)
        self.each = max(32, _POSITIONS * unknowns // count + 1)  # positions of an image
        zeros = weight.new_zeros
        self.second = zeros(self.groups, unknowns, unknowns)
        self.cross = zeros(self.groups, self.outputs, unknowns)
        self.mean_input, self.mean_output = zeros(self.groups, unknowns), zeros(self.groups, self.outputs)
        self.count = 0

    def add(self, given: Tensor, wanted: Tensor, seed: int) -> None:
        """Looks at a batch: inputs (B, C, H, W) of the layer, outputs (B, C', Ho, Wo) of the convolution."""
        patches, outputs = sample(self.pair, given, wanted, self.each, seed)
        patches = patches.reshape(len(patches), self.groups, -1)
        outputs = outputs.reshape(len(outputs), self.groups, -1)
        self.second += torch.einsum("ngi,ngj->gij", patches, patches).double()
        self.cross += torch.einsum("ngo,ngi->goi", outputs, patches).double()
        self.mean_input += patches.double().sum(0)
        self.mean_output += outputs.double().sum(0)
        self.count += len(patches)

    def moments(self) -> Moments:
        """About zero; or about the means, where a bias can make those up."""
        second, cross = self.second / self.count, self.cross / self.count
        if self.pair.conv.bias is not None:
            mean_input, mean_output = self.mean_input / self.count, self.mean_output / self.count
            second = second - mean_input[:, :, None] * mean_input[:, None]
            cross = cross - mean_output[:, :, None] * mean_input[:, None]
        shape = (self.groups, self.inputs, self.taps, self.inputs, self.taps)
        cross = cross.view(self.groups, self.outputs, self.inputs, self.taps)
        return Moments(second.view(shape), cross, self.count)

    def bias(self, weight: Tensor) -> Tensor | None:
        """What makes the mean output right with a weight (G, O, I, T)."""
        if self.pair.conv.bias is None:
            return None
        made = torch.einsum("goi,gi->go", weight.flatten(2), self.mean_input / self.count)
        return (self.mean_output / self.count - made).flatten()


def sample(pair: Pair, given: Tensor, wanted: Tensor, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Input patches and outputs at random positions.

    Args:
        pair: Says which input pixels an output pixel looks at.
        given: Inputs, (B, C, H, W).
        wanted: Outputs, (B, C', Ho, Wo).
        each: Positions of an image; all of them if there are fewer.
        seed: Of the choice.

    Returns:
        (positions, C, K*K) patches, taps row by row, and (positions, C') outputs; float32, on the maps' device.
    """
    ddf = pair.ddf
    top, bottom, left, right = ddf.padding_of(given)
    mode = "constant" if ddf.padding_mode == "zeros" else ddf.padding_mode
    padded = F.pad(given.float(), (left, right, top, bottom), mode=mode)
    images, rows, columns = wanted.shape[0], wanted.shape[2], wanted.shape[3]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack(
        [torch.randperm(rows * columns, generator=generator)[: min(each, rows * columns)] for _ in range(images)]
    ).to(given.device)
    row, column = chosen // columns, chosen % columns  # (B, positions)
    reach = torch.arange(ddf.kernel_size[0], device=given.device) * ddf.dilation[0]
    image = torch.arange(images, device=given.device)[:, None]
    patches = padded.permute(0, 2, 3, 1)[
        image[..., None, None],
        (row * ddf.stride[0])[..., None, None] + reach[:, None],
        (column * ddf.stride[0])[..., None, None] + reach,
    ]  # (B, positions, K, K, C)
    outputs = wanted.float().permute(0, 2, 3, 1)[image, row, column]
    return patches.flatten(2, 3).transpose(2, 3).flatten(0, 1), outputs.flatten(0, 1)


def _descend(layer: nn.Module, kept: Sequence[tuple[Tensor, Tensor]], settings: Initialize) -> None:
    """Gradient steps of the layer alone."""
    parameters = list(layer.parameters())
    learning = [parameter.requires_grad for parameter in parameters]
    layer.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    with torch.enable_grad():
        for given, wanted in islice(cycle(kept), settings.steps):
            optimizer.zero_grad()
            relative_error(layer(given), wanted).backward()
            optimizer.step()
    optimizer.zero_grad()
    for parameter, learns in zip(parameters, learning, strict=True):
        parameter.requires_grad_(learns)


@torch.no_grad()
def _error(layer: nn.Module, kept: Sequence[tuple[Tensor, Tensor]]) -> float:
    errors = [relative_error(layer(given), wanted).item() for given, wanted in kept]
    return float((sum(errors) / len(errors)) ** 0.5)


def _state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}
