"""Calibration: each new layer in turn is fitted to the outputs of the original's convolution, on unlabelled images.

The layers before it are fitted already, so it also learns to correct their errors. First comes the best fixed filter,
in closed form; then a few gradient steps of the whole layer, its dynamic parts included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddf_convert.recipes.factorization import Moments, factorize_moments
from ddf_convert.recipes.losses import relative_error
from ddf_convert.recipes.pairs import ConvPair
from ddf_convert.recipes.schema import Initialize
from ddf_convert.utils.capture import first_input, first_output, forward_pre_hooks

_POSITIONS_PER_UNKNOWN = 8  # of a layer's second moments, at least; more takes time and gains nothing
_MAX_KEPT_BYTES = 2**29  # of the maps that the gradient steps use

_Statistics = tuple[Tensor, Tensor]  # mean and variance of every channel


@dataclass(frozen=True)
class FitErrors:
    """Relative errors of a layer's output against the convolution's, as roots of mean squares.

    Attributes:
        before: With the layer's initial weights, behind layers that are fitted already.
        after: At the end.
    """

    before: float
    after: float


def fit_layer(
    model: nn.Module, original: nn.Module, pair: ConvPair, batches: Sequence[Tensor], settings: Initialize
) -> FitErrors:
    """Fits one layer of the converted model to its convolution; both models are in evaluation mode."""
    moments = _MomentSums(pair, sum(map(len, batches)))
    kept: list[tuple[Tensor, Tensor]] = []
    room = _MAX_KEPT_BYTES
    for number, batch in enumerate(batches):
        inputs = _batched(first_input(model, pair.layer, batch))
        targets = _batched(first_output(original, pair.conv, batch))
        moments.add(inputs, targets, number)
        room -= inputs.nbytes + targets.nbytes
        if not kept or room > 0:
            kept.append((inputs, targets))
    before = _error(pair.layer, kept)
    state = _copied_state(pair.layer)
    factors = factorize_moments(moments.means(), pair.weight(), pair.mix is not None)
    pair.load_factors(factors, moments.bias_for(factors.product()))
    closed_form = _error(pair.layer, kept)
    if closed_form > before:  # too few images for so many unknowns
        pair.layer.load_state_dict(state)
        closed_form = before
    if settings.steps:
        state = _copied_state(pair.layer)
        _train(pair.layer, kept, settings)
        after = _error(pair.layer, kept)
        if after < closed_form:
            return FitErrors(before, after)
        pair.layer.load_state_dict(state)
    return FitErrors(before, closed_form)


def _batched(maps: Tensor) -> Tensor:
    """A single map, (C, H, W), as a batch of one."""
    return maps.unsqueeze(0) if maps.dim() == 3 else maps


class _MomentSums:
    """Sums the moments of one layer over a sample of positions of every image."""

    def __init__(self, pair: ConvPair, num_images: int) -> None:
        self.pair = pair
        weight = pair.weight()
        self.groups, self.outputs, self.inputs, self.taps = weight.shape
        unknowns = self.inputs * self.taps
        self.positions_per_image = max(32, _POSITIONS_PER_UNKNOWN * unknowns // num_images + 1)
        zeros = weight.new_zeros
        self.second = zeros(self.groups, unknowns, unknowns)
        self.cross = zeros(self.groups, self.outputs, unknowns)
        self.mean_input, self.mean_output = zeros(self.groups, unknowns), zeros(self.groups, self.outputs)
        self.count = 0

    def add(self, inputs: Tensor, targets: Tensor, seed: int) -> None:
        """Adds a batch: inputs (B, C, H, W) of the layer, outputs (B, C', Ho, Wo) of the convolution."""
        patches, outputs = sample_positions(self.pair, inputs, targets, self.positions_per_image, seed)
        patches = patches.reshape(len(patches), self.groups, -1)
        outputs = outputs.reshape(len(outputs), self.groups, -1)
        self.second += torch.einsum("ngi,ngj->gij", patches, patches).double()
        self.cross += torch.einsum("ngo,ngi->goi", outputs, patches).double()
        self.mean_input += patches.double().sum(0)
        self.mean_output += outputs.double().sum(0)
        self.count += len(patches)

    def means(self) -> Moments:
        """Moments about zero, or about the means where the convolution has a bias that absorbs them."""
        second, cross = self.second / self.count, self.cross / self.count
        if self.pair.conv.bias is not None:
            mean_input, mean_output = self.mean_input / self.count, self.mean_output / self.count
            second = second - mean_input[:, :, None] * mean_input[:, None]
            cross = cross - mean_output[:, :, None] * mean_input[:, None]
        shape = (self.groups, self.inputs, self.taps, self.inputs, self.taps)
        cross = cross.view(self.groups, self.outputs, self.inputs, self.taps)
        return Moments(second.view(shape), cross, self.count)

    def bias_for(self, weight: Tensor) -> Tensor | None:
        """The bias with which a weight (G, O, I, T) gives the right mean output."""
        if self.pair.conv.bias is None:
            return None
        mean = torch.einsum("goi,gi->go", weight.flatten(2), self.mean_input / self.count)
        return (self.mean_output / self.count - mean).flatten()


def sample_positions(pair: ConvPair, inputs: Tensor, targets: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples input patches and outputs at up to ``count`` random positions of each image.

    Args:
        pair: Gives the geometry of the convolution.
        inputs: (B, C, H, W).
        targets: The convolution's outputs, (B, C', Ho, Wo).
        count: Positions of an image.
        seed: Of the choice.

    Returns:
        (positions, C, K*K) patches, taps row by row, and (positions, C') outputs; float32, on the maps' device.
    """
    ddf = pair.ddf
    top, bottom, left, right = ddf.padding_of(inputs)
    mode = "constant" if ddf.padding_mode == "zeros" else ddf.padding_mode
    padded = F.pad(inputs.float(), (left, right, top, bottom), mode=mode)
    images, rows, columns = targets.shape[0], targets.shape[2], targets.shape[3]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack(
        [torch.randperm(rows * columns, generator=generator)[: min(count, rows * columns)] for _ in range(images)]
    ).to(inputs.device)
    row, column = chosen // columns, chosen % columns  # (B, positions)
    offsets = torch.arange(ddf.kernel_size[0], device=inputs.device) * ddf.dilation[0]
    image = torch.arange(images, device=inputs.device)[:, None]
    patches = padded.permute(0, 2, 3, 1)[
        image[..., None, None],
        (row * ddf.stride[0])[..., None, None] + offsets[:, None],
        (column * ddf.stride[0])[..., None, None] + offsets,
    ]  # (B, positions, K, K, C)
    outputs = targets.float().permute(0, 2, 3, 1)[image, row, column]
    return patches.flatten(2, 3).transpose(2, 3).flatten(0, 1), outputs.flatten(0, 1)


def _train(layer: nn.Module, maps: Sequence[tuple[Tensor, Tensor]], settings: Initialize) -> None:
    """Takes gradient steps of the layer alone."""
    parameters = list(layer.parameters())
    requires_grad = [parameter.requires_grad for parameter in parameters]
    layer.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    with torch.enable_grad():
        for inputs, targets in islice(cycle(maps), settings.steps):
            optimizer.zero_grad()
            relative_error(layer(inputs), targets).backward()
            optimizer.step()
    optimizer.zero_grad()
    for parameter, flag in zip(parameters, requires_grad, strict=True):
        parameter.requires_grad_(flag)


@torch.no_grad()
def _error(layer: nn.Module, maps: Sequence[tuple[Tensor, Tensor]]) -> float:
    errors = [relative_error(layer(inputs), targets).item() for inputs, targets in maps]
    return float((sum(errors) / len(errors)) ** 0.5)


def _copied_state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


class BatchNormCalibrator:
    """Adjusts the statistics of a converted model's batch normalizations, from the first to the last.

    The new statistics map the new features to what the original's normalization puts out. Where the original's running
    statistics are those of the images, that makes them the statistics of the new features. On other images than it was
    trained on, the original's normalized features are not centered and scaled to one, and the new ones follow them.

    Args:
        model: The converted model, in evaluation mode.
        original: The model before conversion, in evaluation mode; it does not change.
    """

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        self.model, self.original = model, original
        originals = dict(original.named_modules())
        self._pending: dict[str, tuple[_BatchNorm, _BatchNorm]] = {}
        for name, norm in model.named_modules():
            counterpart = originals.get(name)
            if isinstance(norm, _BatchNorm) and isinstance(counterpart, _BatchNorm) and norm.running_mean is not None:
                self._pending[name] = (norm, counterpart)

    @torch.no_grad()
    def calibrate(
        self, batches: Sequence[Tensor], layer: nn.Module | None = None, conv: nn.Module | None = None
    ) -> list[str]:
        """Adjusts the normalizations that are called before a layer and are still pending.

        Args:
            batches: (B, C, H, W) each.
            layer: The layer of the model; None is the end of its forward pass.
            conv: Its counterpart in the original.

        Returns:
            Their names.
        """
        found: dict[str, list[_Statistics]] = {}
        for batch in batches:
            expected: dict[str, _Statistics] = {}
            with forward_pre_hooks(
                (counterpart, partial(_record_statistics, expected, name))
                for name, (_, counterpart) in self._pending.items()
            ):
                _run_until(self.original, conv, batch)
            with forward_pre_hooks(
                (norm, _AdjustToBatch(norm, counterpart, expected[name], found.setdefault(name, [])))
                for name, (norm, counterpart) in self._pending.items()
                if name in expected
            ):
                _run_until(self.model, layer, batch)
        adjusted = [name for name, statistics in found.items() if statistics]
        for name in adjusted:
            norm, _ = self._pending.pop(name)
            means, variances = zip(*found[name], strict=True)
            _set_statistics(norm, torch.stack(means).mean(0), torch.stack(variances).mean(0))
        return adjusted


class _AdjustToBatch:
    """A pre-hook that sets a normalization's statistics for one batch, so that later layers see the right features."""

    def __init__(
        self, norm: _BatchNorm, counterpart: _BatchNorm, expected: _Statistics, found: list[_Statistics]
    ) -> None:
        self.norm, self.counterpart, self.expected, self.found = norm, counterpart, expected, found
        self.called = False

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.called:  # a shared normalization keeps the statistics of its first call
            return
        self.called = True
        assert self.counterpart.running_mean is not None
        assert self.counterpart.running_var is not None
        mean, variance = _statistics(args[0])
        old_mean, old_variance = self.expected
        eps = self.counterpart.eps
        ratio = (variance + eps) / (old_variance + eps)
        new_variance = (self.counterpart.running_var.float() + eps) * ratio - self.norm.eps
        new_mean = mean - ratio.sqrt() * (old_mean - self.counterpart.running_mean.float())
        self.found.append((new_mean, new_variance.clamp_min(0)))
        _set_statistics(self.norm, *self.found[-1])


def _run_until(model: nn.Module, module: nn.Module | None, images: Tensor) -> None:
    """Runs a model as far as the first call of a module; None is the end."""
    if module is None:
        model(images)
    else:
        first_input(model, module, images)


def _statistics(feature: Tensor) -> _Statistics:
    """Mean and variance of every channel of (B, C, ...), in float32."""
    flat = feature.float().transpose(0, 1).flatten(1)
    variance, mean = torch.var_mean(flat, dim=1, correction=0)
    return mean, variance


def _record_statistics(found: dict[str, _Statistics], name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    found.setdefault(name, _statistics(args[0]))


def _set_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
