"""matplotlib figures as file contents, without pyplot: no window system and no global state. matplotlib is an extra.

Call ``require_matplotlib("--plot")`` before the work starts, ``new_figure(width, height)`` (inches) to draw on, and
``encode_figure(figure, "png", dpi=150)`` for the bytes of a file (write them with ``artifacts.atomic.write_file``).
"""

from __future__ import annotations

import io
from typing import Any

from ddf_convert.errors import UsageError


def require_matplotlib(feature: str, alternative: str = "") -> None:
    """Raises a UsageError that names the extra to install if matplotlib is missing.

    Args:
        feature: Subject of the message: "--plot", "the picture".
        alternative: What else the user can do, added to the message: "give --no-picture".
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        hint = f", or {alternative}" if alternative else ""
        raise UsageError(f"{feature} needs matplotlib: pip install 'ddf-convert[plot]'{hint}") from error


def new_figure(width: float, height: float, layout: Any = "constrained") -> Any:
    """Returns an empty matplotlib figure of a size in inches; raises an ImportError if matplotlib is missing."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def encode_figure(figure: Any, format: str = "png", *, dpi: int, **options: Any) -> bytes:
    """Returns a figure as the content of a "png", "pdf" or "svg" file; options are those of ``Figure.savefig``."""
    content = io.BytesIO()
    figure.savefig(content, format=format, dpi=dpi, **options)
    return content.getvalue()
