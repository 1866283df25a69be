"""Limits on what a manifest can make the loader build, in proportion to the weights beside it.

A manifest decides what is built before the result can be compared with the weights. So its numbers are first compared
with the header of the weights file, and modules are counted while they are built.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from ddf_convert.artifacts.atomic import MANIFEST, os_error_text
from ddf_convert.errors import ArtifactError, UsageError

# Limits are FACTOR * (count in the weights file) + MARGIN. The factors are large, because a convolution has up to K * K
# times the weights of its replacement, models build parts and discard them, and some buffers are not saved.
_ELEMENT_FACTOR, _ELEMENT_MARGIN = 64, 10**8
_PART_FACTOR, _PART_MARGIN = 20, 5000
_MAX_SMALL_NUMBER = 10_000  # arguments up to this size are never refused: sizes of images, temperatures

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
# A model takes over the dtype of its weights within each of these sets.
_CASTABLE = (
    {torch.float64, torch.float32, torch.float16, torch.bfloat16},
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8},
)


@dataclass(frozen=True)
class Header:
    """Shapes and dtypes of the tensors in a safetensors file, by all their names."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]  # a str where torch has no such dtype

    @property
    def elements(self) -> int:
        """Returns the number of elements of all tensors together."""
        return sum(map(math.prod, self.shapes.values()))

    def unfit_dtypes(self, state: Mapping[str, Any]) -> str:
        """Returns which dtypes a model's tensors cannot take over, in words; empty if there are none."""
        unfit = [
            f"{name} is {_dtype_name(self.dtypes[name])} and should be {_dtype_name(own.dtype)}"
            for name, own in state.items()
            if isinstance(own, Tensor) and name in self.dtypes and not _is_castable(self.dtypes[name], own.dtype)
        ]
        return f"{len(unfit)} of another dtype ({unfit[0]}{', ...' if len(unfit) > 1 else ''})" if unfit else ""


def read_header(weights: Path, shared: Mapping[str, str]) -> Header:
    """Reads the header of a safetensors file; ``shared`` maps further names of tensors to the names in the file."""
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: _DTYPES.get(each.get_dtype(), each.get_dtype()) for name, each in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged: {' '.join(os_error_text(error).split())}") from error
    for name, stored in shared.items():
        if stored not in shapes:
            raise ArtifactError(f"{weights.parent / MANIFEST} is damaged: {stored} is not among the weights")
        shapes[name], dtypes[name] = shapes[stored], dtypes[stored]
    return Header(shapes, dtypes)


def check_arguments(arguments: Mapping[str, Any], header: Header) -> None:
    """Raises UsageError for numbers that are too large to have built a model with these weights."""
    most = max(_MAX_SMALL_NUMBER, len(header.shapes), *(max(shape, default=0) for shape in header.shapes.values()), 0)
    for name, value in arguments.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if not sum(map(abs, numbers)) <= most:  # refuses NaN too
            raise UsageError(f"{name} {value} is more than a model of these weights can have")


@contextmanager
def limit_construction(header: Header, model: nn.Module | None = None) -> Iterator[None]:
    """Raises UsageError as soon as this thread builds too many or too large modules in the body.

    The limits follow from the header of the weights, and from a model that exists already and may be built again.
    """
    existing = list(model.state_dict().values()) if model is not None else []
    tensors = [each for each in existing if isinstance(each, Tensor)]
    elements = _ELEMENT_MARGIN + _ELEMENT_FACTOR * (header.elements + sum(each.numel() for each in tensors))
    parts = _PART_MARGIN + _PART_FACTOR * (len(header.shapes) + len(tensors))
    thread = threading.get_ident()

    def count(_: nn.Module, name: str, part: Any) -> None:
        nonlocal elements, parts
        if threading.get_ident() != thread:
            return
        parts -= 1
        elements -= part.numel() if isinstance(part, Tensor) else 0
        if parts < 0 or elements < 0:
            raise UsageError(f"it would become much larger than its weights are ({name})")

    handles = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_castable(saved: torch.dtype | str, own: torch.dtype) -> bool:
    return saved == own or any(saved in dtypes and own in dtypes for dtypes in _CASTABLE)


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
