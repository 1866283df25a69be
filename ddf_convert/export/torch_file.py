"""Models as files of ``torch.export`` (.pt2)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from ddf_convert import reference
from ddf_convert.artifacts.path_checks import check_file
from ddf_convert.errors import DDFError
from ddf_convert.export.checking import Exported, Runner, check_and_write
from ddf_convert.export.program import quiet, short_reason, tensors_in, trace
from ddf_convert.utils.example_input import ExampleInput


def to_torch_export(
    model: nn.Module,
    example_input: ExampleInput,
    path: str | Path,
    *,
    dynamic: bool = True,
    keep_operator: bool = False,
    check: bool = True,
) -> Exported:
    """Writes a model, in evaluation mode and on the CPU, as a file that ``torch.export.load`` reads.

    What the model returns beside tensors becomes None, and a warning names it; dataclasses and the like become dicts.

    Args:
        model: Any module, converted or not, of any dtype; it is not changed.
        example_input: Its input, as for :func:`ddf_convert.plan`.
        path: The file, usually .pt2. It is replaced if it exists, once the export has succeeded.
        dynamic: Keep the sizes of the batch and of images free where the model's forward allows.
        keep_operator: Keep ``ddf_convert``'s operators with their kernels: programs that load the file must import
            ``ddf_convert`` first. Otherwise the file holds operators of torch only, and needs nothing but torch.
        check: Compare outputs with those of the model, at the example's sizes and at others.

    Returns:
        What was written, with the allowed sizes and the differences.

    Raises:
        UsageError: The model does not run on the example, or the file cannot be written.
        DDFError: ``torch.export`` cannot follow the model, or its outputs differ. An old file stays as it was.
    """
    file = Path(path)
    check_file("path", file)
    traced = trace(model, example_input, dynamic)
    program = traced.program
    with torch.no_grad(), quiet():
        try:
            if not keep_operator:
                program = program.run_decompositions(decompositions())
            content = _to_bytes(program)
        except Exception as error:
            raise DDFError(f"torch.export cannot write {type(model).__name__}: {short_reason(error)}") from error
    operators = _count_operators(program)
    foreign = sorted(name for name in operators if not name.startswith("aten."))
    if foreign and not keep_operator:
        raise DDFError(f"{type(model).__name__} uses operators that torch does not have: {', '.join(foreign)}")
    return check_and_write(
        traced,
        content,
        file,
        format="torch-export",
        operators=operators,
        runner_name="the exported program",
        make_runner=_make_runner if check else None,
    )


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """Returns the reference of both operators, for ``ExportedProgram.run_decompositions``."""
    operators = torch.ops.ddf_convert
    return {operators.ddf.default: _ddf, operators.filter_norm.default: _filter_norm}


def _ddf(
    input: Tensor,
    channel_filter: Tensor,
    spatial_filter: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    combine: str,
    upscale_factor: int = 1,
    norm_scale: float | None = None,
) -> Tensor:
    geometry = reference.Geometry(stride, padding, dilation, combine, upscale_factor)
    return reference.forward(input, channel_filter, spatial_filter, geometry, norm_scale)


def _filter_norm(filters: Tensor, taps: int, scale: float) -> Tensor:
    return reference.filter_norm(filters, taps, scale).to(filters.dtype)


def _to_bytes(program: ExportedProgram) -> bytes:
    for node in program.graph.nodes:  # lines of source files on this machine, and half of the file
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _make_runner(content: bytes) -> Runner:
    with quiet():
        module = torch.export.load(io.BytesIO(content)).module()
    return lambda args, kwargs: tensors_in(module(*args, **kwargs))


def _count_operators(program: ExportedProgram) -> dict[str, int]:
    """Counts operators, without Python's arithmetic with sizes."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    return dict(sorted(Counter(str(target) for target in targets if isinstance(target, OpOverload)).items()))
