"""Calls in other processes, each of which may crash or hang without harm to the rest."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import queue
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch


class LostError(Exception):
    """A call that returned nothing: its process crashed, hung, or the function raised."""


class Worker:
    """A process that runs one call at a time, on one thread, and ends with the process that made it.

    Args:
        setup: Called there first.
        daemon: End it when its maker exits, even without :meth:`stop`; it can then start no processes of its own.
    """

    def __init__(self, setup: Callable[[], object] | None = None, daemon: bool = False) -> None:
        self._setup = setup
        self._daemon = daemon
        self._process: Any = None
        self._pipe: Any = None

    def call(self, seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of a module there.

        Raises:
            LostError: It did not return. The next call starts a new process if necessary.
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
            cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            raise LostError(f"its process crashed ({cause})") from error
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
        self._process = context.Process(target=_serve, args=(theirs, self._setup), daemon=self._daemon)
        self._process.start()
        theirs.close()  # so that our end sees when the process is gone


def call_each(
    function: Callable[..., Any],
    tasks: Sequence[Any],
    jobs: int,
    seconds: float,
    setup: Callable[[], object] | None = None,
) -> Iterator[tuple[Any, Any | LostError]]:
    """Calls a function with each task, in ``jobs`` processes; yields (task, result) as they come."""
    workers = [Worker(setup) for _ in range(min(jobs, len(tasks)))]
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def call(task: Any) -> Any:
        worker = free.get()
        try:
            return worker.call(seconds, function, task)
        except LostError as lost:
            return lost
        finally:
            free.put(worker)

    threads = ThreadPoolExecutor(max(1, len(workers)))
    futures = {threads.submit(call, task): task for task in tasks}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        raise
    finally:
        threads.shutdown()
        for worker in workers:
            worker.stop()


def _serve(pipe: Connection, setup: Callable[[], object] | None) -> None:
    """Answers calls until the pipe is closed; runs in the other process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that made this one
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if setup is not None:
        setup()
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
            gc.collect()  # models stand in cycles with their hooks and tracebacks, and the next one needs their memory
