"""The operator on NVIDIA GPUs: Numba-CUDA kernels, chosen and launched for a call.

Importing this module needs neither a GPU nor numba-cuda: :func:`usable` says whether a tensor can be worked on here,
and only then is anything compiled.
"""

from __future__ import annotations

from ddf_convert.cuda.dispatch import backward, filter_norm, filter_norm_backward, forward, unusable, usable

__all__ = ["backward", "filter_norm", "filter_norm_backward", "forward", "unusable", "usable"]
