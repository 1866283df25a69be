"""One process at a time writes a folder, and a lock ends with its process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from ddf_convert.artifacts import lock
from ddf_convert.artifacts.lock import LOCK, locked
from ddf_convert.errors import ArtifactError, UsageError
from ddf_convert.utils import logging

FORK = multiprocessing.get_context("fork")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are forked")


def _hold(folder: Path, child: bool, ready: Any) -> None:
    with locked(folder):
        if child and not os.fork():  # a worker that outlives the process
            ready.put(os.getpid())
            signal.pause()
        if not child:
            ready.put(os.getpid())
        signal.pause()


def held(folder: Path, child: bool = False) -> Any:
    """A process that holds the lock, and what it is called by, or its child."""
    ready = FORK.SimpleQueue()
    process = FORK.Process(target=_hold, args=(folder, child, ready))
    process.start()
    return process, ready.get()


def test_a_folder_in_use_names_its_process_until_that_is_killed(tmp_path):
    process, number = held(tmp_path / "run")
    try:
        with (
            pytest.raises(
                UsageError, match=f"run is in use by process {number} on {socket.gethostname()}: wait"
            ) as caught,
            locked(tmp_path / "run"),
        ):
            pass
        assert "(-o)" in str(caught.value)
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == number
    finally:
        process.kill()
        process.join()
    assert (tmp_path / "run" / LOCK).exists()  # of a process that is dead: it blocks nothing
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["process"] == os.getpid()
    assert list((tmp_path / "run").iterdir()) == []


def test_workers_of_a_killed_process_do_not_hold_its_lock(tmp_path):
    process, worker = held(tmp_path, child=True)
    try:
        process.kill()
        process.join()
        os.kill(worker, 0)  # it is alive
        with locked(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_forked_process_that_leaves_the_context_does_not_release_it(tmp_path):
    with locked(tmp_path):
        try:
            child = os.fork()
            if not child:
                raise KeyError
        except KeyError:
            pass
    if not child:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with locked(tmp_path):
        pass


def test_the_same_process_holds_a_folder_once(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "run").mkdir()
    with locked(tmp_path / "run"):
        for name in ("run", "link"):
            with pytest.raises(UsageError, match=f"process {os.getpid()}"), locked(tmp_path / name):
                pass
        with locked(tmp_path / "other"):
            pass


def test_what_was_made_for_the_lock_goes_with_it_and_nothing_else(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["file"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"process": 1}'])
def test_whatever_a_lock_says_it_is_a_lock(tmp_path, content):
    with locked(tmp_path):
        (tmp_path / LOCK).write_bytes(content)
        with pytest.raises(UsageError, match="in use by another process"), locked(tmp_path):
            pass


def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, caplog):
    def none(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", none)
    monkeypatch.setattr(logging, "_warned", set())
    with locked(tmp_path), locked(tmp_path):
        (message,) = caplog.messages
    assert "No locks available" in message
    assert list(tmp_path.iterdir()) == []


def test_where_there_can_be_no_lock(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="is a file"), locked(tmp_path / "file"):
        pass
    (tmp_path / LOCK).mkdir()
    with pytest.raises(UsageError, match="Is a directory"), locked(tmp_path):
        pass
