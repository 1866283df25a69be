"""What a conversion saves, for people and for programs: terminal tables, JSON, one HTML page."""

from ddf_convert.report.comparison import Comparison, Layer, compare
from ddf_convert.report.model import report

__all__ = ["Comparison", "Layer", "compare", "report"]
