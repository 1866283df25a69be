"""The results on disk: a line of JSON for each check of each architecture."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ddf_convert

# What cannot change any line: kernels, measuring, tables, and the command line.
_WITHOUT = ("bench", "cpu", "cuda", "report", "cli.py", "completion.py", "doctor.py")


def source_key() -> str:
    """A hash of everything that a result depends on: ddf_convert, these checks, and the libraries' versions."""
    digest = hashlib.sha256()
    for folder in (Path(ddf_convert.__file__).parent, Path(__file__).parent):
        for file in sorted(folder.rglob("*.py")):
            if file.relative_to(folder).parts[0] not in _WITHOUT:
                digest.update(file.read_bytes())
    digest.update(" ".join(version(name) for name in ("torch", "timm", "torchvision")).encode())
    return digest.hexdigest()[:12]


class Store:
    """The file of results; the last line of a check counts.

    Args:
        file: Made if need be.
        key: Of the sources as they are now; every new line gets it.
        stale: Keep the lines of other sources too.
        fresh: Begin with nothing.
    """

    def __init__(self, file: Path, key: str, stale: bool = False, fresh: bool = False) -> None:
        self._file = file
        self._key = key
        self.lines: dict[tuple[str, str, str], dict[str, Any]] = {}
        if file.exists() and not fresh:
            for text in file.read_text().splitlines():
                line = _parsed(text)
                if line is not None and (stale or line["key"] == key):
                    self.lines[line["check"], line["library"], line["name"]] = line
        file.write_text("".join(f"{json.dumps(line)}\n" for line in self.lines.values()))

    def add(self, line: dict[str, Any]) -> None:
        """Keeps a new line, at once."""
        line["key"] = self._key
        self.lines[line["check"], line["library"], line["name"]] = line
        with self._file.open("a") as file:
            file.write(f"{json.dumps(line)}\n")

    def of(self, check: str) -> list[dict[str, Any]]:
        """Every line of one check, those of one file of a library together."""
        found = [line for (kind, *_), line in self.lines.items() if kind == check]
        return sorted(found, key=lambda line: (line["library"], line["file"], line["name"]))


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line: dict[str, Any] = json.loads(text)
    except ValueError:
        return None  # the run was killed while it wrote
    return line
