"""What the package tells its users unasked, as warnings of the logger ``ddf_convert``."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_logger = logging.getLogger("ddf_convert")
_TIMEOUT_S = 1.0  # seconds of silence
_told: set[str] = set()


def warn(message: str) -> None:
    """Says it."""
    _logger.warning("ddf_convert: %s", message)


def warn_once(message: str, key: str | None = None) -> None:
    """Says it, unless this process has said it before.

    Args:
        message: What to say.
        key: What stands for the message, where it does not repeat word for word.
    """
    key = key or message
    if key not in _told:
        _told.add(key)
        warn(message)


@contextlib.contextmanager
def warn_if_slow(message: str) -> Iterator[None]:
    """Says it if what stands under it has not ended after a second."""
    announcement = threading.Timer(_TIMEOUT_S, warn, [message])
    announcement.daemon = True
    announcement.start()
    try:
        yield
    finally:
        announcement.cancel()
