"""What the parts share: the device, the time that is left, and how they fill in their records."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MOST_FAILURES = 40  # listed one by one


class DroppedError(Exception):
    """The time is over: the rest of a part is left out."""


@dataclass
class Run:
    """One run of gpu_check.py.

    Attributes:
        device: The GPU, or the CPU.
        dry: A dry run on the CPU, with tiny sizes.
        end: When the whole run ends, by ``time.monotonic``.
        save: Writes the report as it is now.
        parts: The records of the parts so far.
        part_end: When the running part ends.
    """

    device: torch.device
    dry: bool
    end: float
    save: Callable[[], None]
    parts: dict[str, Any]
    part_end: float = 0.0

    def left(self) -> float:
        """Returns the seconds that the running part may still take."""
        return min(self.end, self.part_end) - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Raises a DroppedError unless there is time for ``what``."""
        if self.left() < seconds:
            raise DroppedError(what)

    def without_gpu(self, record: dict[str, Any], what: str) -> bool:
        """Returns whether ``what`` is left out for lack of a GPU, and records it."""
        if self.dry:
            skip(record, what, "needs a GPU")
        return self.dry


def skip(record: dict[str, Any], what: str, why: str) -> None:
    """Records what cannot be checked here."""
    record.setdefault("skipped", []).append(f"{what}: {why}")


def fail(record: dict[str, Any], what: str) -> None:
    """Records a failure."""
    record["failed"] = record.get("failed", 0) + 1
    failures = record.setdefault("failures", [])
    if len(failures) < MOST_FAILURES:
        failures.append(what)


def problems(record: dict[str, Any]) -> list[str]:
    """Returns everything that went wrong in a part, a line each."""
    error = [record["error"]] if "error" in record else []
    return [" ".join(words.split()) for words in error + record.get("failures", [])]


def check(record: dict[str, Any], what: str, right: bool) -> None:
    """Records whether a check came out right."""
    record.setdefault("checks", {})[what] = bool(right)
    if not right:
        fail(record, what)
