"""The operators on NVIDIA GPUs: Numba-CUDA kernels.

Importing this module needs neither a GPU nor numba-cuda: :func:`usable` says whether the kernels can run.
"""

from __future__ import annotations

from ddf_convert.cuda.dispatch import backward, filter_norm, filter_norm_backward, forward, unusable, usable

__all__ = ["backward", "filter_norm", "filter_norm_backward", "forward", "unusable", "usable"]
