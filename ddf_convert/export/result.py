"""What came of an export: for people and programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """One size of the inputs: what it may be.

    Attributes:
        name: "batch", "height", "width"; with the input's name before it where inputs have sizes of their own.
        example: What it is in the example.
        least: The smallest that it may be, where it is free.
        most: The largest; None if nothing bounds it.
        multiple_of: Only multiples of this number.
        fixed: Why it is always that of the example; None if it is free.
    """

    name: str
    example: int
    least: int = 1
    most: int | None = None
    multiple_of: int = 1
    fixed: str | None = None

    def __str__(self) -> str:
        """In words: ``33 or more``."""
        if self.fixed is not None:
            return f"fixed at {self.example}: {self.fixed}"
        limits = f"{self.least} to {self.most}" if self.most is not None else f"{self.least} or more"
        if self.multiple_of > 1:
            return f"multiples of {self.multiple_of}, {limits}"
        return "any" if limits == "1 or more" else limits


@dataclass(frozen=True)
class Check:
    """What was exported beside the model, once.

    Attributes:
        inputs: The shapes, by name of the input.
        difference: The largest between two numbers of the outputs.
        largest: The largest number of the model's outputs, without its sign.
        rounding: How far PyTorch itself is off from the same in float64; looked at only where the difference is more
            than the tolerance, which a model may bring about by enlarging every rounding.
    """

    inputs: dict[str, tuple[int, ...]]
    difference: float
    largest: float
    rounding: float | None = None

    @property
    def at(self) -> str:
        """The shapes in words: ``1x3x224x224``."""
        return " and ".join("x".join(map(str, shape)) for shape in self.inputs.values())


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        file: Where it is.
        format: "onnx" or "torch-export".
        bytes: Its size.
        opset: ONNX's version of the operators; None in other formats.
        operators: How often each is used, by name.
        inputs: Shapes, by name; names stand for sizes that are free.
        outputs: Likewise.
        sizes: The sizes of the inputs, and what they may be.
        tolerance: What a difference may be, as a fraction of the largest output.
        left_out: What the model returns beside tensors, by name and type: no file holds it.
        checks: What was run beside the model; nothing if that was not asked for.
    """

    file: Path
    format: str
    bytes: int
    opset: int | None
    operators: dict[str, int]
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    sizes: tuple[Size, ...]
    tolerance: float
    checks: tuple[Check, ...]
    left_out: tuple[str, ...] = ()

    @property
    def difference(self) -> float | None:
        """The largest of all checks; None if there was none."""
        return max((check.difference for check in self.checks), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "file": str(self.file), "difference": self.difference}
