"""What a run measures: ``log.csv``, and events for TensorBoard where that is installed."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.files import write_file

FILE = "log.csv"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Row:
    """A row of the log: an interval of training, or an evaluation. Its fields are the columns of the file.

    What was not measured is None, and an empty cell.

    Attributes:
        kind: "train" or "validation".
        step: Steps of the optimizer since the run began, over all stages.
        epoch: Passes over the data since the run began, over all stages.
        stage: Name of the stage.
        loss: What is minimised, on average over the interval or the images of the evaluation.
        task: The part of it against the labels, without its weight.
        logits: The part against the original's class probabilities, without its weight.
        features: The part against the original's layers, without its weight.
        top1: Fraction of images whose label has the highest score.
        top5: Fraction of images whose label is among the five highest.
        agreement: Fraction of images whose highest score is also the original's.
        lr: Learning rate of the new layers.
        grad_norm: Norm of the gradient, before it was clipped.
        images: Images seen in the interval or evaluated, by all processes.
        images_per_s: Of all processes.
        seconds: Since the run began, interruptions left out.
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


class Log:
    """Writes the rows of a run: each is in the file, whole, when :meth:`write` returns.

    Args:
        folder: Of the run; made if need be.
        resumed_at: The step whose checkpoint the run goes on from: rows of later steps are cut off, since they will
            come again. None begins a new log.

    Raises:
        UsageError: The log to go on with is not one, or the file cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], resumed_at: int | None = None) -> None:
        self.file = Path(folder) / FILE
        kept: list[Row] = []
        if resumed_at is not None and self.file.exists():
            kept = [row for row in read(self.file) if row.step <= resumed_at]
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot write {self.file}: {error.strerror}") from error
        write_file(self.file, _text([COLUMNS, *map(_cells, kept)]))
        self._written = {(row.kind, row.step) for row in kept}
        self._events = _event_writer(self.file.parent / TENSORBOARD, resumed_at)

    def write(self, row: Row) -> None:
        """Adds a row, unless there is one of its kind and step.

        Raises:
            DDFError: It could not be written, for instance because the disk is full.
        """
        if (row.kind, row.step) in self._written:
            return
        self._written.add((row.kind, row.step))
        line = _text([_cells(row)]).encode()
        try:
            with self.file.open("ab", buffering=0) as file:  # one call of the system for a line
                if file.write(line) != len(line):
                    raise OSError(0, "the disk is full")
        except OSError as error:
            raise DDFError(f"could not write {self.file}: {error.strerror}") from error
        if self._events is not None:
            for name in _TAGS:
                if (value := getattr(row, name)) is not None:
                    self._events.add_scalar(f"{row.kind}/{name}", value, row.step)
            self._events.flush()

    def close(self) -> None:
        """Ends the files of TensorBoard."""
        if self._events is not None:
            self._events.close()


def read(file: str | os.PathLike[str]) -> list[Row]:
    """The rows of a log, in their order. A last line that was not finished is left out.

    Raises:
        UsageError: There is no such file, or it is not a log of this version.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UsageError(f"cannot read the log {path}: {why}") from error
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if not lines or tuple(lines[0]) != COLUMNS:
        raise UsageError(f"{path} is not a log of this version: its columns are others")
    try:
        return [_row(cells) for cells in lines[1:]]
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def _row(cells: list[str]) -> Row:
    values: dict[str, Any] = {}
    for name, cell in zip(COLUMNS, cells, strict=True):
        if name in _WORDS:
            values[name] = cell
        elif cell:
            values[name] = int(cell) if name in _COUNTS else float(cell)
        else:
            values[name] = None
    if values["kind"] not in ("train", "validation") or values["step"] is None or values["epoch"] is None:
        raise ValueError(f"the row {','.join(cells)}")
    return Row(**values)


def _cells(row: Row) -> tuple[str, ...]:
    return tuple("" if value is None else str(value) for value in astuple(row))


def _text(lines: Iterable[tuple[str, ...]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _event_writer(folder: Path, resumed_at: int | None) -> Any:
    """What writes events, or None where TensorBoard is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=None if resumed_at is None else resumed_at + 1)
