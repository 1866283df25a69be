"""The log of a run (``log.csv``, and events for TensorBoard where that is installed) and its curves."""

from __future__ import annotations

import csv
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.training.checkpoints import set_aside
from ddf_convert.utils.figures import encode_figure, new_figure
from ddf_convert.utils.logging import warn

FILE = "log.csv"
TENSORBOARD = "tensorboard"
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # replaces bytes that are no text
_TRAIN, _VALIDATION = "#1f77b4", "#d62728"
_SHADE = "#f1f1f1"
_DPI = 150
_ACCURACIES = (("top1", "top-1 accuracy"), ("agreement", "agreement with the original"))
_SMOOTHED_FROM = 8  # points; fewer are seen better as they are


class _AnyRow(Protocol):
    @property
    def kind(self) -> str: ...

    @property
    def step(self) -> int: ...


RowT = TypeVar("RowT", bound=_AnyRow)


class ReadLog(NamedTuple, Generic[RowT]):
    """What a log file holds."""

    rows: list[RowT]
    fault: str | None = None  # what is wrong with the file
    unfinished: bool = False  # its last line was cut off


class LogFile(ABC, Generic[RowT]):
    """Writes rows to a file: each is in it, whole, when :meth:`write` returns.

    A log to go on with that is damaged is kept under another name, and the rows that can be read are taken over. What
    is deleted while the run goes on is written again.

    Args:
        file: Made if need be.
        resumed_at: The step whose checkpoint the run goes on from: rows of later steps are cut off, since they will
            come again. None begins a new log.

    Attributes:
        rows: Those in the file.
        evaluated: The step of the last evaluation, one whose row was cut off among them; None if that is not known.
    """

    header = ""  # first line of the file

    def __init__(self, file: Path, resumed_at: int | None = None) -> None:
        self.file = file
        self.rows: list[RowT] = []
        self.evaluated: int | None = None
        self._written: set[tuple[str, int]] = set()
        if resumed_at is not None and os.path.lexists(file):
            found = self.read(file)
            if found.fault is not None:
                taken = f"{len(found.rows):,} of its rows are taken over" if found.rows else "a new one begins"
                set_aside(file, found.fault, taken)
            elif found.unfinished:
                warn(f"{file}: its last line was not finished, and is left out")
            for row in found.rows:
                if row.step <= resumed_at:
                    self._add(row)
            if found.fault is None and not found.unfinished:
                self.evaluated = max((row.step for row in found.rows if row.kind == "validation"), default=None)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {file}: {error.strerror}") from error
        write_file(file, self.header + "".join(map(self.line, self.rows)))

    @staticmethod
    @abstractmethod
    def line(row: RowT) -> str:
        """Returns a row as a line."""

    @staticmethod
    @abstractmethod
    def read(file: Path) -> ReadLog[RowT]:
        """Returns what can be read of a file."""

    def write(self, row: RowT) -> bool:
        """Adds a row. Returns False if there is one of its kind and step already."""
        if not self._add(row):
            return False
        lost = not self.file.exists() or not self.file.stat().st_size
        text = self.header + "".join(map(self.line, self.rows)) if lost else self.line(row)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as file:  # one system call for a line
                if file.write(text.encode()) != len(text.encode()):
                    raise OSError(0, "the disk is full")
        except OSError as error:
            raise DDFError(f"could not write {self.file}: {error.strerror}") from error
        return True

    def close(self) -> None:
        """Ends what is written beside the file."""

    def _add(self, row: RowT) -> bool:
        if (row.kind, row.step) in self._written:
            return False
        self._written.add((row.kind, row.step))
        self.rows.append(row)
        if row.kind == "validation":
            self.evaluated = row.step
        return True


def read_lines(file: Path) -> tuple[str, str | None, bool]:
    """Returns the finished lines of a text file, what is wrong with it, and whether its last line was cut off."""
    fault = None
    try:
        content = file.read_bytes()
        text = content.decode()
    except OSError as error:
        return "", error.strerror or "it cannot be read", False
    except UnicodeDecodeError:
        text, fault = content.decode(errors="replace"), "it is not text"
    if not text:
        return "", "it is empty", False
    whole, end, rest = text.rpartition("\n")
    return whole + end, fault, bool(rest)


@dataclass(frozen=True)
class Row:
    """A row of the log: an interval of training, or an evaluation. What was not measured is None, an empty cell.

    Attributes:
        kind: "train" or "validation".
        step: Optimizer steps since the run began.
        epoch: Passes over the data since the run began.
        stage: Name of the stage.
        loss: What is minimized, a mean over the interval or the evaluated images.
        task: Its part against the labels, unweighted.
        logits: Its part against the original's class probabilities, unweighted.
        features: Its part against the original's layers, unweighted.
        top1: Fraction of images whose label has the highest score.
        top5: Fraction of images whose label is among the five highest.
        agreement: Fraction of images whose highest score is also the original's.
        lr: Learning rate of the new layers.
        grad_norm: Norm of the gradient before clipping.
        images: Images seen or evaluated by all processes.
        images_per_s: Images a second, all processes together.
        seconds: Seconds since the run began, interruptions left out.
    """

    kind: Literal["train", "validation"]
    step: int
    epoch: float
    stage: str
    loss: float | None = None
    task: float | None = None
    logits: float | None = None
    features: float | None = None
    top1: float | None = None
    top5: float | None = None
    agreement: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    images: int | None = None
    images_per_s: float | None = None
    seconds: float | None = None


COLUMNS = tuple(field.name for field in fields(Row))
_WORDS = ("kind", "stage")
_COUNTS = ("step", "images")
_TAGS = tuple(name for name in COLUMNS if name not in ("kind", "step", "stage"))


class Log(LogFile[Row]):
    """The log of ``finetune``: ``log.csv`` in a folder, and events for TensorBoard beside it."""

    header = ",".join(COLUMNS) + "\n"

    def __init__(self, folder: str | os.PathLike[str], resumed_at: int | None = None) -> None:
        super().__init__(Path(folder, FILE), resumed_at)
        self._events = _Events(Path(folder, TENSORBOARD), self.rows, resumed_at)

    @staticmethod
    def line(row: Row) -> str:
        """Returns a row as a line."""
        return _csv("" if value is None else str(value) for value in astuple(row))

    @staticmethod
    def read(file: Path) -> ReadLog[Row]:
        """Returns what can be read of a file."""
        text, fault, unfinished = read_lines(file)
        try:
            lines = list(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as error:
            return ReadLog([], fault or str(error))
        if not lines or tuple(lines[0]) != COLUMNS:
            return ReadLog([], fault or "its columns are others")
        rows = []
        for cells in lines[1:]:
            try:
                rows.append(_row(cells))
            except ValueError:
                fault = fault or f"a row is damaged: {','.join(cells):.60}"
        return ReadLog(rows, fault, unfinished)

    def write(self, row: Row) -> bool:
        """Adds a row to the file and to the events."""
        if added := super().write(row):
            self._events.write(row, self.rows)
        return added

    def close(self) -> None:
        """Ends the files of TensorBoard."""
        self._events.close()


def read(file: str | os.PathLike[str]) -> list[Row]:
    """Returns the rows of a log in their order. A last line that was not finished is left out."""
    found = Log.read(Path(file))
    if found.fault is not None:
        raise UsageError(f"cannot read the log {file}: {found.fault}")
    return found.rows


def _row(cells: list[str]) -> Row:
    values: dict[str, Any] = {}
    if any(_UNREADABLE in cell for cell in cells):
        raise ValueError("bytes that are no text")
    for name, cell in zip(COLUMNS, cells, strict=True):
        if name in _WORDS:
            values[name] = cell
        elif cell:
            values[name] = int(cell) if name in _COUNTS else float(cell)
        else:
            values[name] = None
    if values["kind"] not in ("train", "validation") or values["step"] is None or values["epoch"] is None:
        raise ValueError("a value that no row has")
    return Row(**values)


def _csv(cells: Iterable[str]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


class _Events:
    """Writes rows for TensorBoard, where that is installed. What goes wrong with its files does not stop the run."""

    def __init__(self, folder: Path, rows: Sequence[Row], resumed_at: int | None) -> None:
        self._folder = folder
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._summary_writer: Any = SummaryWriter
        if os.path.lexists(folder) and not folder.is_dir():
            set_aside(folder, "it is no folder", "a new one begins")
        if folder.is_dir():
            purge_step = None if resumed_at is None else resumed_at + 1  # TensorBoard ignores later steps before it
            self._attempt(self._begin, [], purge_step)
        else:
            self._attempt(self._begin, rows)

    def write(self, row: Row, rows: Sequence[Row]) -> None:
        """Adds a row; all ``rows``, it among them, if the folder was deleted."""
        if self._writer is None:
            return
        if self._folder.is_dir():
            self._attempt(self._add, [row])
        else:
            self._attempt(self._begin, rows)

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None and self._folder.is_dir():
            self._attempt(self._writer.close)

    def _begin(self, rows: Sequence[Row], purge_step: int | None = None) -> None:
        self._writer = self._summary_writer(str(self._folder), purge_step=purge_step)
        self._add(rows)

    def _add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            for name in _TAGS:
                if (value := getattr(row, name)) is not None:
                    self._writer.add_scalar(f"{row.kind}/{name}", value, row.step)
        self._writer.flush()

    def _attempt(self, action: Callable[..., None], *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self._writer = None
            warn(f"{self._folder} cannot be written ({error.strerror}): the figures are in {FILE} alone")


def draw(rows: Sequence[Row]) -> bytes:
    """Draws loss and accuracy (top-1, else agreement) over the epochs, with the stages marked and named."""
    measured = next(
        ((name, title) for name, title in _ACCURACIES if any(getattr(row, name) is not None for row in rows)), None
    )
    panels = [("loss", "loss"), *([measured] if measured else [])]
    figure = new_figure(6 * len(panels) + 0.5, 4.2)
    for axis, (name, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _mark_stages(axis, rows)
        _panel(axis, rows, name)
        axis.set_xlabel("epoch")
        axis.set_title(title, fontweight="bold", pad=26 if len({row.stage for row in rows}) > 1 else None)
    return encode_figure(figure, dpi=_DPI)


def _panel(axis: Any, rows: Sequence[Row], name: str) -> None:
    from matplotlib.ticker import PercentFormatter

    seen: list[NDArray[np.float64]] = []
    for kind, color in (("train", _TRAIN), ("validation", _VALIDATION)):
        chosen = [row for row in rows if row.kind == kind and getattr(row, name) is not None]
        x = np.array([row.epoch for row in chosen], dtype=np.float64)
        y = np.array([getattr(row, name) for row in chosen], dtype=np.float64)
        if not np.isfinite(y).any():
            continue
        seen.append(y[np.isfinite(y)])
        if kind == "train" and len(x) >= _SMOOTHED_FROM:
            axis.plot(x, y, color=color, lw=0.7, alpha=0.3)
            y = _smoothed(y)
            axis.plot(x, y, color=color, lw=1.8, label=kind)
        else:
            axis.plot(x, y, color=color, lw=1.8, marker="o", ms=4 if len(x) < 50 else 2, label=kind)
        last = np.flatnonzero(np.isfinite(y))
        if kind == "validation" and len(last):
            words = f"{y[last[-1]]:.3g}" if name == "loss" else f"{y[last[-1]]:.1%}"
            place = (x[last[-1]], y[last[-1]])
            axis.annotate(words, place, (6, 0), textcoords="offset points", va="center", color=color, fontsize=9)
    values = np.concatenate(seen) if seen else np.empty(0)
    if not len(values):
        axis.text(0.5, 0.5, "nothing was measured", transform=axis.transAxes, ha="center", va="center", color="gray")
        axis.set(xticks=[], yticks=[])
    elif name == "loss":
        # A first step far above the rest would press the rest together; a loss is also what falls by factors.
        if values.min() > 0 and values.max() > 20 * np.median(values):
            axis.set_yscale("log")
        elif values.min() >= 0:
            axis.set_ylim(bottom=0)
    else:
        low = float(values.min())
        axis.set_ylim(0 if low < 0.5 else np.floor(low * 10 - 0.5) / 10, 1.02)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if seen:
        axis.legend(frameon=False, loc="best")
    axis.grid(True, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _mark_stages(axis: Any, rows: Sequence[Row]) -> None:
    """Shades every second stage and writes their names above the axes, if there are several."""
    ends: dict[str, float] = {}
    for row in rows:
        ends[row.stage] = max(row.epoch, ends.get(row.stage, 0.0))
    begin = 0.0
    for number, (name, end) in enumerate(ends.items() if len(ends) > 1 else ()):
        if number % 2:
            axis.axvspan(begin, end, color=_SHADE, lw=0, zorder=0)
        place = (begin, 1.0)
        lift = (2, 3 + 10 * (number % 2))  # on two lines: a name may be longer than its stage
        where = {"xycoords": axis.get_xaxis_transform(), "textcoords": "offset points"}
        axis.annotate(name, place, lift, **where, fontsize=8, color="dimgray")
        axis.annotate(
            "", place, (0, lift[1] + 8), **where, arrowprops={"arrowstyle": "-", "color": "silver", "lw": 0.8}
        )
        begin = end
    if ends:
        axis.set_xlim(0, max(*ends.values(), 0.01) * 1.08)  # leaves room for the number at the end


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns a weighted mean over about a fifteenth of the values, centered, so that the curve does not lag."""
    reach = max(1, len(values) // 30)
    weights = np.hanning(2 * reach + 3)[1:-1]
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), weights, mode="same")
    mass = np.convolve(finite.astype(np.float64), weights, mode="same")
    return np.where(finite, total / np.where(mass > 0, mass, 1.0), np.nan)
