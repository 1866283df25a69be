"""Which of a plan's convolutions a reader wants to see one by one, and which are only counted."""

from __future__ import annotations

import re
from collections import Counter

from ddf_convert.graph.plan import Action, Plan, Site


def becomes(site: Site) -> str:
    """What takes the convolution's place, in a word or two."""
    if site.replacement is None:
        return "-"
    if site.replacement.layer == "DDF2d":
        return "DDF"
    return "DDF + 1x1" if site.replacement.options.get("groups", 1) == 1 else "DDF + grouped 1x1"


def left_alone(plan: Plan) -> list[Site]:
    """The skipped convolutions that one might have expected to see replaced: the 3x3 and the functional ones."""
    return [site for site in plan.sites if site.action is Action.SKIP and not _expected(site)]


def others(plan: Plan) -> list[Site]:
    """The other skipped convolutions: of other kernel sizes, and DDF layers."""
    return [site for site in plan.sites if site.action is Action.SKIP and _expected(site)]


def counted(sites: list[Site]) -> str:
    """``"36 of 1x1, 1 of 7x7"``, the most frequent first."""
    kernels = Counter(_kernel(site) for site in sites)
    return ", ".join(f"{number} {kernel}" for kernel, number in kernels.most_common())


def _kernel(site: Site) -> str:
    size = re.search(r"\d+x\d+$", site.kind)
    return f"of {size.group()}" if size else site.kind


def _expected(site: Site) -> bool:
    return site.kind == "DDF" or (_kernel(site).startswith("of ") and not site.kind.endswith("3x3"))
