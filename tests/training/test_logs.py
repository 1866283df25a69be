"""The log of a run, for programs and for TensorBoard, and the picture of it."""

from __future__ import annotations

import importlib.util
import io
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest

from ddf_convert.errors import DDFError, UsageError
from ddf_convert.training import logs
from ddf_convert.training.logs import COLUMNS, Log, Row, draw, read


def rows_of(count: int, stages: tuple[str, ...] = ("all",), every: int = 5, **measured: float) -> list[Row]:
    """An interval for each step, an evaluation after every few."""
    rows = []
    for step in range(1, count + 1):
        place: dict[str, Any] = {"step": step, "epoch": step / 10, "stage": stages[(step - 1) * len(stages) // count]}
        rows.append(Row("train", **place, loss=1 / step, lr=1e-3, images=64))
        if step % every == 0:
            rows.append(Row("validation", **place, loss=1.5 / step, **measured))
    return rows


class Events:
    """In the place of torch's writer of events."""

    made: list[Events]

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step = Path(folder), purge_step
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = self.closed = False
        self.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))
        self.flushed = False

    def flush(self) -> None:
        self.flushed = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def events(monkeypatch: pytest.MonkeyPatch) -> list[Events]:
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Events  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    Events.made = []
    return Events.made


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        Row("train", 1, 0.1, "warm-up, of the head"),
        Row("train", 2, 1 / 3, 'the "rest"', 2.5, 1e-30, 0.1, 0.2, 0.5, 0.9, 0.7, 1e-3, 12.5, 640, 1234.5, 60.25),
        Row("validation", 2, 1 / 3, "the\nrest", loss=math.inf, top1=0.0),
    ]
    log = Log(tmp_path / "new" / "run")
    for number, row in enumerate(rows, 1):
        log.write(row)
        assert read(log.file) == rows[:number]  # at once
    assert log.file.read_text().splitlines()[0] == ",".join(COLUMNS)
    log.write(Row("train", 3, 1.0, "rest", loss=math.nan))
    assert math.isnan(read(log.file)[3].loss or 0)


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (5, 6), (99, 12)])
def test_resumed(tmp_path, events, step, kept):
    rows = rows_of(10)
    log = Log(tmp_path)
    for row in rows:
        log.write(row)
    log.close()
    again = Log(tmp_path, resumed_at=step)
    assert read(again.file) == rows[:kept]
    for row in rows:  # those that stand are not written twice, as when the evaluation at the checkpoint is repeated
        again.write(row)
    assert read(again.file) == rows
    assert [event.purge_step for event in events] == [None, step + 1]


def test_resumed_after_a_kill(tmp_path, caplog):
    rows = rows_of(6)
    log = Log(tmp_path)
    for row in rows:
        log.write(row)
    whole = log.file.read_bytes()
    for cut in (1, 5, 30):
        log.file.write_bytes(whole[:-cut])
        assert read(log.file) == rows[:-1]
        again = Log(tmp_path, resumed_at=6)
        assert "its last line was not finished" in caplog.messages[-1]
        again.write(rows[-1])
        assert log.file.read_bytes() == whole


def test_a_new_run_begins_a_new_log(tmp_path):
    Log(tmp_path).write(rows_of(1)[0])
    assert read(Log(tmp_path).file) == []
    log = Log(tmp_path / "other", resumed_at=5)  # whose log was deleted
    log.write(rows_of(1)[0])
    assert len(read(log.file)) == 1


HEADER = ",".join(COLUMNS)
EMPTY = "," * (len(COLUMNS) - 4)


GOOD = f"train,1,0.1,all{EMPTY}\n"


@pytest.mark.parametrize(
    ("content", "words", "kept"),
    [
        (b"", "it is empty", 0),
        (b"a,b\n1,2\n", "its columns are others", 0),
        (f"{HEADER}\n{GOOD}train,2\n".encode(), "a row is damaged: train,2", 1),
        (f"{HEADER}\ntest,1,0.1,all{EMPTY}\n".encode(), "a row is damaged: test", 0),
        (f"{HEADER}\n{GOOD}".encode() + b"train,2,0.1,\xff\xfe\n", "it is not text", 1),
        (f"{HEADER}\n{GOOD}".encode() + bytes(100) + b"\n", "a row is damaged", 1),
        ("folder", "Is a directory", 0),
    ],
)
def test_a_damaged_log_is_kept_and_another_goes_on(tmp_path, content, words, kept, caplog):
    file = tmp_path / "log.csv"
    if content == "folder":
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=words) as caught:
        read(file)
    assert str(file) in str(caught.value)
    for number in (1, 2):  # what was kept before is not overwritten
        log = Log(tmp_path, resumed_at=3)
        aside = tmp_path / f"log.csv.damaged-{number}"
        assert aside.is_dir() if content == "folder" else aside.read_bytes() == content
        (message,) = [each for each in caplog.messages if aside.name in each]
        assert words in message
        assert "\n" not in message
        assert len(read(file)) == len(log.rows) == kept
        file.unlink()
        aside.rename(file)
        aside.write_bytes(b"mine")
        content = content if content == "folder" else file.read_bytes()


def test_a_log_that_is_missing_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "log.csv")


def test_what_is_deleted_or_emptied_during_the_run_is_written_again(tmp_path, events):
    rows = rows_of(4)
    log = Log(tmp_path / "run")
    for row, harm in zip(rows, ("nothing", "folder", "file", "contents"), strict=True):
        if harm == "folder":
            shutil.rmtree(tmp_path / "run")
        elif harm == "file":
            log.file.unlink()
        elif harm == "contents":
            log.file.write_bytes(b"")
        log.write(row)
        assert read(log.file) == log.rows
    assert log.rows == rows
    assert len(events) == 2
    assert {step for _, _, step in events[1].scalars} == {1, 2, 3, 4}


def test_rows_that_stand_twice_are_kept_once(tmp_path):
    """As two processes in one folder left them, before there was a lock."""
    rows = rows_of(3)
    log = Log(tmp_path)
    for row in rows:
        log.write(row)
    log.file.write_text(log.file.read_text() + "".join(log.file.read_text().splitlines(keepends=True)[2:]))
    assert len(read(log.file)) == 5
    assert Log(tmp_path, resumed_at=3).rows == rows == read(log.file)


def test_events_that_cannot_be_written_do_not_stop_the_run(tmp_path, events, caplog, monkeypatch):
    (tmp_path / "tensorboard").write_text("mine")
    log = Log(tmp_path, resumed_at=0)
    assert (tmp_path / "tensorboard.damaged-1").read_text() == "mine"
    caplog.clear()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events[-1], "add_scalar", full)
    for row in rows_of(5):
        log.write(row)
    log.close()
    assert len(log.rows) == 6
    (message,) = caplog.messages
    assert "No space left on device" in message


def test_a_log_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        Log(tmp_path / "file")
    log = Log(tmp_path)
    log.file.unlink()
    log.file.symlink_to("/dev/full")
    with pytest.raises(DDFError, match="No space left on device"):
        log.write(rows_of(1)[0])


def test_events(tmp_path, events):
    log = Log(tmp_path)
    log.write(Row("train", 3, 0.5, "all", loss=2.0, lr=0.1))
    log.write(Row("validation", 3, 0.5, "all", top1=0.25))
    (writer,) = events
    assert writer.folder == tmp_path / "tensorboard"
    assert writer.scalars == [
        ("train/epoch", 0.5, 3),
        ("train/loss", 2.0, 3),
        ("train/lr", 0.1, 3),
        ("validation/epoch", 0.5, 3),
        ("validation/top1", 0.25, 3),
    ]
    assert writer.flushed
    log.close()
    assert writer.closed


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = Log(tmp_path)
    log.write(rows_of(1)[0])
    log.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["log.csv"]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_tensorboard_reads_the_events(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at, offset in ((None, 0.0), (2, 100.0)):
        log = Log(tmp_path, resumed_at)
        for step in range(1 if resumed_at is None else resumed_at + 1, 5):
            log.write(Row("train", step, step / 10, "all", loss=step + offset))
        log.close()
    found = EventAccumulator(str(tmp_path / logs.TENSORBOARD)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 103), (4, 104)]


# Curves


def drawn(rows: list[Row]) -> np.ndarray:
    content = draw(rows)
    assert content.startswith(b"\x89PNG")
    return np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def share(picture: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> float:
    return float((np.abs(picture - np.array(color)).max(axis=2) < tolerance).mean())


BLUE, RED = (0x1F, 0x77, 0xB4), (0xD6, 0x27, 0x28)
MANY = 300
CASES: list[tuple[str, list[Row], int, bool, bool]] = [
    ("nothing", [], 1, False, False),
    ("only NaN", [Row("train", 1, 0.1, "all", loss=math.nan)], 1, False, False),
    ("one evaluation", [Row("validation", 0, 0.0, "all", loss=2.0, top1=0.1)], 2, False, True),
    ("agreement", rows_of(20, agreement=0.9), 2, True, True),
    ("labels", rows_of(20, top1=0.3, agreement=0.9), 2, True, True),
    ("stages", rows_of(MANY, ("head", "new", "all"), top1=1.0), 2, True, True),
    ("NaN at the end", [*rows_of(20, top1=0.3), Row("train", 21, 2.1, "all", loss=math.nan)], 2, True, True),
    ("a jump", [Row("train", 1, 0.0, "all", loss=1e6), *rows_of(40)[1:]], 1, True, True),
    ("negative", [Row("train", step, step, "all", loss=-step) for step in range(20)], 1, True, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "panels", "blue", "red"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_curves(rows, panels, blue, red, recwarn):
    picture = drawn(rows)
    assert picture.shape[:2] == (630, round(150 * (6 * panels + 0.5)))
    assert (share(picture, BLUE) > 1e-4) is blue
    assert (share(picture, RED) > 1e-4) is red
    assert [str(warning.message) for warning in recwarn] == []


def test_stages_are_shaded():
    shades = [share(drawn(rows_of(40, stages)), (0xF1, 0xF1, 0xF1), 4) for stages in (("all",), ("head", "all"))]
    assert shades[0] < 0.02
    assert shades[1] > 0.2


def test_smoothing_neither_lags_nor_spreads_what_is_missing():
    line = np.linspace(0, 1, 100)
    np.testing.assert_allclose(logs._smoothed(line)[5:-5], line[5:-5], atol=1e-9)
    line[50] = np.nan
    assert np.flatnonzero(np.isnan(logs._smoothed(line))).tolist() == [50]
    noise = np.random.RandomState(0).randn(1000)
    assert logs._smoothed(noise).std() < 0.3 * noise.std()
