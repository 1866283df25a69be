"""Work in other processes, each of which may crash or hang without taking anything else along."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import multiprocessing
import queue
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch


class LostError(Exception):
    """A call that brought no result: its process crashed, hung, or the function raised."""


class Worker:
    """A process that runs one call at a time, with one thread, and ends with the process that made it.

    Args:
        daemon: End it at the exit of the process that made it, even without :meth:`stop`; it can then have no workers
            of its own.
    """

    def __init__(self, daemon: bool = False) -> None:
        self._daemon = daemon
        self._process: Any = None
        self._pipe: Any = None

    def ask(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of a module there.

        Raises:
            LostError: It did not return. The next call gets a new process where need be.
        """
        if self._process is None:
            self._start()
        try:
            self._pipe.send((function, arguments))
            if not self._pipe.poll(seconds):
                self.kill()
                self.stop()
                raise LostError(f"no result after {seconds:.0f} s")
            returned, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join()
            code = self._process.exitcode
            self.stop()
            raise LostError(f"its process crashed ({_in_words(code)})") from error
        if not returned:
            raise LostError(value)
        return value

    def kill(self) -> None:
        """Ends the process, whatever it does; a call that waits for it in another thread sees a crash."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """Lets the process end, and forgets it."""
        if self._process is not None:
            self._pipe.close()
            self._process.join()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, but not run them
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=self._daemon)
        self._process.start()
        theirs.close()  # so that our end sees when the process is gone


def each(
    function: Callable[..., Any], tasks: Sequence[Any], jobs: int, seconds: float
) -> Iterator[tuple[Any, Any | LostError]]:
    """Calls a function with each task, in ``jobs`` processes; yields (task, result) as they come."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    workers = [Worker() for _ in range(min(jobs, len(tasks)))]
    threads = [threading.Thread(target=_attend, args=(w, function, waiting, done, seconds)) for w in workers]
    for thread in threads:
        thread.start()
    try:
        for _ in tasks:
            yield done.get()
    except BaseException:
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()  # nobody wants the rest
        for worker in workers:
            worker.kill()
        raise
    finally:
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.stop()


def _attend(
    worker: Worker,
    function: Callable[..., Any],
    waiting: queue.SimpleQueue[Any],
    done: queue.SimpleQueue[tuple[Any, Any]],
    seconds: float,
) -> None:
    """Feeds one worker until nothing waits."""
    with contextlib.suppress(queue.Empty):
        while True:
            task = waiting.get_nowait()
            try:
                done.put((task, worker.ask(seconds, function, task)))
            except LostError as lost:
                done.put((task, lost))


def _serve(pipe: Connection) -> None:
    """The other side: answers calls until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that made this one
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    gc.freeze()  # torch and timm are a million objects, which the collector would visit again and again
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, arguments = pipe.recv()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    answer = (True, function(*arguments))
            except Exception as error:
                answer = (False, f"{type(error).__name__}: {error}")
            pipe.send(answer)
            gc.collect()  # models stand in circles with their hooks and tracebacks, and the next one needs their memory


def _in_words(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
