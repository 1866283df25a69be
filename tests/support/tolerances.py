"""What rounding may change, derived from the dtype and from how results come about, for the tests to compare by.

Two results of one formula differ by the order of their sums, which depends on the processor, the number of threads and
the versions of libraries. A tolerance that one machine gave fails on the next.

- One layer: a sum of n products, in two orders, differs by some sqrt(n) * eps of its largest terms (Higham, "Accuracy
  and Stability of Numerical Algorithms", section 2.8: rounding errors add up like a random walk). The factor 16 is for
  the worst of thousands of elements, and for the few roundings before and behind the sum.
- Many layers: each enlarges what the layers before it did, by a factor that depends on the weights: no more than half
  of the digits may be lost, sqrt(eps). In float64 that is 1.5e-8, far from any mistake: a tap that is left out or a
  padding that is off by one changes a result by more than a hundredth of its size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def shallow(dtype: torch.dtype, terms: int = 9) -> float:
    """For results of one layer, relative to the largest value.

    Args:
        dtype: In which it calculates, or the coarsest on the way.
        terms: How many products a sum has; 9 is a 3x3 filter of one channel.
    """
    return 16 * math.sqrt(terms) * torch.finfo(dtype).eps


def deep(dtype: torch.dtype) -> float:
    """For results of a network, or of a factorization, relative to the largest value."""
    return math.sqrt(torch.finfo(dtype).eps)


def bounds(expected: Any, relative: float) -> dict[str, Any]:
    """``rtol`` and ``atol`` for torch's comparisons of nested tensors, relative to the largest value."""
    tensors = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
    largest = max((tensor.detach().abs().max().item() for tensor in tensors if tensor.numel()), default=0.0)
    return {"rtol": relative, "atol": relative * largest}


def near(dtype: torch.dtype, expected: Any, terms: int = 9) -> dict[str, Any]:
    """:func:`bounds` for one layer."""
    return bounds(expected, shallow(dtype, terms))


def far(dtype: torch.dtype, expected: Any) -> dict[str, Any]:
    """:func:`bounds` for a network."""
    return bounds(expected, deep(dtype))
