"""SIGTERM and Ctrl-C end a run after the step that is under way, with a checkpoint."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun hands the Ctrl-C of a terminal on to processes that the terminal has told already: that is one, not two.
_ONE_AND_THE_SAME = 1.0  # seconds


class Interrupted(Exception):  # noqa: N818  it is no error: the run ends early, as it was told to
    """All processes have agreed to stop here."""


class Interruption:
    """Whether the run was asked to stop.

    Args:
        clock: In seconds.

    Attributes:
        asked: Whether it was.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.asked = False
        self._clock = clock
        self._since = 0.0

    def note(self, number: int, _frame: FrameType | None = None) -> None:
        """A handler of signals.

        Raises:
            KeyboardInterrupt: It is another Ctrl-C, of somebody who will not wait.
        """
        now = self._clock()
        if not self.asked:
            self.asked, self._since = True, now
        elif number == signal.SIGINT and now - self._since > _ONE_AND_THE_SAME:
            raise KeyboardInterrupt


@contextmanager
def signals_noted() -> Iterator[Interruption]:
    """A context in which SIGTERM and SIGINT are noted; only the main thread is told of any."""
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
