"""SIGTERM and Ctrl-C end a run after the step that is under way, with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun passes the Ctrl-C of a terminal on to processes that got it from the terminal already: one, not two.
_SAME_SIGNAL_S = 1.0


class Interrupted(Exception):  # noqa: N818  no error: the run ends early because it was asked to
    """All processes have agreed to stop here."""


class Interruption:
    """Records, in ``requested``, whether a signal asked the run to stop; ``clock`` is in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.requested = False
        self._clock = clock
        self._since = 0.0

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """Handles a signal; raises a KeyboardInterrupt at a second Ctrl-C, of somebody who will not wait."""
        now = self._clock()
        if not self.requested:
            self.requested, self._since = True, now
        elif number == signal.SIGINT and now - self._since > _SAME_SIGNAL_S:
            raise KeyboardInterrupt


@contextmanager
def signals_noted() -> Iterator[Interruption]:
    """A context in which SIGTERM and SIGINT are recorded; only the main thread gets any."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
