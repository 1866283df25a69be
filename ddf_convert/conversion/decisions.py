"""Decisions: what happens to a candidate, by the user's selection, its eligibility, and what replacing it costs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddf_convert.conversion.analysis import Candidate
from ddf_convert.conversion.budget import CandidateCosts
from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.conversion.eligibility import (
    Refused,
    build,
    caution,
    check_convolution,
    is_depthwise,
    kind_of,
    needs_mixing,
    operation_of,
    replacement_for,
    stand_in,
)
from ddf_convert.conversion.plan import Action, FoundBy, Operation, Replacement, Site
from ddf_convert.conversion.registry import LayerType, is_built_in
from ddf_convert.conversion.rewriter import attribute_in_the_way
from ddf_convert.conversion.upsampling import replacement_for_upsampling, stand_in_for_upsampling, upsamples
from ddf_convert.cost.count import Cost
from ddf_convert.errors import UsageError, first_line
from ddf_convert.layers import DDFConv2d, SeparableFilter2d
from ddf_convert.utils.patterns import matching_names, pattern_hint

Patterns = str | Iterable[str] | None
FilterFunction = Callable[[nn.Module, str], bool]

STEM_CHANNELS = 4  # a convolution of so few input channels reads the image
_NUMBERED = "torch.fx does not see its calls: they are distinguished by their order in one run of the module's forward"

# --- which sites the user selects -------------------------------------------------------------------------------------

_FILTER_FN_ORDER = (
    "filter_fn is called with the module first and its name second, as torchao's: filter_fn(module, name)"
)
_NAME_PARAMETERS = {"name", "fqn", "path", "qualname", "module_name", "layer_name"}
_MODULE_PARAMETERS = {"module", "mod", "layer", "conv", "m"}


class Selection:
    """What ``include``, ``exclude`` and ``filter_fn`` select among a model's candidates.

    Raises:
        UsageError: A pattern matches no convolution, or is not a regular expression.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        include: Patterns = None,
        exclude: Patterns = None,
        filter_fn: FilterFunction | None = None,
    ) -> None:
        names = list(dict.fromkeys(name for candidate in candidates for name in candidate.names))
        self._include = _match_each("include", include, names)
        self._exclude = _match_each("exclude", exclude, names)
        self._filter_fn = filter_fn

    def excluded_by(self, candidate: Candidate) -> str | None:
        """Returns the first pattern that excludes a candidate."""
        return next((pattern for pattern, names in self._exclude.items() if names.intersection(candidate.names)), None)

    def check(self, candidate: Candidate, module: nn.Module) -> None:
        """Raises Refused if the user leaves a candidate out, and UsageError if ``filter_fn`` fails."""
        if (pattern := self.excluded_by(candidate)) is not None:
            raise Refused(f"excluded by {pattern!r}")
        if self._include and not any(names.intersection(candidate.names) for names in self._include.values()):
            raise Refused("outside include")
        if self._filter_fn is None:
            return
        try:
            selected = bool(self._filter_fn(module, candidate.name))
        except Exception as error:  # it is the user's code: anything can come out of it
            raise UsageError(
                f"filter_fn failed for {candidate.name} ({type(module).__name__}): {type(error).__name__}:"
                f" {first_line(error)}; {_FILTER_FN_ORDER}"
            ) from error
        if not selected:
            raise Refused("filter_fn said no")


def check_argument_order(filter_fn: FilterFunction) -> None:
    """Raises UsageError if the signature of ``filter_fn`` shows that it takes ``(name, module)``."""
    try:
        first, second, *_ = inspect.signature(filter_fn).parameters.values()
    except (TypeError, ValueError):  # no signature, or not two arguments: the call shows it
        return
    name_first = first.name in _NAME_PARAMETERS or first.annotation in (str, "str")
    module_second = second.name in _MODULE_PARAMETERS or _is_module_class(second.annotation)
    if (name_first and second.name not in _NAME_PARAMETERS) or (module_second and first.name not in _MODULE_PARAMETERS):
        raise UsageError(f"filter_fn takes ({first.name}, {second.name}): {_FILTER_FN_ORDER}")


def _match_each(option: str, patterns: Patterns, names: Sequence[str]) -> dict[str, set[str]]:
    matches = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        matches[pattern] = matching_names(option, pattern, names)
        if not matches[pattern]:
            raise UsageError(f"{option}: {pattern!r} matches no convolution{pattern_hint(pattern, names)}")
    return matches


def _is_module_class(annotation: object) -> bool:
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] in ("Module", "Conv2d")
    return isinstance(annotation, type) and issubclass(annotation, nn.Module)


# --- the decisions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decider:
    """Decides about one candidate after another."""

    config: ConvertConfig
    layer_type: LayerType
    selection: Selection
    costs: CandidateCosts
    replacement_costs: CandidateCosts
    candidates: Mapping[str, Candidate]

    def decide(self, candidate: Candidate) -> Site:
        """Returns the site of a candidate: what happens to it, and why."""
        module = candidate.module
        if module is None:
            call = candidate.calls[0]
            try:
                module = stand_in_for_upsampling(call) if call.upsampled else stand_in(call)
            except (ValueError, TypeError, RuntimeError):
                return _site_without_module(candidate)
        site = self._new_site(candidate, module)
        decide = self._decide_upsampling if self.config.upsample and upsamples(candidate) else self._decide_convolution
        try:
            site.replace(decide(site, candidate, module))
        except Refused as refusal:
            site.skip(*refusal.args)
        return site

    def _decide_convolution(self, site: Site, candidate: Candidate, module: nn.Module) -> str:
        """Fills in what replaces a convolution, and returns why; raises Refused if it is left alone."""
        check_convolution(candidate, module, self.config, self.layer_type)
        assert isinstance(module, nn.Conv2d)
        mix, why = needs_mixing(candidate, module, self.config, self.layer_type)
        site.caution = "; ".join(filter(None, (candidate.caution, caution(module))))
        replacement = replacement_for(module, self.config, mix)
        layer = self._build(replacement, candidate).to(module.weight.dtype)
        if reason := attribute_in_the_way(module, layer):
            raise Refused(reason)
        site.replacement = replacement
        site.replacement_cost = self.replacement_costs.over_all_calls(layer, candidate)
        self.selection.check(candidate, module)
        self._check_worthwhile(site, module)
        return why

    def _decide_upsampling(self, site: Site, candidate: Candidate, module: nn.Module) -> str:
        """Does the same for an upsampling."""
        replacement, site.caution = replacement_for_upsampling(candidate, module, self.config, self.candidates)
        if candidate.owner is not None and candidate.found_by is FoundBy.HOOKS:
            site.caution = "; ".join(filter(None, (site.caution, _NUMBERED)))
        layer = build(replacement, device="meta")
        is_shuffle = isinstance(module, nn.PixelShuffle)  # an Identity replaces it, and the layer its convolution
        if not is_shuffle and (reason := attribute_in_the_way(module, layer)):
            raise Refused(reason)
        site.replacement = replacement
        replaced = self.candidates[candidate.fed_by] if is_shuffle else candidate
        if is_shuffle:
            site.convolution = replaced.name
            assert replaced.module is not None
            site.before = site.after = site.before + self.costs.over_all_calls(replaced.module, replaced)
        site.replacement_cost = self.replacement_costs.over_all_calls(layer.to(replaced.dtype), replaced)
        self.selection.check(candidate, module)
        if is_shuffle and (pattern := self.selection.excluded_by(replaced)) is not None:
            raise Refused(f"its convolution, {replaced.name}, is excluded by {pattern!r}")
        if isinstance(module, nn.ConvTranspose2d | nn.PixelShuffle):
            if not self.config.allow_growth:
                _check_saves(site)
        elif not self.config.stem:
            if candidate.on_image:
                raise Refused("resizes the image: no convolution comes before it", "stem")
            if site.in_channels == 1:  # detectors paste a mask at a time, at any size
                raise Refused("works on a single channel: a mask, or one map of scores", "stem")
        return _why_upsampled(site, module)

    def _build(self, replacement: Replacement, candidate: Candidate) -> nn.Module:
        """Builds a layer without weights; one of a user's own is checked against the convolution."""
        if is_built_in(self.layer_type):
            return build(replacement, device="meta")
        where = f"filter {self.layer_type.name} in the place of {candidate.name}"
        call = candidate.calls[0]
        try:
            layer = build(replacement, device="meta")
            with torch.no_grad():
                output = layer(torch.empty(call.input_shape, device="meta"))
        except Exception as error:  # it is the user's code: anything can come out of it
            raise UsageError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
        shape = tuple(getattr(output, "shape", ()))
        if shape != call.output_shape:
            raise UsageError(
                f"{where}: makes {'x'.join(map(str, shape)) or type(output).__name__} of"
                f" {'x'.join(map(str, call.input_shape))}, where the convolution makes"
                f" {'x'.join(map(str, call.output_shape))}"
            )
        return layer

    def _new_site(self, candidate: Candidate, module: nn.Module) -> Site:
        """Makes the site of a candidate about which nothing is decided yet."""
        before = self.costs.over_all_calls(module, candidate)
        call = candidate.calls[0] if candidate.calls else None
        if call and call.function is not None:
            before = before.model_copy(update={"params": call.function.params})
        stride: Any = getattr(_reading_part(module), "stride", 1)
        shapes = (call.input_shape, call.output_shape) if call else ((), ())
        channels = [shape[1] if len(shape) > 1 else 0 for shape in shapes]  # where the module has no such attribute
        return Site(
            name=candidate.name,
            kind=f"functional {kind_of(module)}" if candidate.module is None else kind_of(module),
            in_channels=getattr(module, "in_channels", channels[0]),
            out_channels=getattr(module, "out_channels", channels[1]),
            stride=stride if isinstance(stride, tuple) else (stride, stride),
            input_shape=shapes[0],
            output_shape=shapes[1],
            calls=len(candidate.calls),
            action=Action.SKIP,
            reason="",
            operation=operation_of(module),
            kernel_size=_kernel_size(module),
            found_by=candidate.found_by,
            before=before,
            after=before,
        )

    def _check_worthwhile(self, site: Site, conv: nn.Conv2d) -> None:
        """Raises Refused for what is replaced only where an option says so."""
        assert site.replacement_cost is not None
        if is_depthwise(conv):
            if not self.config.depthwise:
                params = site.replacement_cost.params - site.before.params
                change = f"add {params:,} parameters to" if params > 0 else f"save {-params:,} parameters of"
                raise Refused(f"{self.layer_type.display_name} would {change} a depthwise convolution", "depthwise")
        elif conv.in_channels <= STEM_CHANNELS and not self.config.stem:
            raise Refused(f"stem: {conv.in_channels} input channels", "stem")
        elif self.layer_type.saves and not self.config.allow_growth:
            _check_saves(site)


def _check_saves(site: Site) -> None:
    cost = site.replacement_cost
    assert cost is not None
    grown = [
        f"{before:,} {what} would become {after:,}"
        for what, before, after in (
            ("parameters", site.before.params, cost.params),
            ("MACs", site.before.macs, cost.macs),
        )
        if after >= before
    ]
    if grown:
        raise Refused(f"would not save: its {' and '.join(grown)}", "allow_growth")


def _kernel_size(module: nn.Module) -> tuple[int, int] | None:
    if operation_of(module) not in (Operation.CONV, Operation.CONV_TRANSPOSE):
        return None
    size = getattr(module, "kernel_size", None)
    return size if isinstance(size, tuple) and len(size) == 2 else None


def _reading_part(module: nn.Module) -> nn.Module:
    """The part of a layer that reads its input."""
    if isinstance(module, DDFConv2d):
        return module.ddf
    return module.filter if isinstance(module, SeparableFilter2d) else module


def _why_upsampled(site: Site, module: nn.Module) -> str:
    assert site.replacement is not None
    assert site.replacement_cost is not None
    mixes = site.replacement.layer == "DDFUpConv2d"
    if isinstance(module, nn.PixelShuffle):
        return f"1x1, then DDF-Up, for {site.convolution} and the shuffle"
    if isinstance(module, nn.ConvTranspose2d):
        return "1x1, then DDF-Up" if mixes else "DDF-Up alone: a depthwise convolution mixes no channels either"
    return f"DDF-Up for an interpolation: adds {site.replacement_cost.params:,} parameters"


def _site_without_module(candidate: Candidate) -> Site:
    """The site of a functional call that no module can make: only its shapes are known."""
    call = candidate.calls[0]
    if call.upsampled:
        operation = Operation(call.upsampled.function)
    else:
        operation = Operation.CONV_TRANSPOSE if call.function and call.function.transposed else Operation.CONV
    return Site(
        name=candidate.name,
        kind="functional",
        operation=operation,
        in_channels=call.input_shape[-3],
        out_channels=call.output_shape[-3],
        stride=(0, 0),
        input_shape=call.input_shape,
        output_shape=call.output_shape,
        calls=len(candidate.calls),
        action=Action.SKIP,
        reason="called as a function, with arguments that no module takes",
        found_by=candidate.found_by,
        before=Cost(),
        after=Cost(),
    )
