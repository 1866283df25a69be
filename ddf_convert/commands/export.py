"""The command that exports a model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from ddf_convert.artifacts.path_checks import check_output
from ddf_convert.commands.completion import timm_names
from ddf_convert.commands.console import busy, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.options import (
    AsJson,
    Debug,
    InChans,
    ModelKwargs,
    NumClasses,
    Overwrite,
    plain_option,
    read_by,
    timm_arguments,
)
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.artifacts.source import OpenedModel
    from ddf_convert.export import Exported
    from ddf_convert.utils.example_input import ExampleInput


class Format(StrEnum):
    """What is written."""

    ONNX = "onnx"
    TORCH_EXPORT = "torch-export"


_BY_ENDING = {".onnx": Format.ONNX, ".pt2": Format.TORCH_EXPORT}


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A converted folder, a timm model (with random weights), or package.module:callable, which returns a"
            " model (or a model and an example input).",
            autocompletion=timm_names,
            show_default=False,
        ),
    ],
    output: Annotated[Path, plain_option("The file: .onnx or .pt2.", "--output", "-o", metavar="FILE")],
    format: Annotated[Format | None, plain_option("By the name of the file if not given.", "--format")] = None,
    input_size: Annotated[
        tuple[int, int, int] | None,
        plain_option("Size of the example image; the model's own if not given.", "--input-size", metavar="C H W"),
    ] = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    model_kwargs: ModelKwargs = None,
    opset: Annotated[
        int | None, plain_option("ONNX's version of the operators, 18 or more. 18.", "--opset", metavar="N")
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
    debug: Debug = False,
) -> None:
    """Write a model as an ONNX or torch.export file, and compare it with PyTorch first."""
    arguments = timm_arguments(num_classes, in_chans, model_kwargs)
    chosen = format or _BY_ENDING.get(output.suffix.lower())
    if chosen is None:
        raise UsageError(f"--output {output}: give --format onnx or torch-export, or a name that ends in .onnx or .pt2")
    if keep_operator and chosen is Format.ONNX:
        raise UsageError("--keep-operator is for torch-export: ONNX files hold standard operators alone")
    if opset is not None and chosen is not Format.ONNX:
        raise UsageError("--opset is for ONNX")
    if input_size and min(input_size) < 1:
        raise UsageError(f"--input-size {' '.join(map(str, input_size))}: every number must be at least 1")
    check_output("--output", output, overwrite, read_by(model))
    with busy(f"Opening {model}") as say, only_results_on_stdout():
        from ddf_convert import export as exports
        from ddf_convert.artifacts.source import open_model
        from ddf_convert.export.onnx_file import check_packages

        if chosen is Format.ONNX:
            check_packages()
        opened = open_model(model, weights=True, arguments=arguments)
        example = _example(opened, input_size)
        say(f"Exporting {model}, which takes a second or two for every DDF layer")
        if chosen is Format.ONNX:
            done = exports.to_onnx(opened.model, example, output, dynamic=not static, opset=opset)
        else:
            done = exports.to_torch_export(
                opened.model, example, output, dynamic=not static, keep_operator=keep_operator
            )
    if as_json:
        print_json({"model": opened.name, **done.to_dict()})
    else:
        _present(done, keep_operator)


def _example(opened: OpenedModel, input_size: tuple[int, int, int] | None) -> ExampleInput:
    """The model's own, or one random image."""
    if input_size is None and opened.example_input is not None:
        return opened.example_input
    import torch

    first = next((each for each in opened.model.parameters() if each.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *(input_size or opened.input_size), generator=generator).to(first.dtype)


def _present(done: Exported, keep_operator: bool) -> None:
    from rich.table import Column

    from ddf_convert.report import units
    from ddf_convert.report.tables import new_table

    form = f"ONNX, opset {done.opset}" if done.opset else "torch.export"
    operators = f"{sum(done.operators.values()):,} of {len(done.operators)} kinds"
    standard = "ddf_convert's among them" if keep_operator else "all ONNX's own" if done.opset else "all torch's own"
    table = new_table(Column(""), Column("", overflow="fold"))
    table.show_header = False
    table.add_row("format", form)
    table.add_row("operators", f"{operators}, {standard}")
    for what, shapes in (("input", done.inputs), ("output", done.outputs)):
        for name, shape in shapes.items():
            table.add_row(what, escape(f"{name}: {' x '.join(map(str, shape))}"))
    for size in done.sizes:
        table.add_row(size.name, escape(str(size)))
    for check in done.checks:
        words = f"differs from PyTorch by {check.difference:.1e} at most; outputs reach {check.largest:.3g}"
        if check.rounding is not None:
            words += f"; PyTorch itself is {check.rounding:.1e} off from float64: the model enlarges every rounding"
        table.add_row(f"at {check.at}", words)
    out.print(table)
    print_file("Written", done.file, f" ({units.size(done.bytes)})")
    if done.opset is None:
        first = "import ddf_convert, torch" if keep_operator else "import torch"
        call = escape(f"torch.export.load({str(done.file)!r}).module()")
        out.print(f"To use it in Python: {first}; model = {call}", soft_wrap=True)
