"""What a plan saves, for people and for programs: terminal tables, JSON, one HTML page."""

from ddf_convert.report.html import page
from ddf_convert.report.model import report

__all__ = ["page", "report"]
