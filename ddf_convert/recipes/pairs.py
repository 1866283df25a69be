"""Pairs of new layers and the original's convolutions or upsampling that they replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddf_convert.conversion.eligibility import effective_weight, kind_of
from ddf_convert.conversion.plan import Interpolation
from ddf_convert.conversion.record import AppliedReplacement, recorded
from ddf_convert.conversion.rewriter import functional_convolutions, trace_parts
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d
from ddf_convert.recipes.factorization import (
    Factors,
    alignment_error,
    factorize_mix_first,
    factorize_weights,
    interpolation_phases,
    shuffled_phases,
    transposed_phases,
)
from ddf_convert.utils.modules import bare, model_name

_TINY = 1e-30  # of a norm that is divided by


@dataclass(frozen=True)
class ConvPair:
    """A new layer and the convolution that it replaced.

    Attributes:
        name: Path of the convolution in the original; if it is called as a function, its name in the plan.
        place: Path of the new layer in the converted model.
        conv: The convolution.
        layer: The new layer.
    """

    name: str
    place: str
    conv: nn.Conv2d
    layer: DDF2d | DDFConv2d

    @property
    def kind(self) -> str:
        """The convolution's kind: "dense 3x3", "depthwise 3x3", ..."""
        return kind_of(self.conv)

    @property
    def functional(self) -> bool:
        """Whether the original calls it as a function: its inputs and outputs cannot be captured then."""
        return self.place != self.name

    @property
    def ddf(self) -> DDF2d:
        """The DDF layer."""
        return self.layer if isinstance(self.layer, DDF2d) else self.layer.ddf

    @property
    def mix(self) -> nn.Conv2d | None:
        """The 1x1 convolution behind it."""
        return None if isinstance(self.layer, DDF2d) else self.layer.mix

    def weight(self) -> Tensor:
        """The convolution's weight as (G, O, I, T), groups, outputs, inputs, taps; float64."""
        conv = self.conv
        shape = (conv.groups, conv.out_channels // conv.groups, conv.in_channels // conv.groups, -1)
        return effective_weight(conv).double().reshape(shape)

    @torch.no_grad()
    def load_factors(self, factors: Factors, bias: Tensor | None) -> None:
        """Makes the layer a fixed convolution with these factors and a bias (channels out,) or None."""
        ddf, mix = self.ddf, self.mix
        ddf.fix(factors.depthwise.reshape(ddf.in_channels, *ddf.kernel_size))
        if mix is not None and factors.mix is not None:
            mix.weight.copy_(factors.mix.reshape(mix.weight.shape))
            if ddf.bias is not None:
                nn.init.zeros_(ddf.bias)
        target = mix.bias if mix is not None else ddf.bias
        if target is not None and bias is not None:
            target.copy_(bias)

    @torch.no_grad()
    def preserve(self) -> float:
        """Makes the layer the nearest fixed convolution to the old one; returns the relative error of the weights."""
        weight = self.weight()
        factors = factorize_weights(weight, self.mix is not None)
        self.load_factors(factors, self.conv.bias)
        return _relative_norm(factors.product(), weight)


@dataclass(frozen=True)
class UpsamplingPair:
    """A new layer and the upsampling that it replaced.

    Attributes:
        name: Path of the convolution or interpolation in the original; if it is called as a function, its name in the
            plan.
        place: Path of the new layer in the converted model.
        kind: Of what was replaced: "bilinear 2x", "transposed 4x4", "pixel shuffle 2x", ...
        layer: The new layer.
        interpolation: The interpolation that was replaced, or None.
        conv: Or the convolution: transposed, or with a pixel shuffle behind it.
    """

    name: str
    place: str
    kind: str
    layer: DDFUp2d | DDFUpConv2d
    interpolation: Interpolation | None = None
    conv: nn.Conv2d | nn.ConvTranspose2d | None = None

    @property
    def up(self) -> DDFUp2d:
        """The DDF-Up layer."""
        return self.layer if isinstance(self.layer, DDFUp2d) else self.layer.up

    @torch.no_grad()
    def preserve(self) -> float:
        """Makes the layer the nearest fixed one to the old upsampling.

        Returns:
            Norm of the difference between the old and the new linear map, over the norm of the old one; the bias does
            not count. It is 0 for interpolations without ``align_corners=True``, and for depthwise transposed
            convolutions.
        """
        up = self.up
        factor, size, channels = up.scale_factor, up.kernel_size[0], up.in_channels
        if self.interpolation is not None:
            filters = interpolation_phases(self.interpolation.mode, factor, size)
            up.fix(filters[:, None].expand(-1, channels, -1, -1))
            return alignment_error(self.interpolation.mode, factor) if self.interpolation.align_corners else 0.0
        assert self.conv is not None
        weight = (
            transposed_phases(self.conv, size)
            if isinstance(self.conv, nn.ConvTranspose2d)
            else shuffled_phases(self.conv, factor)
        )
        error = 0.0
        filters = weight[:, :, 0]  # a depthwise one has a single input channel in each group
        if isinstance(self.layer, DDFUpConv2d):
            mix, filters = factorize_mix_first(weight)
            self.layer.mix.weight.copy_(mix.reshape(self.layer.mix.weight.shape))
            error = _relative_norm(mix[..., None] * filters[:, :, None], weight)
        up.fix(filters.reshape(channels, factor**2, size, size).transpose(0, 1))
        if self.conv.bias is not None and up.bias is not None:
            # A pixel shuffle has a constant for each place in a cell; their differences cannot be kept.
            up.bias.copy_(self.conv.bias.view(channels, -1).mean(1))
        return error

    def fits(self, module: nn.Module | None, shuffle: nn.Module | None) -> bool:
        """Whether the original still has what the layer was made for.

        Args:
            module: The original's module at its place; None for an interpolation that is called as a function.
            shuffle: The original's module at the place of the pixel shuffle, if there was one.
        """
        if self.interpolation is not None:
            return module is None or (isinstance(module, nn.Upsample) and module.mode == self.interpolation.mode)
        if isinstance(module, nn.ConvTranspose2d):
            found = (module.in_channels, module.out_channels, module.stride[0])
        elif isinstance(module, nn.Conv2d) and isinstance(shuffle, nn.PixelShuffle):
            factor = shuffle.upscale_factor
            found = (module.in_channels, module.out_channels // factor**2, factor)
        else:
            return False
        return found == (self.layer.in_channels, self.up.out_channels, self.up.scale_factor)


Pair = ConvPair | UpsamplingPair


def find_pairs(model: nn.Module, original: nn.Module) -> list[Pair]:
    """The new layers of a converted model with what they replaced, in the order of the conversion.

    Raises:
        UsageError: The model was not converted, its layers have no learned shifts, or the original is another model.
    """
    model, original = bare(model), bare(original)
    conversion = recorded(model)
    if conversion is None or not conversion.replaced:
        raise UsageError(f"{model_name(model)} was not converted: nothing in it took a convolution's place")
    graphs = trace_parts(original, (step.graph for step in conversion.replaced if step.functional))
    functions = functional_convolutions(graphs)
    pairs: list[Pair] = []
    for step in conversion.replaced:
        if not step.replacement.is_ddf:
            raise UsageError(
                f"{step.places[0]} became filter {step.replacement.layer}, which starts from random weights: only DDF"
                " takes old ones over"
            )
        pair = (
            _upsampling_pair(model, original, step)
            if step.replacement.is_ddf_up
            else _conv_pair(model, original, functions, step)
        )
        if not (pair.ddf if isinstance(pair, ConvPair) else pair.up).affine:
            raise UsageError(
                f"{pair.place} cannot take old weights over: convert with affine=True (--affine), or with a recipe that"
                " has it"
            )
        pairs.append(pair)
    return pairs


def _conv_pair(
    model: nn.Module, original: nn.Module, functions: dict[str, nn.Conv2d], step: AppliedReplacement
) -> ConvPair:
    name, place = step.names[0], step.places[0]
    try:
        layer = model.get_submodule(place)
        conv = functions[name] if step.functional else original.get_submodule(name)
    except (AttributeError, KeyError):
        raise _not_in_both(name) from None
    if not isinstance(layer, DDF2d | DDFConv2d):
        raise UsageError(f"{place} is {type(layer).__name__}, where the conversion put a DDF layer")
    if not isinstance(conv, nn.Conv2d):
        raise UsageError(
            f"the original has {type(conv).__name__} at {name}, and not the convolution that was replaced: give the"
            " model as it was before conversion"
        )
    pair = ConvPair(name, place, conv, layer)
    expected = (conv.in_channels, conv.out_channels, conv.kernel_size[0])
    if (layer.in_channels, layer.out_channels, pair.ddf.kernel_size[0]) != expected:
        raise UsageError(f"the original does not fit the converted model: {name} has other channels or kernels")
    return pair


def _upsampling_pair(model: nn.Module, original: nn.Module, step: AppliedReplacement) -> UpsamplingPair:
    name, place, interpolation = step.names[0], step.places[0], step.replacement.interpolation
    try:
        layer = model.get_submodule(place)
        # Of an interpolation that is called as a function, only the module that calls it can be found.
        module = original.get_submodule(name.rpartition(".")[0] if step.intercepted else name)
        shuffle = original.get_submodule(step.removed[0]) if step.removed else None
    except AttributeError:
        raise _not_in_both(name) from None
    if not isinstance(layer, DDFUp2d | DDFUpConv2d):
        raise UsageError(f"{place} is {type(layer).__name__}, where the conversion put a DDF-Up layer")
    conv = module if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not interpolation else None
    if step.intercepted:
        factor = (layer if isinstance(layer, DDFUp2d) else layer.up).scale_factor
        kind = f"functional {interpolation.mode if interpolation else ''} {factor}x"
    else:
        kind = kind_of(shuffle or module) if isinstance(module, (nn.Upsample, nn.Conv2d, nn.ConvTranspose2d)) else ""
    pair = UpsamplingPair(step.removed[0] if step.removed else name, place, kind, layer, interpolation, conv)
    if not pair.fits(None if step.intercepted else module, shuffle):
        raise UsageError(
            f"the original has {type(module).__name__} at {name}, and not the upsampling that was replaced, or another"
            " number of channels or factor: give the model as it was before conversion"
        )
    return pair


def _not_in_both(name: str) -> UsageError:
    return UsageError(f"the original does not fit the converted model: {name} is not in both")


def _relative_norm(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(_TINY))
