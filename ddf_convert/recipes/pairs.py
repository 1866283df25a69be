"""The layers of a converted model beside what they replaced in the original: convolutions, and upsampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddf_convert.conversion.eligibility import effective_weight, kind_of
from ddf_convert.conversion.record import AppliedReplacement, recorded
from ddf_convert.conversion.rewriter import functional_convolutions, trace_parts
from ddf_convert.errors import UsageError
from ddf_convert.layers import DDF2d, DDFConv2d, DDFUp2d, DDFUpConv2d
from ddf_convert.recipes.factors import Factors
from ddf_convert.recipes.upsampling import UpPair, fits
from ddf_convert.utils.modules import bare, model_name


@dataclass(frozen=True)
class Pair:
    """A new layer and the convolution whose place it took.

    Attributes:
        name: Path of the convolution in the original; for one that is called as a function, its name in the plan.
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
        """Of the convolution: "dense 3x3", "depthwise 3x3", ..."""
        return kind_of(self.conv)

    @property
    def functional(self) -> bool:
        """Whether the original calls it as a function: then nothing can be learned from its calls."""
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
    def take(self, factors: Factors, bias: Tensor | None) -> None:
        """Makes the layer the fixed convolution that the factors are.

        Args:
            factors: The filter.
            bias: (channels out,), or None.
        """
        ddf, mix = self.ddf, self.mix
        ddf.fix(factors.depthwise.reshape(ddf.in_channels, *ddf.kernel_size))
        if mix is not None and factors.mix is not None:
            mix.weight.copy_(factors.mix.reshape(mix.weight.shape))
            if ddf.bias is not None:
                nn.init.zeros_(ddf.bias)
        target = mix.bias if mix is not None else ddf.bias
        if target is not None and bias is not None:
            target.copy_(bias)


def pairs(model: nn.Module, original: nn.Module) -> list[Pair | UpPair]:
    """Every layer that a conversion put in, with what it replaced, in the order of the conversion.

    Args:
        model: A converted model.
        original: The model before conversion.

    Raises:
        UsageError: The model was not converted, its layers have no learned shifts, or the original is another model.
    """
    model, original = bare(model), bare(original)
    conversion = recorded(model)
    if conversion is None or not conversion.replaced:
        raise UsageError(f"{model_name(model)} was not converted: nothing in it took a convolution's place")
    graphs = trace_parts(original, (step.graph for step in conversion.replaced if step.functional))
    functions = functional_convolutions(graphs)
    return [_pair(model, original, functions, step) for step in conversion.replaced]


def _pair(
    model: nn.Module, original: nn.Module, functions: dict[str, nn.Conv2d], step: AppliedReplacement
) -> Pair | UpPair:
    if not step.replacement.is_ddf:
        raise UsageError(
            f"{step.places[0]} became filter {step.replacement.layer}, which starts from random weights: only DDF takes"
            " old ones over"
        )
    if step.replacement.is_ddf_up:
        return _up_pair(model, original, step)
    name = step.names[0]
    place = step.places[0]
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
    pair = Pair(name, place, conv, layer)
    expected = (conv.in_channels, conv.out_channels, conv.kernel_size[0])
    if (layer.in_channels, layer.out_channels, pair.ddf.kernel_size[0]) != expected:
        raise UsageError(f"the original does not fit the converted model: {name} has other channels or kernels")
    _check_affine(place, pair.ddf.affine)
    return pair


def _up_pair(model: nn.Module, original: nn.Module, step: AppliedReplacement) -> UpPair:
    name, interpolation = step.names[0], step.replacement.interpolation
    place = step.places[0]
    try:
        layer = model.get_submodule(place)
        # Of an interpolation that is called as a function nothing can be looked at but the module that calls it.
        there = original.get_submodule(name.rpartition(".")[0] if step.intercepted else name)
        shuffle = original.get_submodule(step.removed[0]) if step.removed else None
    except AttributeError:
        raise _not_in_both(name) from None
    if not isinstance(layer, DDFUp2d | DDFUpConv2d):
        raise UsageError(f"{place} is {type(layer).__name__}, where the conversion put a DDF-Up layer")
    conv = there if isinstance(there, nn.Conv2d | nn.ConvTranspose2d) and not interpolation else None
    if step.intercepted:
        factor = (layer if isinstance(layer, DDFUp2d) else layer.up).scale_factor
        kind = f"functional {interpolation.mode if interpolation else ''} {factor}x"
    else:
        kind = kind_of(shuffle or there) if isinstance(there, (nn.Upsample, nn.Conv2d, nn.ConvTranspose2d)) else ""
    pair = UpPair(step.removed[0] if step.removed else name, place, kind, layer, interpolation, conv)
    if not fits(pair, None if step.intercepted else there, shuffle):
        raise UsageError(
            f"the original has {type(there).__name__} at {name}, and not the upsampling that was replaced, or another"
            " number of channels or factor: give the model as it was before conversion"
        )
    _check_affine(place, pair.up.affine)
    return pair


def _not_in_both(name: str) -> UsageError:
    return UsageError(f"the original does not fit the converted model: {name} is not in both")


def _check_affine(place: str, affine: bool) -> None:
    if not affine:
        raise UsageError(
            f"{place} cannot take old weights over: convert with affine=True (--affine), or with a recipe that has it"
        )
