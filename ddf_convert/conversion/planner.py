"""Planning: what becomes of every convolution of a model, and why, before anything changes."""

from __future__ import annotations

import fnmatch
import glob
import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ddf_convert.conversion.analysis import Convolution, find_convolutions
from ddf_convert.conversion.attributes import attribute_in_the_way
from ddf_convert.conversion.budget import apply_budgets
from ddf_convert.conversion.eligibility import (
    build,
    caution,
    is_depthwise,
    kind_of,
    obstacle,
    operation_of,
    replacement_for,
    stand_in,
)
from ddf_convert.conversion.plan import (
    Action,
    ConvertConfig,
    FoundBy,
    Operation,
    Plan,
    Replacement,
    Site,
    Timed,
    make_config,
)
from ddf_convert.conversion.recorder import UPSAMPLING, Call, Recording, record
from ddf_convert.conversion.registry import DDF, Filter, find_filter, is_built_in, with_mixing
from ddf_convert.conversion.rewriter import Replaced, prepare, steps_of, swap
from ddf_convert.conversion.tracer import Traced, describe, trace
from ddf_convert.conversion.upsampling import Refused, replacement_for_upsampling, stand_in_for_upsampling, upsamples
from ddf_convert.conversion.verify import verify
from ddf_convert.cost import count
from ddf_convert.cost.count import Cost, count_parameters
from ddf_convert.cost.timing import device_of, forward_ms
from ddf_convert.errors import UsageError, first_line, suggestion
from ddf_convert.layers import DDFConv2d, SeparableFilter2d
from ddf_convert.utils.device import called
from ddf_convert.utils.device import describe as describe_machine
from ddf_convert.utils.example_input import ExampleInput, as_arguments, first_size
from ddf_convert.utils.fake_copy import Watch, real_copy
from ddf_convert.utils.modules import bare

Patterns = str | Iterable[str] | None
FilterFunction = Callable[[nn.Module, str], bool]

_ORDER = "filter_fn is called with the module first and its name second, as torchao's: filter_fn(module, name)"
_NAMES = {"name", "fqn", "path", "qualname", "module_name", "layer_name"}  # what a parameter for the name is called
_MODULES = {"module", "mod", "layer", "conv", "m"}  # and one for the module


def matching_names(option: str, pattern: str, names: Collection[str]) -> set[str]:
    """The names that a pattern selects.

    Args:
        option: What the user calls the pattern, for errors.
        pattern: A name; a glob, in which ``*`` matches dots too; or ``re:`` and a regular expression for the whole
            name. A pattern that is one of the names selects that name alone, whatever characters it contains.
        names: What there is to match.

    Raises:
        UsageError: The pattern is not a regular expression.
    """
    if pattern in names:
        return {pattern}
    expression = pattern.removeprefix("re:") if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UsageError(f"{option}: {pattern!r} is not a regular expression: {error}") from error
    return {name for name in names if compiled.fullmatch(name)}


def pattern_hint(pattern: str, names: Collection[str]) -> str:
    """What to append to the error of a pattern that selects nothing; empty if there is nothing to suggest."""
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; for those inside it, write '{glob.escape(pattern)}.*'"
    return suggestion(pattern, names)


class Selector:
    """What ``include`` or ``exclude`` names among a model's convolutions.

    Args:
        option: "include" or "exclude", for errors.
        patterns: One pattern, several, or None; see :func:`matching_names`.
        convolutions: What there is to match.

    Raises:
        UsageError: A pattern matches no convolution, or is not a regular expression.
    """

    def __init__(self, option: str, patterns: Patterns, convolutions: Sequence[Convolution]) -> None:
        self.patterns = [patterns] if isinstance(patterns, str) else list(patterns or ())
        names = list(dict.fromkeys(name for site in convolutions for name in site.names))
        self._selected = [matching_names(option, pattern, names) for pattern in self.patterns]
        for pattern, selected in zip(self.patterns, self._selected, strict=True):
            if not selected:
                raise UsageError(f"{option}: {pattern!r} matches no convolution{pattern_hint(pattern, names)}")

    def matching(self, convolution: Convolution) -> str | None:
        """The first pattern that matches one of the names of a convolution."""
        for pattern, selected in zip(self.patterns, self._selected, strict=True):
            if not selected.isdisjoint(convolution.names):
                return pattern
        return None


def check_order(filter_fn: FilterFunction) -> None:
    """Raises UsageError if the signature of a user's function says that it takes ``(name, module)``."""
    try:
        first, second, *_ = inspect.signature(filter_fn).parameters.values()
    except (TypeError, ValueError):  # no signature, or not two arguments: the call tells
        return
    is_name = first.name in _NAMES or first.annotation in (str, "str")
    is_module = second.name in _MODULES or _is_module(second.annotation)
    if (is_name and second.name not in _NAMES) or (is_module and first.name not in _MODULES):
        raise UsageError(f"filter_fn takes ({first.name}, {second.name}): {_ORDER}")


def asked(filter_fn: FilterFunction, module: nn.Module, name: str) -> bool:
    """What the user's function says of a site.

    Raises:
        UsageError: It failed.
    """
    try:
        return bool(filter_fn(module, name))
    except Exception as error:  # it is the user's code: anything can come out of it
        words = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"filter_fn failed for {name} ({type(module).__name__}): {words}; {_ORDER}") from error


def _is_module(annotation: object) -> bool:
    if isinstance(annotation, str):
        return annotation.rpartition(".")[2] in ("Module", "Conv2d")
    return isinstance(annotation, type) and issubclass(annotation, nn.Module)


class Stopwatch:
    """Times modules on one device; they can be on any, the meta device included.

    Args:
        model: Where it is, it is timed, if ``device`` is just True; on the CPU if that is the meta device.
        device: Where else.

    Attributes:
        machine: The device in words.
    """

    def __init__(self, model: nn.Module, device: bool | torch.device | str) -> None:
        own = device_of(model)
        default = torch.device("cpu") if own.type == "meta" else own
        self.device = default if isinstance(device, bool) else torch.device(device)
        self.machine = called(describe_machine(self.device))

    def ms(self, module: nn.Module, *args: Any, **kwargs: Any) -> float:
        """Milliseconds of one forward pass."""
        if next(module.parameters(), None) is None:  # an interpolation: its place would not say where it is to run
            module = _Placed(module)
        return forward_ms(real_copy(module).module.to(self.device), *args, kwargs=kwargs)

    def ms_converted(self, model: nn.Module, steps: Sequence[Replaced], *args: Any, **kwargs: Any) -> float:
        """The same of the model once converted."""
        copied = real_copy(model).module
        return self.ms(swap(copied, prepare(copied, steps)), *args, **kwargs)


class _Placed(nn.Sequential):
    """A module that has no parameters, beside an empty one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.place = nn.Parameter(torch.empty(0))


class Costs:
    """Costs of layers over all the calls of a convolution. Equal layers, of which models have many, run once."""

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        self._stopwatch = stopwatch
        self._measured: dict[tuple[Any, ...], Cost] = {}

    def over_all_calls(self, module: nn.Module, convolution: Convolution) -> Cost:
        """Parameters once; MACs, activations and time for each call, at its shape."""
        total = Cost(params=count_parameters(module), latency_ms=0.0 if self._stopwatch else None)
        for call in convolution.calls:
            total += self._of_one_call(module, call).model_copy(update={"params": 0})
        return total

    def _of_one_call(self, module: nn.Module, call: Call) -> Cost:
        shape = call.input_shape
        dtype = next((parameter.dtype for parameter in module.parameters()), call.dtype)
        key = (type(module), repr(module), dtype, shape)  # the text shows every argument of these classes
        if key not in self._measured:
            image = torch.empty(shape, dtype=dtype, device="meta")
            cost = count.measure(module, image)
            if self._stopwatch:
                cost = cost.model_copy(update={"latency_ms": self._stopwatch.ms(module, image)})
            self._measured[key] = cost
        return self._measured[key]


_NUMBERED = "torch.fx does not see its calls: they are told apart by their order in one run of the module's forward"
STEM_CHANNELS = 4  # a convolution of so few input channels reads the image


def plan(
    model: nn.Module,
    example_input: ExampleInput,
    config: ConvertConfig | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: FilterFunction | None = None,
    measure: bool | torch.device | str = False,
    **options: Any,
) -> Plan:
    """Decides what becomes of every convolution of a model; the model stays as it is.

    The model is looked at on shapes alone, on any device (the meta device too: weights are never read). Only a model
    whose forward depends on values, such as a detector, is run on the example input itself, as a copy.

    Args:
        model: Any module. What torch.fx cannot trace is traced piece by piece, or found by running the model; each site
            says which (``found_by``), and what is less certain for it (``caution``).
        example_input: (B, C, H, W); or a tuple of arguments for forward, or a dict of them by name; only shapes matter.
        config: How to convert.
        include: Names, globs or ``re:`` patterns of the convolutions to look at; None for all.
        exclude: The same for those to leave alone; it wins over ``include``.
        filter_fn: Called with the module and the name of each that could be replaced and is not excluded, as
            torchao's; False leaves it alone.
        measure: Also time the model, and every convolution and what could take its place: on the model's device (the
            CPU for the meta device), or the one given.
        **options: Single fields of the config, e.g. ``se_ratio=0.5``.

    Returns:
        A decision and a reason for every 2D convolution and, with ``upsample=True``, for every upsampling. It can be
        edited, and is applied by ``convert``.

    Raises:
        UsageError: The model does not accept the input or cannot be looked at, a pattern matches nothing, an option is
            wrong, or ``filter_fn`` fails or takes its arguments the other way round.
        DDFError: What is to be timed does not run.
    """
    return _plan(model, example_input, make_config(config, options), include, exclude, filter_fn, measure)


def as_it_stands(model: nn.Module, example_input: ExampleInput, measure: bool = False, upsample: bool = False) -> Plan:
    """The plan of a model whose ``before`` is what matters: what could take a convolution's place is not timed.

    Args:
        model: As for :func:`plan`.
        example_input: As for :func:`plan`.
        measure: Time the model and every convolution, on the model's device.
        upsample: List upsampling too.
    """
    return _plan(model, example_input, ConvertConfig(upsample=upsample), None, None, None, measure, applied=False)


def _plan(
    model: nn.Module,
    example_input: ExampleInput,
    config: ConvertConfig,
    include: Patterns,
    exclude: Patterns,
    filter_fn: FilterFunction | None,
    measure: bool | torch.device | str,
    applied: bool = True,
) -> Plan:
    """A plan; one that is not to be ``applied`` says nothing about what its replacements do to the model."""
    chosen = find_filter(config.filter)
    chosen.arguments(config)  # refuses what does not go together before the model is looked at
    if config.upsample and chosen.name != DDF:
        raise UsageError(f"upsampling is replaced by DDF-Up, and not by filter {chosen.name}: leave one of the two out")
    if filter_fn is not None:
        check_order(filter_fn)
    model = bare(model)
    args, kwargs = as_arguments(model, example_input)
    recording = record(model, args, kwargs, describe(model), config.upsample)
    traced = trace(model, recording)
    convolutions = find_convolutions(model, recording, traced)
    stopwatch = Stopwatch(model, measure) if measure or config.only_faster else None
    measure_replacements = (measure and applied) or config.only_faster
    costs = Costs(stopwatch)
    planner = _Planner(
        config,
        chosen,
        Selector("include", include, convolutions),
        Selector("exclude", exclude, convolutions),
        filter_fn,
        costs,
        costs if measure_replacements else Costs(None),
        {name: convolution for convolution in convolutions for name in convolution.names},
    )
    sites = [planner.decide(convolution) for convolution in convolutions]
    _give_up_to_shuffles(sites)
    if applied:
        verify(model, recording, sites)
    before, timed = _whole_cost(recording, sites), None
    if stopwatch:
        before = before.model_copy(update={"latency_ms": stopwatch.ms(model, *args, **kwargs)})
    notes = [*_notes(recording, traced, sites), *apply_budgets(sites, config, before)]
    notes += _frozen(model, sites)
    if stopwatch:
        steps = steps_of(sites, model)
        after = stopwatch.ms_converted(model, steps, *args, **kwargs) if measure_replacements and steps else None
        timed = Timed(
            machine=stopwatch.machine,
            replaced=tuple(site.name for site in sites if site.action is Action.REPLACE),
            after_ms=after,
        )
    return Plan(
        model=describe(model),
        input_size=first_size(args, kwargs),
        config=config,
        before=before,
        sites=sites,
        notes=notes,
        timed=timed,
    )


def _give_up_to_shuffles(sites: list[Site]) -> None:
    """What is replaced together with a pixel shuffle is not replaced by itself."""
    takers = {site.convolution: site.name for site in sites if site.convolution and site.action is Action.REPLACE}
    for site in sites:
        if site.name in takers:
            site.skip(f"part of {takers[site.name]}, which is replaced with it")


def _whole_cost(recording: Recording, sites: list[Site]) -> Cost:
    """The cost of the whole model; of what could not be watched, that of its sites."""
    cost, watch = recording.cost, recording.copied.way.watch
    counted = {}
    if watch < Watch.EVERYTHING:
        counted["activation_bytes"] = sum(site.before.activation_bytes for site in sites)
    if watch < Watch.OPERATIONS:
        counted["macs"] = sum(site.before.macs for site in sites)
    return cost.model_copy(update=counted)


def _notes(recording: Recording, traced: Traced, sites: list[Site]) -> list[str]:
    """What there is to say of the whole model, so that it need not be said of each of its convolutions."""
    notes = []
    if "" in traced.untraced:
        ways = {
            FoundBy.PIECES: "in pieces that it can trace",
            FoundBy.HOOKS: "by running the model",
        }
        counts = [(words, sum(site.found_by is found_by for site in sites)) for found_by, words in ways.items()]
        found = ", ".join(f"{number} {words}" for words, number in counts if number) or "none"
        what = "Convolutions and upsampling" if UPSAMPLING[0] in recording.kinds else "Convolutions"
        notes.append(f"The model as a whole {traced.untraced['']}. {what} found: {found}")
    way = recording.copied.way
    if way.words:
        lost = "MACs and activations" if way.watch < Watch.OPERATIONS else "activations"
        unseen = "; convolutions that are called as functions are not seen" if way.watch < Watch.OPERATIONS else ""
        notes.append(f"The model only runs {way.words}: its {lost} are those of its convolutions alone{unseen}")
    elif recording.on_values:
        notes.append("The forward pass depends on values: what it calls, and the shapes, are those of one run")
    return notes


def _frozen(model: nn.Module, sites: list[Site]) -> list[str]:
    """A note on frozen convolutions: what replaces them is random, so it is trainable all the same."""
    modules = dict(model.named_modules())
    names = [site.convolution or site.name for site in sites if site.action is Action.REPLACE]
    replaced = [list(modules[name].parameters()) for name in names if name in modules]
    frozen = sum(bool(tensors) and not any(each.requires_grad for each in tensors) for tensors in replaced)
    if not frozen:
        return []
    return [
        f"Frozen (requires_grad=False): {frozen} of the {len(replaced)} modules that are replaced. The new layers are"
        " trainable; a recipe that takes over their weights freezes them again with initialize.keep_frozen"
    ]


class _Refusal(NamedTuple):
    """Why a site is left alone, and the option that would replace it if there is one."""

    reason: str
    override: str = ""


class _Planner:
    """The table of decisions, row by row."""

    def __init__(
        self,
        config: ConvertConfig,
        chosen: Filter,
        include: Selector,
        exclude: Selector,
        filter_fn: FilterFunction | None,
        costs: Costs,
        costs_of_replacements: Costs,
        convolutions: Mapping[str, Convolution],
    ) -> None:
        self.config = config
        self.chosen = chosen
        self.include = include
        self.exclude = exclude
        self.filter_fn = filter_fn
        self.costs = costs
        self.costs_of_replacements = costs_of_replacements
        self.convolutions = convolutions

    def decide(self, convolution: Convolution) -> Site:
        module = convolution.module
        if module is None:
            try:
                called = convolution.calls[0]
                module = stand_in_for_upsampling(called) if called.upsampled else stand_in(called)
            except (ValueError, TypeError, RuntimeError):
                return _unusual(convolution)
        site = self._undecided(convolution, module)
        if self.config.upsample and upsamples(convolution):
            self._decide_upsampling(site, convolution, module)
            return site
        refusal = self._structure(convolution, module)
        if refusal or not isinstance(module, nn.Conv2d):
            site.skip(*refusal or _Refusal(""))
            return site
        mix, why = self._mixing(convolution, module)
        site.caution = "; ".join(filter(None, (convolution.caution, caution(module))))
        replacement = replacement_for(module, self.config, mix)
        layer = self._built(replacement, convolution).to(module.weight.dtype)
        site.reason = attribute_in_the_way(module, layer) or ""
        if site.reason:
            return site
        site.replacement = replacement
        site.replacement_cost = self.costs_of_replacements.over_all_calls(layer, convolution)
        refusal = self._unselected(convolution, module) or self._unprofitable(site, module)
        if refusal:
            site.skip(*refusal)
        else:
            site.replace(why)
        return site

    def _built(self, replacement: Replacement, convolution: Convolution) -> nn.Module:
        """The layer, without weights; one of a user's own is held against the convolution."""
        if is_built_in(self.chosen):
            return build(replacement, device="meta")
        where = f"filter {self.chosen.name} in the place of {convolution.name}"
        call = convolution.calls[0]
        try:
            layer = build(replacement, device="meta")
            with torch.no_grad():
                output = layer(torch.empty(call.input_shape, device="meta"))
        except Exception as error:  # it is the user's code: anything can come out of it
            raise UsageError(f"{where}: {type(error).__name__}: {first_line(error)}") from error
        made = tuple(getattr(output, "shape", ()))
        if made != call.output_shape:
            raise UsageError(
                f"{where}: makes {'x'.join(map(str, made)) or type(output).__name__} of"
                f" {'x'.join(map(str, call.input_shape))}, where the convolution makes"
                f" {'x'.join(map(str, call.output_shape))}"
            )
        return layer

    def _decide_upsampling(self, site: Site, convolution: Convolution, module: nn.Module) -> None:
        try:
            replacement, site.caution = replacement_for_upsampling(convolution, module, self.config, self.convolutions)
        except Refused as reason:
            site.reason = str(reason)
            return
        if convolution.owner is not None and convolution.found_by is FoundBy.HOOKS:
            site.caution = "; ".join(filter(None, (site.caution, _NUMBERED)))
        layer = build(replacement, device="meta")
        if not isinstance(module, nn.PixelShuffle):  # an Identity replaces it
            site.reason = attribute_in_the_way(module, layer) or ""
        if site.reason:
            return
        site.replacement = replacement
        worked_on = convolution
        if isinstance(module, nn.PixelShuffle):  # goes with its convolution
            worked_on = self.convolutions[convolution.fed_by]
            site.convolution = worked_on.name
            assert worked_on.module is not None
            site.before = site.after = site.before + self.costs.over_all_calls(worked_on.module, worked_on)
        layer = layer.to(worked_on.dtype)
        site.replacement_cost = self.costs_of_replacements.over_all_calls(layer, worked_on)
        refusal = (
            self._unselected(convolution, module)
            or self._excluded_with(convolution, worked_on)
            or self._undesired(site, convolution, module)
        )
        if refusal:
            site.skip(*refusal)
        else:
            site.replace(_why_upsampled(site, module))

    def _excluded_with(self, convolution: Convolution, worked_on: Convolution) -> _Refusal | None:
        excluded = self.exclude.matching(worked_on)
        if worked_on is convolution or excluded is None:
            return None
        return _Refusal(f"its convolution, {worked_on.name}, is excluded by {excluded!r}")

    def _undesired(self, site: Site, convolution: Convolution, module: nn.Module) -> _Refusal | None:
        """What of upsampling is left alone unless asked for; interpolations were, which never save anything."""
        if isinstance(module, nn.ConvTranspose2d | nn.PixelShuffle):
            return None if self.config.allow_growth else _growth(site)
        if convolution.on_image and not self.config.stem:
            return _Refusal("resizes the image: no convolution comes before it", "stem")
        if site.in_channels == 1 and not self.config.stem:  # detectors paste a mask at a time, at any size
            return _Refusal("works on a single channel: a mask, or one map of scores", "stem")
        return None

    def _undecided(self, convolution: Convolution, module: nn.Module) -> Site:
        before = self.costs.over_all_calls(module, convolution)
        kind = kind_of(module)
        function = convolution.calls[0].function if convolution.calls else None
        if function is not None:
            before = before.model_copy(update={"params": function.params})
        if convolution.module is None:
            kind = f"functional {kind}"
        first = convolution.calls[0] if convolution.calls else None
        stride: Any = getattr(_first(module), "stride", 1)
        shapes = (first.input_shape, first.output_shape) if first else ((), ())
        channels = [shape[1] if len(shape) > 1 else 0 for shape in shapes]  # of what has no channels of its own
        return Site(
            name=convolution.name,
            kind=kind,
            in_channels=getattr(module, "in_channels", channels[0]),
            out_channels=getattr(module, "out_channels", channels[1]),
            stride=stride if isinstance(stride, tuple) else (stride, stride),
            input_shape=first.input_shape if first else (),
            output_shape=first.output_shape if first else (),
            calls=len(convolution.calls),
            action=Action.SKIP,
            reason="",
            operation=operation_of(module),
            kernel_size=_kernel_size(module),
            found_by=convolution.found_by,
            before=before,
            after=before,
        )

    def _structure(self, convolution: Convolution, module: nn.Module) -> _Refusal | None:
        """What stands in the way whatever is selected."""
        reason = obstacle(module)
        if reason is not None or not isinstance(module, nn.Conv2d):
            return _Refusal(reason) if reason else None
        sizes = self.config.kernel_size
        if module.kernel_size not in [(size, size) for size in sizes]:
            listed = ", ".join(f"{size}x{size}" for size in sizes)
            return _Refusal(f"{'x'.join(map(str, module.kernel_size))} kernel; {self.chosen.words} replaces {listed}")
        if not convolution.calls:
            return _Refusal("not called in the forward pass")
        if convolution.shared_with is not None:
            return _Refusal(f"shares its weights with {convolution.shared_with}")
        if convolution.used_directly:
            return _Refusal("the forward pass also reads its weights directly")
        if convolution.module is None and (refusal := self._functional(convolution)):
            return refusal
        if self.config.mixing == "never" and module.in_channels != module.out_channels and not self.chosen.mixes:
            return _Refusal(
                f"mixing is off, and {self.chosen.words} alone cannot turn {module.in_channels} channels into"
                f" {module.out_channels}"
            )
        if module.in_channels % self.config.heads:
            return _Refusal(f"{self.config.heads} heads do not divide its {module.in_channels} channels")
        return None

    def _functional(self, convolution: Convolution) -> _Refusal | None:
        """What stands in the way of a convolution that is called as a function."""
        function = convolution.calls[0].function
        assert function is not None
        if function.computed:
            return _Refusal("called as a function, with weights that the forward pass computes")
        if convolution.used_elsewhere:
            return _Refusal("called as a function, with weights that the forward pass uses elsewhere too")
        if convolution.found_by is not FoundBy.FX:
            return _Refusal("called as a function, out of torch.fx's sight")
        if not self.config.functional:
            return _Refusal("called as a function: replacing it makes the model a GraphModule", "functional")
        return None

    def _mixing(self, convolution: Convolution, conv: nn.Conv2d) -> tuple[bool, str]:
        """Whether a 1x1 convolution follows the new layer, and why."""
        words = self.chosen.words
        one_by_one = with_mixing(words, conv.groups)
        if self.chosen.mixes:
            return False, f"{words}: it mixes channels itself"
        if self.config.mixing == "never":
            return False, f"{words} alone: mixing is off"
        if self.config.mixing == "always":
            return True, f"{one_by_one}: mixing is always on"
        if conv.in_channels != conv.out_channels:
            return True, f"{one_by_one}: it turns {conv.in_channels} channels into {conv.out_channels}"
        if is_depthwise(conv):
            return False, f"{words} alone: a depthwise convolution mixes no channels either"
        if self.config.mixing == "dense":
            return True, f"{one_by_one}: it mixed channels itself"
        if convolution.bottleneck:
            return False, "bottleneck: 1x1 convolutions on both sides mix channels"
        if convolution.found_by is not FoundBy.FX:
            return True, f"{one_by_one}: nothing else is known to mix channels"
        return True, f"{one_by_one}: nothing else mixes channels"

    def _unselected(self, convolution: Convolution, conv: nn.Module) -> _Refusal | None:
        """Whether the user's selection leaves it out."""
        excluded = self.exclude.matching(convolution)
        if excluded is not None:
            return _Refusal(f"excluded by {excluded!r}")
        if self.include.patterns and self.include.matching(convolution) is None:
            return _Refusal("outside include")
        if self.filter_fn is not None and not asked(self.filter_fn, conv, convolution.name):
            return _Refusal("filter_fn said no")
        return None

    def _unprofitable(self, site: Site, conv: nn.Conv2d) -> _Refusal | None:
        """What is left alone unless asked for."""
        cost = site.replacement_cost
        assert cost is not None
        if is_depthwise(conv):
            if self.config.depthwise:
                return None
            params = cost.params - site.before.params
            change = f"add {params:,} parameters to" if params > 0 else f"save {-params:,} parameters of"
            return _Refusal(f"{self.chosen.words} would {change} a depthwise convolution", "depthwise")
        if conv.in_channels <= STEM_CHANNELS and not self.config.stem:
            return _Refusal(f"stem: {conv.in_channels} input channels", "stem")
        return None if self.config.allow_growth or not self.chosen.saves else _growth(site)


def _kernel_size(module: nn.Module) -> tuple[int, int] | None:
    if operation_of(module) not in (Operation.CONV, Operation.CONV_TRANSPOSE):
        return None
    size = getattr(module, "kernel_size", None)
    return size if isinstance(size, tuple) and len(size) == 2 else None


def _first(module: nn.Module) -> nn.Module:
    """The part of a layer that reads its input."""
    if isinstance(module, DDFConv2d):
        return module.ddf
    return module.filter if isinstance(module, SeparableFilter2d) else module


def _growth(site: Site) -> _Refusal | None:
    """What would not get less, if anything."""
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
    return _Refusal(f"would not save: its {' and '.join(grown)}", "allow_growth") if grown else None


def _why_upsampled(site: Site, module: nn.Module) -> str:
    assert site.replacement is not None
    assert site.replacement_cost is not None
    mixes = site.replacement.layer == "DDFUpConv2d"
    if isinstance(module, nn.PixelShuffle):
        return f"1x1, then DDF-Up, for {site.convolution} and the shuffle"
    if isinstance(module, nn.ConvTranspose2d):
        return "1x1, then DDF-Up" if mixes else "DDF-Up alone: a depthwise convolution mixes no channels either"
    return f"DDF-Up for an interpolation: adds {site.replacement_cost.params:,} parameters"


def _unusual(convolution: Convolution) -> Site:
    """A functional call that no module could make: only its shapes are known."""
    call = convolution.calls[0]
    if call.upsampled:
        operation = Operation(call.upsampled.function)
    else:
        operation = Operation.CONV_TRANSPOSE if call.function and call.function.transposed else Operation.CONV
    return Site(
        name=convolution.name,
        kind="functional",
        operation=operation,
        in_channels=call.input_shape[-3],
        out_channels=call.output_shape[-3],
        stride=(0, 0),
        input_shape=call.input_shape,
        output_shape=call.output_shape,
        calls=len(convolution.calls),
        action=Action.SKIP,
        reason="called as a function, with arguments that no module takes",
        found_by=convolution.found_by,
        before=Cost(),
        after=Cost(),
    )
