"""The progress of a run, on stderr: a bar on a terminal, a line for every epoch elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Shows nothing: for every process but the first one."""

    def say(self, line: str) -> None:
        """Prints a line that stays."""

    @contextlib.contextmanager
    def counting(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """Returns a context in which :meth:`step` counts from ``done`` to ``total``; they can be nested."""
        yield

    def step(self, figures: str = "") -> None:
        """Counts a step, and shows figures beside the bar until the next one."""


class LineProgress(Progress):
    """Prints lines alone, for a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self._console.print(escape(line), soft_wrap=True)


class BarProgress(LineProgress):
    """Draws a bar with figures and the time that is left, below the lines, on a terminal."""

    def __init__(self, console: Console, bars: Bars) -> None:
        super().__init__(console)
        self._bars = bars
        self._tasks: list[TaskID] = []

    @contextlib.contextmanager
    def counting(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """Returns a context in which :meth:`step` moves a bar of its own."""
        self._tasks.append(self._bars.add_task(escape(what), total=total, completed=done, figures=""))
        try:
            yield
        finally:
            self._bars.remove_task(self._tasks.pop())

    def step(self, figures: str = "") -> None:
        """Counts a step, and shows figures beside the bar until the next one."""
        self._bars.update(self._tasks[-1], advance=1, figures=escape(figures))


@contextlib.contextmanager
def progress_of(is_main: bool) -> Iterator[Progress]:
    """A context that gives the progress of this process, which is shown by the first one alone."""
    if not is_main:
        yield Progress()
        return
    console = Console(stderr=True, highlight=False, emoji=False)
    if not console.is_terminal:
        yield LineProgress(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        yield BarProgress(console, bars)
