"""Work in proportion to a file: what its description may ask for, by what it really holds.

The numbers of a manifest say what is built before anything of it can be compared with the weights. So they are held
against the header of the weights first, and what is built is counted while it is built.
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

from ddf_convert.artifacts.atomic import why
from ddf_convert.errors import ArtifactError, UsageError

# What a model may have for what is in its weights' file. A convolution has up to K * K times, and more, of what takes
# its place; parts may be made and thrown away while a model is built; and there are buffers that are not saved.
_ELEMENTS, _MORE_ELEMENTS = 64, 10**8
_PARTS, _MORE_PARTS = 20, 5000
_NUMBER = 10_000  # an argument may be so large whatever the file holds: sizes of images, temperatures

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
# A model takes the dtype of its weights within one of these.
_ALIKE = (
    {torch.float64, torch.float32, torch.float16, torch.bfloat16},
    {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8},
)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors.

    Attributes:
        shapes: By name, those that share a tensor too.
        dtypes: By name; in the words of the file where torch has no such dtype.
    """

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | str]

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(map(math.prod, self.shapes.values()))

    def unfit_dtypes(self, state: Mapping[str, Any]) -> str:
        """The tensors whose dtype a model's cannot take, in words; empty if there is none."""
        unfit = [
            f"{name} is {_word(self.dtypes[name])} and should be {_word(own.dtype)}"
            for name, own in state.items()
            if isinstance(own, Tensor) and name in self.dtypes and not _fits(self.dtypes[name], own.dtype)
        ]
        return f"{len(unfit)} of another dtype ({unfit[0]}{', ...' if len(unfit) > 1 else ''})" if unfit else ""


def read_header(weights: Path, shared: Mapping[str, str]) -> Header:
    """Reads the header of a safetensors file, which vouches for the size of the rest.

    Args:
        weights: The file.
        shared: Names of tensors that are stored under another name, and that name.

    Raises:
        ArtifactError: The file is damaged, or lacks a tensor that is shared.
    """
    try:
        with safetensors.safe_open(weights, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: _DTYPES.get(each.get_dtype(), each.get_dtype()) for name, each in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise ArtifactError(f"{weights} is damaged: {' '.join(why(error).split())}") from error
    for name, kept in shared.items():
        if kept not in shapes:
            raise ArtifactError(f"{weights.parent / 'manifest.json'} is damaged: {kept} is not among the weights")
        shapes[name], dtypes[name] = shapes[kept], dtypes[kept]
    return Header(shapes, dtypes)


def check_arguments(arguments: Mapping[str, Any], header: Header) -> None:
    """Whether the numbers among arguments are such as a model with these weights can have been built with.

    Raises:
        UsageError: One is too large.
    """
    most = max(_NUMBER, len(header.shapes), *(max(shape, default=0) for shape in header.shapes.values()), 0)
    for name, value in arguments.items():
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if not sum(map(abs, numbers)) <= most:  # NaN is not, either
            raise UsageError(f"{name} {value} is more than a model of these weights can have")


@contextmanager
def in_proportion(header: Header, model: nn.Module | None = None) -> Iterator[None]:
    """A context in which modules are built, in this thread, no more and no larger than weights account for.

    Args:
        header: Of the weights.
        model: A model that is there already, and of which parts may be made again.

    Raises:
        UsageError: In the body, as soon as too much is built.
    """
    there = list(model.state_dict().values()) if model is not None else []
    tensors = [each for each in there if isinstance(each, Tensor)]
    elements = _MORE_ELEMENTS + _ELEMENTS * (header.elements + sum(each.numel() for each in tensors))
    parts = _MORE_PARTS + _PARTS * (len(header.shapes) + len(tensors))
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


def _fits(saved: torch.dtype | str, own: torch.dtype) -> bool:
    return saved == own or any(saved in alike and own in alike for alike in _ALIKE)


def _word(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
