"""What a run tells while it goes on, on stderr: a moving line on a terminal, a line for every epoch elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars


class Progress:
    """Says nothing; what every process but the first one has."""

    def say(self, line: str) -> None:
        """A line that stays."""

    @contextlib.contextmanager
    def counting(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """A context in which ``step`` counts.

        Args:
            what: Is being done.
            total: How many steps there are.
            done: How many are done already.
        """
        yield

    def step(self, figures: str = "") -> None:
        """One step is done.

        Args:
            figures: What to show beside the bar until the next step.
        """


class Lines(Progress):
    """Lines alone, for a file or a pipe.

    Args:
        console: Where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """A line that stays."""
        self._console.print(escape(line), soft_wrap=True)


class Moving(Lines):
    """A bar with figures and the time that is left, and the lines above it.

    Args:
        console: A terminal.
        bars: Drawn there.
    """

    def __init__(self, console: Console, bars: Bars) -> None:
        super().__init__(console)
        self._bars = bars
        self._tasks: list[TaskID] = []

    @contextlib.contextmanager
    def counting(self, what: str, total: int, done: int = 0) -> Iterator[None]:
        """A context in which ``step`` counts; one inside another has a bar of its own."""
        self._tasks.append(self._bars.add_task(escape(what), total=total, completed=done, figures=""))
        try:
            yield
        finally:
            self._bars.remove_task(self._tasks.pop())

    def step(self, figures: str = "") -> None:
        """One step is done."""
        self._bars.update(self._tasks[-1], advance=1, figures=escape(figures))


@contextlib.contextmanager
def telling(talks: bool) -> Iterator[Progress]:
    """A context that gives the progress of this process.

    Args:
        talks: Whether it is the one that does.
    """
    if not talks:
        yield Progress()
        return
    console = Console(stderr=True, highlight=False, emoji=False)
    if not console.is_terminal:
        yield Lines(console)
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
        yield Moving(console, bars)
