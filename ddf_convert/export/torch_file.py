"""Models as files of ``torch.export`` (.pt2)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_file
from ddf_convert.errors import DDFError
from ddf_convert.export.checking import check as check_against
from ddf_convert.export.checking import tolerance
from ddf_convert.export.program import quiet, reason, tensors_in, trace
from ddf_convert.export.result import Exported
from ddf_convert.export.standard import decompositions
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
    """Writes a model as a file that ``torch.export.load`` reads.

    It is the model in evaluation mode, on the CPU, in the dtype that it has. What it returns beside tensors becomes
    None, and a warning names it; dataclasses and the like become dicts.

    Args:
        model: Any module, converted or not; it stays as it is.
        example_input: What to call it with: as for :func:`ddf_convert.plan`.
        path: The file, .pt2 by custom; replaced if it exists, once all is well.
        dynamic: Leave the size of the batch, and those of images, free where the model's forward does.
        keep_operator: Keep ``ddf_convert``'s operators, with their kernels: whoever loads the file must have imported
            ``ddf_convert`` before. Otherwise it holds operators of torch alone, and needs nothing but torch.
        check: Compare outputs with those of the model, at the example's sizes and at others.

    Returns:
        What was written, with the sizes that it is for, and the differences.

    Raises:
        UsageError: The model does not run on the example, or the file cannot be written.
        DDFError: ``torch.export`` cannot follow the model, or its outputs differ. The file is then as it was.
    """
    file = Path(path)
    check_file("path", file)
    traced = trace(model, example_input, dynamic)
    program = traced.program
    with torch.no_grad(), quiet():
        try:
            if not keep_operator:
                program = program.run_decompositions(decompositions())
            content = _bytes(program)
        except Exception as error:
            raise DDFError(f"torch.export cannot write {type(model).__name__}: {reason(error)}") from error
    operators = _operators(program)
    left = sorted(name for name in operators if not name.startswith("aten."))
    if left and not keep_operator:
        raise DDFError(f"{type(model).__name__} uses operators that torch does not have: {', '.join(left)}")
    checks = check_against(traced, _runner(content), "the exported program") if check else ()
    write_file(file, content)
    traced.tell_what_is_left_out(file)
    return Exported(
        file=file,
        format="torch-export",
        bytes=len(content),
        opset=None,
        operators=operators,
        inputs=traced.inputs(),
        outputs=traced.outputs(),
        sizes=traced.shapes.sizes,
        tolerance=tolerance(traced.model),
        checks=checks,
        left_out=traced.left_out,
    )


def _bytes(program: ExportedProgram) -> bytes:
    for node in program.graph.nodes:  # lines of source files on this machine: half of a file, and nobody else's concern
        node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _runner(content: bytes) -> Any:
    with quiet():
        module = torch.export.load(io.BytesIO(content)).module()

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
        return tensors_in(module(*args, **kwargs))

    return run


def _operators(program: ExportedProgram) -> dict[str, int]:
    """Without arithmetic with sizes, which is Python's."""
    targets = (node.target for node in program.graph.nodes if node.op == "call_function")
    found = Counter(str(target) for target in targets if isinstance(target, OpOverload))
    return dict(sorted(found.items()))
