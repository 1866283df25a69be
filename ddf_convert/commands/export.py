"""The command that exports a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from ddf_convert.artifacts.path_checks import check_output
from ddf_convert.commands.console import busy, facts_table, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.options import (
    AsJson,
    InputSize,
    Overwrite,
    TimmArguments,
    model_argument,
    plain_option,
    read_by,
    with_shared_options,
)
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.export import Exported

Format = Literal["onnx", "torch-export"]
_FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch-export"}  # by the suffix of the file


@with_shared_options
def export(
    model: Annotated[
        str,
        model_argument(
            "A converted folder, a timm model (with random weights), or package.module:callable, which returns a model"
            " (or a model and an example input)."
        ),
    ],
    output: Annotated[Path, plain_option("The file: .onnx or .pt2.", "--output", "-o", metavar="FILE")],
    format: Annotated[Format | None, plain_option("By the name of the file if not given.", "--format")] = None,
    input_size: InputSize = None,
    *,
    arguments: TimmArguments,
    opset: Annotated[
        int | None, plain_option("ONNX's version of the operators, 18 or more; 18 if not given.", metavar="N")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Fix all sizes, the batch too, at those of one image.")
    ] = False,
    keep_operator: Annotated[
        bool,
        typer.Option(
            "--keep-operator",
            help="torch-export: keep DDF's operators and their kernels; whoever loads the file imports ddf_convert.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as an ONNX or torch.export file, and compare it with PyTorch first."""
    chosen = format or _FORMATS.get(output.suffix.lower())
    if chosen is None:
        raise UsageError(f"--output {output}: give --format onnx or torch-export, or a name that ends in .onnx or .pt2")
    if keep_operator and chosen == "onnx":
        raise UsageError("--keep-operator is for torch-export: ONNX files hold standard operators alone")
    if opset is not None and chosen != "onnx":
        raise UsageError("--opset is for ONNX")
    check_output("--output", output, overwrite, read_by(model))
    with busy(f"Opening {model}") as say, only_results_on_stdout():
        from ddf_convert import export as exports
        from ddf_convert.artifacts.source import open_model
        from ddf_convert.export.onnx_file import check_packages

        if chosen == "onnx":
            check_packages()
        opened = open_model(model, weights=True, arguments=arguments)
        example = opened.make_example(input_size, real=True)
        say(f"Exporting {model}, which takes a second or two for every DDF layer")
        if chosen == "onnx":
            done = exports.to_onnx(opened.model, example, output, dynamic=not static, opset=opset)
        else:
            done = exports.to_torch_export(
                opened.model, example, output, dynamic=not static, keep_operator=keep_operator
            )
    if as_json:
        print_json({"model": opened.name, **done.to_dict()})
    else:
        _present(done, keep_operator)


def _present(done: Exported, keep_operator: bool) -> None:
    from ddf_convert.report import units

    form = f"ONNX, opset {done.opset}" if done.opset else "torch.export"
    operators = f"{sum(done.operators.values()):,} of {len(done.operators)} kinds"
    standard = "ddf_convert's among them" if keep_operator else "all ONNX's own" if done.opset else "all torch's own"
    rows = [("format", form), ("operators", f"{operators}, {standard}")]
    for what, shapes in (("input", done.inputs), ("output", done.outputs)):
        rows += [(what, f"{name}: {' x '.join(map(str, shape))}") for name, shape in shapes.items()]
    rows += [(size.name, str(size)) for size in done.sizes]
    for check in done.checks:
        words = f"differs from PyTorch by {check.difference:.1e} at most; outputs reach {check.largest:.3g}"
        if check.rounding is not None:
            words += f"; PyTorch itself is {check.rounding:.1e} off from float64: the model enlarges every rounding"
        rows.append((f"at {check.at}", words))
    out.print(facts_table(rows))
    print_file("Written", done.file, f" ({units.size(done.bytes)})")
    if done.opset is None:
        first = "import ddf_convert, torch" if keep_operator else "import torch"
        call = escape(f"torch.export.load({str(done.file)!r}).module()")
        out.print(f"To use it in Python: {first}; model = {call}", soft_wrap=True)
