"""Planning: what happens to every convolution of a model, and why, before anything changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ddf_convert.conversion.analysis import find_candidates
from ddf_convert.conversion.budget import CandidateCosts, Stopwatch, apply_budgets
from ddf_convert.conversion.config import ConvertConfig, make_config
from ddf_convert.conversion.decisions import Decider, FilterFunction, Patterns, Selection, check_argument_order
from ddf_convert.conversion.plan import Action, FoundBy, Plan, Site, Timed
from ddf_convert.conversion.recorder import Recording, record
from ddf_convert.conversion.registry import DDF, find_layer_type
from ddf_convert.conversion.rewriter import replacements_of
from ddf_convert.conversion.sites import UPSAMPLING
from ddf_convert.conversion.tracer import Traced, trace
from ddf_convert.conversion.verify import verify
from ddf_convert.cost.count import Cost
from ddf_convert.errors import UsageError
from ddf_convert.utils.example_input import ExampleInput, as_arguments, first_size
from ddf_convert.utils.fake_copy import Watch
from ddf_convert.utils.modules import bare, model_name


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
    """Decides what happens to every convolution of a model, which stays as it is.

    The model is run on shapes alone, on any device (the meta device too: weights are never read). Only a model whose
    forward depends on values, such as a detector, is run on the example input itself, as a copy.

    Args:
        model: Any module. What torch.fx cannot trace is traced in pieces, or found by running the model; each site
            says which (``found_by``), and what is less certain for it (``caution``).
        example_input: (B, C, H, W); or a tuple of arguments for forward, or a dict of them by name. Only shapes matter.
        config: How to convert.
        include: Names, globs or ``re:`` patterns of the convolutions to consider; None for all.
        exclude: The same for those to leave alone; it wins over ``include``.
        filter_fn: Called with the module and the name of each convolution that could be replaced and is not excluded,
            as torchao's; False leaves it alone.
        measure: Also time the model, every convolution and its possible replacement: on the model's device (the CPU
            for the meta device), or the one given.
        **options: Single fields of the config, such as ``se_ratio=0.5``.

    Returns:
        A decision and a reason for every 2D convolution and, with ``upsample=True``, for every upsampling. It can be
        edited, and is applied by ``convert``.

    Raises:
        UsageError: The model does not accept the input or cannot be copied, a pattern matches nothing, an option is
            wrong, or ``filter_fn`` fails or takes its arguments the other way round.
        DDFError: What is to be timed does not run.
    """
    return _plan(model, example_input, make_config(config, options), include, exclude, filter_fn, measure)


def plan_without_replacing(
    model: nn.Module, example_input: ExampleInput, measure: bool = False, upsample: bool = False
) -> Plan:
    """Plans a model whose present costs are all that matters: replacements are neither timed nor verified."""
    return _plan(model, example_input, ConvertConfig(upsample=upsample), measure=measure, applied=False)


def _plan(
    model: nn.Module,
    example_input: ExampleInput,
    config: ConvertConfig,
    include: Patterns = None,
    exclude: Patterns = None,
    filter_fn: FilterFunction | None = None,
    measure: bool | torch.device | str = False,
    applied: bool = True,
) -> Plan:
    layer_type = find_layer_type(config.filter)
    layer_type.arguments(config)  # refuses what does not go together before the model is run
    if config.upsample and layer_type.name != DDF:
        raise UsageError(
            f"upsampling is replaced by DDF-Up, and not by filter {layer_type.name}: leave one of the two out"
        )
    if filter_fn is not None:
        check_argument_order(filter_fn)
    model = bare(model)
    args, kwargs = as_arguments(model, example_input)
    recording = record(model, args, kwargs, model_name(model), config.upsample)
    traced = trace(model, recording)
    candidates = find_candidates(model, recording, traced)
    stopwatch = Stopwatch(model, measure) if measure or config.only_faster else None
    time_replacements = (measure and applied) or config.only_faster
    costs = CandidateCosts(stopwatch)
    decider = Decider(
        config=config,
        layer_type=layer_type,
        selection=Selection(candidates, include, exclude, filter_fn),
        costs=costs,
        replacement_costs=costs if time_replacements else CandidateCosts(None),
        candidates={name: candidate for candidate in candidates for name in candidate.names},
    )
    sites = [decider.decide(candidate) for candidate in candidates]
    _skip_convolutions_of_shuffles(sites)
    if applied:
        verify(model, recording, traced, sites)
    before, timed = _cost_of_model(recording, sites), None
    if stopwatch:
        before = before.model_copy(update={"latency_ms": stopwatch.ms(model, *args, **kwargs)})
    notes = [*_notes_on_tracing(recording, traced, sites), *apply_budgets(sites, config, before)]
    notes += _notes_on_frozen(model, sites)
    if stopwatch:
        replacements = replacements_of(sites, model)
        after = None
        if time_replacements and replacements:
            after = stopwatch.ms_converted(model, replacements, *args, **kwargs)
        replaced = tuple(site.name for site in sites if site.action is Action.REPLACE)
        timed = Timed(machine=stopwatch.machine, replaced=replaced, after_ms=after)
    return Plan(
        model=model_name(model),
        input_size=first_size(args, kwargs),
        config=config,
        before=before,
        sites=sites,
        notes=notes,
        timed=timed,
    )


def _skip_convolutions_of_shuffles(sites: list[Site]) -> None:
    """Skips what is replaced together with a pixel shuffle."""
    takers = {site.convolution: site.name for site in sites if site.convolution and site.action is Action.REPLACE}
    for site in sites:
        if site.name in takers:
            site.skip(f"part of {takers[site.name]}, which is replaced with it")


def _cost_of_model(recording: Recording, sites: list[Site]) -> Cost:
    """The cost of the whole model, as far as it could be watched; for the rest, that of its sites."""
    cost, watch = recording.cost, recording.copied.run_mode.watch
    counted = {}
    if watch < Watch.EVERYTHING:
        counted["activation_bytes"] = sum(site.before.activation_bytes for site in sites)
    if watch < Watch.OPERATIONS:
        counted["macs"] = sum(site.before.macs for site in sites)
    return cost.model_copy(update=counted)


def _notes_on_tracing(recording: Recording, traced: Traced, sites: list[Site]) -> list[str]:
    """Notes that hold for the whole model, so that its sites need not repeat them."""
    notes = []
    if "" in traced.untraced:
        ways = {
            FoundBy.PIECES: "in pieces that it can trace",
            FoundBy.HOOKS: "by running the model",
        }
        counts = [(words, sum(site.found_by is found_by for site in sites)) for found_by, words in ways.items()]
        listed = ", ".join(f"{number} {words}" for words, number in counts if number) or "none"
        what = "Convolutions and upsampling" if UPSAMPLING[0] in recording.kinds else "Convolutions"
        notes.append(f"The model as a whole {traced.untraced['']}. {what} found: {listed}")
    mode = recording.copied.run_mode
    if mode.note:
        lost = "MACs and activations" if mode.watch < Watch.OPERATIONS else "activations"
        unseen = "; convolutions that are called as functions are not seen" if mode.watch < Watch.OPERATIONS else ""
        notes.append(f"The model only runs {mode.note}: its {lost} are those of its convolutions alone{unseen}")
    elif recording.on_values:
        notes.append("The forward pass depends on values: what it calls, and the shapes, are those of one run")
    return notes


def _notes_on_frozen(model: nn.Module, sites: list[Site]) -> list[str]:
    """A note on frozen convolutions: their replacements start from random weights and are trainable."""
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
