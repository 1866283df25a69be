"""Costs and budgets: what candidates and their replacements cost, and which are replaced where not all should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddf_convert.conversion.analysis import Candidate
from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.conversion.plan import Action, Site
from ddf_convert.conversion.record import AppliedReplacement
from ddf_convert.conversion.recorder import Call
from ddf_convert.conversion.rewriter import apply_replacements
from ddf_convert.cost import count
from ddf_convert.cost.count import Cost, count_parameters
from ddf_convert.cost.timing import device_of, forward_ms
from ddf_convert.utils.device import describe as describe_machine
from ddf_convert.utils.device import describe_short
from ddf_convert.utils.fake_copy import real_copy


class Stopwatch:
    """Times modules on one device: the given one or, for True, the model's (the CPU for the meta device)."""

    def __init__(self, model: nn.Module, device: bool | torch.device | str) -> None:
        own = device_of(model)
        default = torch.device("cpu") if own.type == "meta" else own
        self.device = default if isinstance(device, bool) else torch.device(device)
        self.machine = describe_short(describe_machine(self.device))

    def ms(self, module: nn.Module, *args: Any, **kwargs: Any) -> float:
        """Returns milliseconds of one forward pass."""
        if next(module.parameters(), None) is None:  # an interpolation has no tensor that says where it runs
            module = _OnDevice(module)
        return forward_ms(real_copy(module).module.to(self.device), *args, kwargs=kwargs)

    def ms_converted(
        self, model: nn.Module, replacements: Sequence[AppliedReplacement], *args: Any, **kwargs: Any
    ) -> float:
        """Returns milliseconds of one forward pass of the converted model."""
        return self.ms(apply_replacements(real_copy(model).module, replacements), *args, **kwargs)


class _OnDevice(nn.Sequential):
    """A module without parameters, with an empty one that moves with it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.empty = nn.Parameter(torch.empty(0))


class CandidateCosts:
    """Costs of layers over all the calls of a candidate. Equal layers, of which models have many, run once."""

    def __init__(self, stopwatch: Stopwatch | None) -> None:
        self._stopwatch = stopwatch
        self._measured: dict[tuple[Any, ...], Cost] = {}

    def over_all_calls(self, module: nn.Module, candidate: Candidate) -> Cost:
        """Counts parameters once; MACs, activations and time for each call, at its shape."""
        total = Cost(params=count_parameters(module), latency_ms=0.0 if self._stopwatch else None)
        for call in candidate.calls:
            total += self._of_one_call(module, call).model_copy(update={"params": 0})
        return total

    def _of_one_call(self, module: nn.Module, call: Call) -> Cost:
        shape = call.input_shape
        dtype = next((parameter.dtype for parameter in module.parameters()), call.dtype)
        key = (type(module), repr(module), dtype, shape)  # the repr shows every argument of these classes
        if key not in self._measured:
            image = torch.empty(shape, dtype=dtype, device="meta")
            cost = count.measure(module, image)
            if self._stopwatch:
                cost = cost.model_copy(update={"latency_ms": self._stopwatch.ms(module, image)})
            self._measured[key] = cost
        return self._measured[key]


# --- budgets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Target:
    """A limit on one field of a model's Cost."""

    field: str
    title: str
    option: str
    limit: int

    def excess(self, cost: Cost) -> int:
        return int(getattr(cost, self.field)) - self.limit

    def saving(self, site: Site) -> int:
        assert site.replacement_cost is not None
        return int(getattr(site.before, self.field)) - int(getattr(site.replacement_cost, self.field))


def apply_budgets(sites: list[Site], config: ConvertConfig, before: Cost) -> list[str]:
    """Skips the sites that the configuration's budgets leave out; returns which targets could not be reached.

    First come ``keep_first`` and ``keep_last``, then ``only_faster``, then the targets. New layers have to be learned
    from random weights, so a target is reached with as few as possible: the site that saves most is replaced first, and
    the last one is the smallest that is enough. Of two that save the same, the one nearer to the output is replaced:
    less of the model sees features that changed. No site is replaced that the targets can do without.
    """
    _keep_ends(sites, config)
    if config.only_faster:
        _skip_slower(sites)
    targets = [
        _Target(field, title, option, limit)
        for field, title, option, limit in (
            ("macs", "MACs", "target_macs", config.target_macs),
            ("params", "parameters", "target_params", config.target_params),
        )
        if limit is not None
    ]
    return _reach_targets(targets, sites, before) if targets else []


def _to_be_replaced(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.action is Action.REPLACE]


def _keep_ends(sites: list[Site], config: ConvertConfig) -> None:
    candidates = _to_be_replaced(sites)
    for site in candidates[: config.keep_first]:
        site.skip(f"kept: among the first {config.keep_first} (keep_first)")
    for site in candidates[len(candidates) - config.keep_last :] if config.keep_last else []:
        site.skip(f"kept: among the last {config.keep_last} (keep_last)")


def _skip_slower(sites: list[Site]) -> None:
    for site in _to_be_replaced(sites):
        before, after = site.before.latency_ms, site.after.latency_ms
        if before is not None and after is not None and after >= before:
            site.skip(f"would not be faster here: {before:.3g} ms would become {after:.3g} ms (only_faster)")


def _reach_targets(targets: list[_Target], sites: list[Site], before: Cost) -> list[str]:
    candidates = _to_be_replaced(sites)
    chosen = _choose(targets, candidates, before)
    wanted = " and ".join(target.option for target in targets)
    for position, site in enumerate(candidates):
        if position not in chosen:
            site.skip(f"not needed for {wanted}")
    left = {
        target: target.excess(before) - sum(target.saving(candidates[position]) for position in chosen)
        for target in targets
    }
    return [
        f"{target.option} {target.limit:,} is out of reach: {target.limit + excess:,} {target.title} are left when"
        " everything is replaced that can be and helps"
        for target, excess in left.items()
        if excess > 0
    ]


def _choose(targets: list[_Target], candidates: list[Site], before: Cost) -> set[int]:
    """Returns the positions of the sites to replace."""
    savings = [{target: target.saving(site) for target in targets} for site in candidates]
    left = {target: target.excess(before) for target in targets}
    chosen: set[int] = set()
    while any(excess > 0 for excess in left.values()):
        worth = {
            position: _worth(savings[position], left) for position in range(len(candidates)) if position not in chosen
        }
        best = max(worth, key=lambda position: (worth[position], position), default=None)
        if best is None or worth[best][0] <= 0:
            break
        chosen.add(best)
        left = {target: excess - savings[best][target] for target, excess in left.items()}
    # What was taken for one target can turn out to be covered by what was taken for the other.
    for position in sorted(chosen, key=lambda position: sum(savings[position].values())):
        without = {target: excess + savings[position][target] for target, excess in left.items()}
        if all(excess <= 0 for excess in without.values()):
            chosen.remove(position)
            left = without
    return chosen


def _worth(saving: dict[_Target, int], left: dict[_Target, int]) -> tuple[float, float]:
    """How much of what is left a replacement covers; more than that counts for nothing, and against it among equals."""
    shares = [saving[target] / excess for target, excess in left.items() if excess > 0]
    return sum(min(share, 1.0) for share in shares), -sum(shares)
