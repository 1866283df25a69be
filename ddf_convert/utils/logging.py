"""Warnings of the logger ``ddf_convert``, and how loggers are silenced."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

_logger = logging.getLogger("ddf_convert")
_TIMEOUT_S = 1.0
_warned: set[str] = set()


def warn(message: str) -> None:
    """Logs a warning."""
    _logger.warning("ddf_convert: %s", message)


def warn_once(message: str, key: str | None = None) -> None:
    """Logs a warning, once in a process; ``key`` identifies it where the message does not repeat word for word."""
    key = key or message
    if key not in _warned:
        _warned.add(key)
        warn(message)


@contextlib.contextmanager
def warn_if_slow(message: str) -> Iterator[None]:
    """Logs a warning if the block has not ended after a second."""
    timer = threading.Timer(_TIMEOUT_S, warn, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def logger_level(level: int, *names: str) -> Iterator[None]:
    """Sets the level of some loggers for the length of a block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
