"""Conditions on sizes that may be symbolic: ``torch.export`` and ``torch.compile`` trace forward passes with them."""

from __future__ import annotations

from typing import Any

import torch


def surely(condition: Any) -> bool:
    """Whether a condition holds; False where that depends on a size that is still open.

    ``bool`` of an open one would have the tracer settle it as it is for the example, and what is exported would be
    wrong, or refuse to run, at other sizes.

    Args:
        condition: A bool, or what a comparison of symbolic sizes gives.
    """
    if not isinstance(condition, torch.SymBool):
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))
