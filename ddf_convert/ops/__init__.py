"""The DDF and FilterNorm operators (``ddf_convert::*``), registered with torch.library."""

from ddf_convert.ops.ddf import ddf
from ddf_convert.ops.filter_norm import filter_norm
from ddf_convert.reference.checks import COMBINATIONS, DTYPES, Geometry, check_arguments, memory_format, output_size

__all__ = [
    "COMBINATIONS",
    "DTYPES",
    "Geometry",
    "check_arguments",
    "ddf",
    "filter_norm",
    "memory_format",
    "output_size",
]
