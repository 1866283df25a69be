"""What the parts share: the device, the time that is left, and the record that each of them fills in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

MOST_FAILURES = 40  # written down one by one


class DroppedError(Exception):
    """The time is over: what a part has not measured by now stays unmeasured."""


@dataclass
class Run:
    """One run of gpu_check.py.

    Attributes:
        device: What is checked.
        dry: Whether this is the rehearsal on the CPU, with tiny sizes.
        end: Of the whole run, by ``time.monotonic``.
        save: Writes the report as it is now.
        part_end: Of the part that runs.
    """

    device: torch.device
    dry: bool
    end: float
    save: Callable[[], None]
    part_end: float = field(default=0.0)

    def left(self) -> float:
        """Seconds that the running part may still take."""
        return min(self.end, self.part_end) - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Raises DroppedError if there is no time left for this."""
        if self.left() < seconds:
            raise DroppedError(what)

    def without_gpu(self, record: dict[str, Any], what: str) -> bool:
        """Whether this must be left out because there is no GPU; the record then says so."""
        if self.dry:
            skip(record, what, "needs a GPU")
        return self.dry


def skip(record: dict[str, Any], what: str, why: str) -> None:
    """Something that cannot be checked here."""
    record.setdefault("skipped", []).append(f"{what}: {why}")


def fail(record: dict[str, Any], what: str) -> None:
    """Something that came out wrong."""
    record["failed"] = record.get("failed", 0) + 1
    failures = record.setdefault("failures", [])
    if len(failures) < MOST_FAILURES:
        failures.append(what)


def complaints(record: dict[str, Any]) -> list[str]:
    """Everything that went wrong in a part, a line each."""
    error = [record["error"]] if "error" in record else []
    return [" ".join(words.split()) for words in error + record.get("failures", [])]


def check(record: dict[str, Any], what: str, right: bool) -> None:
    """Something that is right or wrong."""
    record.setdefault("checks", {})[what] = bool(right)
    if not right:
        fail(record, what)
