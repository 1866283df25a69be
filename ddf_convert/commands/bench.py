"""The commands that measure: the operator, DDF-Up, a layer, a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_distinct, check_output
from ddf_convert.commands.console import busy, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.conversion import check_replaces, make_plan
from ddf_convert.commands.options import (
    HELP,
    Conversion,
    Device,
    InputSize,
    Model,
    Overwrite,
    TimmArguments,
    config_option,
    plain_option,
    read_by,
    with_shared_options,
)

app = typer.Typer(
    help="Measure the operator, a layer or a model beside what they replace.",
    no_args_is_help=True,
    context_settings=HELP,
)
_STDOUT = Path("-")

Dtype = Literal["float32", "float64", "float16", "bfloat16"]
ModelDtype = Literal["float32", "bfloat16"]  # that can be trained without scaling the loss


class Layout(StrEnum):  # typer has no lists of Literals
    """Memory formats of the maps."""

    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels_last"


DtypeOption = Annotated[Dtype, typer.Option(help="Dtype of the tensors and the weights.")]
LayoutOption = Annotated[Layout, typer.Option(help="Memory format of the maps.")]
KernelSize = Annotated[int, typer.Option(help="Rows, and columns, of the filters.")]
Seconds = Annotated[float, typer.Option(min=0.001, help="To spend on each time, at least.")]
Channels = Annotated[int, typer.Option(min=1, help="Channels of the maps.")]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let a GPU use TF32 where float32 is asked for.")]
JsonFile = Annotated[
    Path | None, plain_option("Also write JSON; - is stdout, and nothing else there.", "--json", metavar="FILE")
]
PlotFile = Annotated[Path | None, plain_option("Also draw a PNG.", "--plot", metavar="FILE")]


def _batch_option(default: str) -> Any:
    return typer.Option(min=1, help="Images at a time.", show_default=default)


Batch = Annotated[int | None, _batch_option("32 on a GPU, 4 on the CPU")]


@app.command("op")
@with_shared_options
def bench_op(
    resolution: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows, and columns, of the maps. Repeatable.", show_default="7 14 28 56 112 224"),
    ] = None,
    channels: Channels = 256,
    batch: Batch = None,
    dtype: DtypeOption = "float32",
    layout: Annotated[
        list[Layout] | None, typer.Option(help="Memory format of the maps. Repeatable.", show_default="both")
    ] = None,
    kernel_size: KernelSize = 3,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Also plain PyTorch under torch.compile.",
            show_default="on a GPU",
        ),
    ] = None,
    seconds: Seconds = 0.5,
    device: Device = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
) -> None:
    """The operator beside convolutions and plain PyTorch, at the paper's sizes."""
    with _measuring(json_file, plot, overwrite) as say:
        from ddf_convert.bench import op
        from ddf_convert.utils.device import choose

        where = choose(device)
        settings = op.OpSettings(
            resolutions=tuple(dict.fromkeys(resolution or op.RESOLUTIONS)),
            channels=channels,
            batch=batch or op.BATCH[where.type],
            kernel_size=kernel_size,
            dtype=dtype,
            layouts=tuple(dict.fromkeys(each.value for each in layout or Layout)),
            device=where,
            seconds=seconds,
            compiled=where.type == "cuda" if compiled is None else compiled,
        )
        document = op.run(settings, say)
    _present(document, json_file, plot)


@app.command("up")
@with_shared_options
def bench_up(
    resolution: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows, and columns, of the input. Repeatable.", show_default="28 56 112"),
    ] = None,
    channels: Channels = 256,
    scale_factor: Annotated[int, typer.Option(help="How many times larger the output is.")] = 2,
    batch: Annotated[int | None, _batch_option("16 on a GPU, 1 on the CPU")] = None,
    dtype: DtypeOption = "float32",
    layout: LayoutOption = Layout.CONTIGUOUS,
    kernel_size: KernelSize = 3,
    seconds: Seconds = 0.5,
    device: Device = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
) -> None:
    """DDF-Up beside interpolation, a transposed convolution and unfolding."""
    with _measuring(json_file, plot, overwrite) as say:
        from ddf_convert.bench import up
        from ddf_convert.utils.device import choose

        where = choose(device)
        settings = up.UpSettings(
            resolutions=tuple(dict.fromkeys(resolution or up.RESOLUTIONS)),
            channels=channels,
            scale_factor=scale_factor,
            batch=batch or up.BATCH[where.type],
            kernel_size=kernel_size,
            dtype=dtype,
            layout=layout.value,
            device=where,
            seconds=seconds,
        )
        document = up.run(settings, say)
    _present(document, json_file, plot)


@app.command("layer")
@with_shared_options
def bench_layer(
    channels: Annotated[int, typer.Option(min=1, help="In and out.")] = 256,
    size: Annotated[int, typer.Option(min=1, help="Rows, and columns, of the input.")] = 56,
    kernel_size: KernelSize = 3,
    stride: Annotated[int, typer.Option(min=1)] = 1,
    dilation: Annotated[int, typer.Option(min=1)] = 1,
    heads: Annotated[int, config_option("heads")] = 1,
    se_ratio: Annotated[float, config_option("se_ratio")] = 0.2,
    combine: Annotated[Literal["mul", "add"], config_option("combine")] = "mul",
    batch: Batch = None,
    dtype: DtypeOption = "float32",
    layout: LayoutOption = Layout.CONTIGUOUS,
    tf32: Tf32 = False,
    seconds: Seconds = 0.5,
    device: Device = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
) -> None:
    """One convolution beside the DDF layers that can replace it."""
    with _measuring(json_file, plot, overwrite) as say:
        from ddf_convert.bench import layer
        from ddf_convert.utils.device import choose

        where = choose(device)
        settings = layer.LayerSettings(
            channels=channels,
            size=size,
            kernel_size=kernel_size,
            stride=stride,
            dilation=dilation,
            heads=heads,
            se_ratio=se_ratio,
            combine=combine,
            batch=batch or layer.BATCH[where.type],
            dtype=dtype,
            layout=layout.value,
            device=where,
            seconds=seconds,
            tf32=tf32,
        )
        document = layer.run(settings, say)
    _present(document, json_file, plot)


@app.command("model")
@with_shared_options
def bench_model(
    model: Model,
    input_size: InputSize = None,
    *,
    arguments: TimmArguments,
    batch: Annotated[int | None, _batch_option("64 on a GPU, 4 on the CPU")] = None,
    dtype: Annotated[ModelDtype, typer.Option(help="bfloat16 is autocast's in training.")] = "float32",
    layout: LayoutOption = Layout.CONTIGUOUS,
    tf32: Tf32 = False,
    seconds: Seconds = 2.0,
    device: Device = None,
    conversion: Conversion,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Images a second before and after conversion, in inference and in training."""
    with _measuring(json_file, plot, overwrite, read_by(model, conversion.recipe_file)) as say:
        from ddf_convert.artifacts.source import open_model
        from ddf_convert.bench import model as models
        from ddf_convert.utils.device import choose

        where = choose(device)
        say(f"Opening {model}")
        opened = open_model(model, weights=True, arguments=arguments)
        plan = make_plan(opened, input_size, conversion)
        check_replaces(plan, model)
        settings = models.ModelSettings(
            input_size=input_size or opened.input_size,
            batch=batch or models.BATCH[where.type],
            dtype=dtype,
            layout=layout.value,
            device=where,
            seconds=seconds,
            tf32=tf32,
        )
        document = models.run(opened.name, opened.model, plan, settings, say)
    _present(document, json_file, plot)


@contextlib.contextmanager
def _measuring(json_file: Path | None, plot: Path | None, overwrite: bool, reads: Sequence[Path] = ()) -> Iterator[Any]:
    """Checks the files to write, and keeps what models print while they run out of stdout."""
    if json_file and json_file != _STDOUT:
        check_output("--json", json_file, overwrite, reads)
        check_distinct([("--json", json_file), ("--plot", plot)])
    if plot:
        check_output("--plot", plot, overwrite, reads)
    with busy("Measuring") as say, only_results_on_stdout():
        if plot:
            from ddf_convert.bench.plot import check_plot

            check_plot(plot)
        yield say


def _present(document: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    if plot:
        from ddf_convert.bench.plot import png

        write_file(plot, png(document))
    if json_file == _STDOUT:
        print_json(document)
        return
    if json_file:
        write_file(json_file, json.dumps(document, indent=1) + "\n")
    from ddf_convert.bench.tables import tables

    out.print(tables(document))
    for what, file in (("Figures", json_file), ("Plot", plot)):
        if file:
            print_file(what, file)
