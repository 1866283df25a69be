"""Reports of a conversion: terminal tables, JSON, one HTML page."""

from ddf_convert.report.comparison import Comparison, compare, report
from ddf_convert.report.data import Layer

__all__ = ["Comparison", "Layer", "compare", "report"]
