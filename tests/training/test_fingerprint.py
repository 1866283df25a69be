"""What tells the images of a run from others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from ddf_convert.training import fingerprint
from ddf_convert.training.dataset import ImageDataset, open_images
from ddf_convert.training.fingerprint import Entry


class Drawn(torch.utils.data.Dataset[Any]):
    """Images without files."""

    def __init__(self, labels: list[int], noise: bool = False) -> None:
        self.labels_, self.noise = labels, noise

    def __len__(self) -> int:
        return len(self.labels_)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        value = torch.tensor(os.urandom(1)[0] / 255) if self.noise else torch.tensor(index / len(self))
        return value.expand(3, 8, 8), self.labels_[index]


class Listed(Drawn):
    """One that lists what it holds, as those of torchvision do."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__(labels)
        self.targets = torch.tensor(labels)


def of(dataset: Any, monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    monkeypatch.setattr("ddf_convert.training.dataset.find_callable", lambda *_: lambda: dataset)
    return fingerprint.of_images(open_images("a:b", "train", True), "training")


def test_data_sets_without_files_are_known_by_labels_and_some_images(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = [index % 5 for index in range(100)]
    swapped = [{0: 1, 1: 0}.get(label, label) for label in labels]
    few = of(Drawn(labels), monkeypatch)
    assert len(few) == 16
    assert few == of(Drawn(labels), monkeypatch)
    changed = fingerprint.differences(few, of(Drawn(swapped), monkeypatch))
    assert "given another label (training image 0, training image 6, " in changed
    listed = of(Listed(labels), monkeypatch)
    assert len(listed) == 100
    one = [*labels[:77], 4, *labels[78:]]
    assert fingerprint.differences(listed, of(Listed(one), monkeypatch)) == (
        "1 given another label (training image 77)"
    )
    part = of(Subset(Listed(labels), range(50)), monkeypatch)
    assert [entry.label for entry in part] == labels[:50]


def test_what_a_data_set_draws_at_random_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (of(Drawn([0, 1] * 10, noise=True), monkeypatch) for _ in range(2))
    assert fingerprint.differences(one, other) == ""


def test_files_that_a_data_set_lists_are_known_by_their_contents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"c{label}" / "0.png" for label in (0, 1)]
    for number, file in enumerate(files):
        file.parent.mkdir()
        file.write_bytes(bytes([number]))

    class Folder(Drawn):
        def __init__(self) -> None:
            super().__init__([0, 1])
            self.samples = [(str(file), label) for label, file in enumerate(files)]

    before = of(Folder(), monkeypatch)
    assert len(before) == 2
    files[1].write_bytes(b"x")  # of the same size
    assert fingerprint.differences(before, of(Folder(), monkeypatch)) == "1 exchanged (c1/0.png)"


def test_another_decoder_is_not_another_image() -> None:
    image = Image.new("RGB", (8, 8), (100, 50, 3))
    entries = []
    for level in (0, 2, 9):
        shifted = image.point(lambda value, level=level: value + level)

        class One:
            def __len__(self) -> int:
                return 1

            def name(self, index: int) -> str:
                return "one"

            def load(self, index: int, shifted: Any = shifted) -> tuple[Any, int]:
                return shifted, 0

            def samples(self) -> None:
                return None

        entries.append(fingerprint.of_images(ImageDataset(One(), None, True), "training"))
    assert fingerprint.differences(entries[0], entries[1]) == ""
    assert "exchanged" in fingerprint.differences(entries[0], entries[2])


def test_of_many_files_some_contents_and_all_sizes_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_MAX_HASHED", 10)
    monkeypatch.setattr(fingerprint, "_CHUNK", 7)
    files = [tmp_path / f"{number:02}" for number in range(40)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]))
    before = fingerprint.of_files(files, tmp_path)
    assert [entry.name for entry in before] == [file.name for file in files]
    assert sum(entry.content is not None for entry in before) == 10
    assert fingerprint.unpack(fingerprint.pack(before)) == before
    files[4].write_bytes(b"x")
    files[5].write_bytes(b"x")  # of the same size, and not among those looked at
    files[6].write_bytes(b"xx")
    files[7].unlink()
    after = fingerprint.of_files(files, tmp_path)
    assert fingerprint.differences(before, after) == "3 exchanged (04, 06, 07)"
    assert fingerprint.digest(before) != fingerprint.digest(after)
