"""Budgets: which of the convolutions that could be replaced are, where not all should be."""

from __future__ import annotations

from dataclasses import dataclass

from ddf_convert.conversion.plan import Action, ConvertConfig, Site
from ddf_convert.cost.count import Cost


@dataclass(frozen=True)
class _Target:
    """A count that the model should come down to."""

    field: str  # of Cost
    words: str
    option: str
    most: int

    def excess(self, cost: Cost) -> int:
        return int(getattr(cost, self.field)) - self.most

    def saving(self, site: Site) -> int:
        assert site.replacement_cost is not None
        return int(getattr(site.before, self.field)) - int(getattr(site.replacement_cost, self.field))


def apply_budgets(sites: list[Site], config: ConvertConfig, before: Cost) -> list[str]:
    """Leaves alone what the configuration's budgets do not want replaced.

    First come ``keep_first`` and ``keep_last``, then ``only_faster``, then the targets. A target disturbs the model
    least where it replaces the fewest convolutions, since each one starts anew and has to be learned: so the one that
    saves most is taken first; the last one taken is the smallest that is enough. Of two that save alike, the one
    nearer to the output is taken: less of the model sees features that changed. No convolution is replaced that the
    targets can do without.

    Args:
        sites: Every convolution, in the order of the forward pass; those marked to be replaced are the candidates.
        config: The budgets.
        before: Cost of the whole model.

    Returns:
        What could not be reached, in words.
    """
    _keep_ends(sites, config)
    if config.only_faster:
        _keep_slower(sites)
    targets = [
        _Target(field, words, option, most)
        for field, words, option, most in (
            ("macs", "MACs", "target_macs", config.target_macs),
            ("params", "parameters", "target_params", config.target_params),
        )
        if most is not None
    ]
    return _meet(targets, sites, before) if targets else []


def _candidates(sites: list[Site]) -> list[Site]:
    return [site for site in sites if site.action is Action.REPLACE]


def _keep_ends(sites: list[Site], config: ConvertConfig) -> None:
    candidates = _candidates(sites)
    for site in candidates[: config.keep_first]:
        site.skip(f"kept: among the first {config.keep_first} (keep_first)")
    for site in candidates[len(candidates) - config.keep_last :] if config.keep_last else []:
        site.skip(f"kept: among the last {config.keep_last} (keep_last)")


def _keep_slower(sites: list[Site]) -> None:
    for site in _candidates(sites):
        before, after = site.before.latency_ms, site.after.latency_ms
        if before is not None and after is not None and after >= before:
            site.skip(f"would not be faster here: {before:.3g} ms would become {after:.3g} ms (only_faster)")


def _meet(targets: list[_Target], sites: list[Site], before: Cost) -> list[str]:
    candidates = _candidates(sites)
    chosen = _chosen(targets, candidates, before)
    wanted = " and ".join(target.option for target in targets)
    for position, site in enumerate(candidates):
        if position not in chosen:
            site.skip(f"not needed for {wanted}")
    left = {
        target: target.excess(before) - sum(target.saving(candidates[position]) for position in chosen)
        for target in targets
    }
    return [
        f"{target.option} {target.most:,} is out of reach: {target.most + excess:,} {target.words} are left when"
        " everything is replaced that can be and helps"
        for target, excess in left.items()
        if excess > 0
    ]


def _chosen(targets: list[_Target], candidates: list[Site], before: Cost) -> set[int]:
    """Positions of the candidates to replace."""
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
    """How much of the need a replacement covers; beyond the need it counts for nothing, and against it among equals."""
    shares = [saving[target] / excess for target, excess in left.items() if excess > 0]
    return sum(min(share, 1.0) for share in shares), -sum(shares)
