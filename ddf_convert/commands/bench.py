"""The commands that measure: the operator, DDF-Up, a layer, a model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_distinct, check_output
from ddf_convert.commands.console import busy, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.conversion import planned
from ddf_convert.commands.options import (
    HELP,
    Combine,
    CombineOption,
    Conversion,
    Debug,
    Device,
    Heads,
    InChans,
    InputSize,
    Model,
    ModelKwargs,
    NumClasses,
    Overwrite,
    SeRatio,
    read_by,
    takes_conversion,
    timm_arguments,
)
from ddf_convert.errors import UsageError

app = typer.Typer(
    help="Measure the operator, a layer or a model beside what they replace.",
    no_args_is_help=True,
    context_settings=HELP,
)
_STDOUT = Path("-")


class Dtype(StrEnum):
    """Of the tensors that are measured."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class ModelDtype(StrEnum):
    """Of a whole model: what can be trained without scaling the loss."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Layout(StrEnum):
    """Memory format of the maps."""

    CONTIGUOUS = "contiguous"
    CHANNELS_LAST = "channels_last"


DtypeOption = Annotated[Dtype, typer.Option(help="Of the tensors and the weights.")]
LayoutOption = Annotated[Layout, typer.Option(help="Memory format of the maps.")]
KernelSize = Annotated[int, typer.Option(help="Rows, and columns, of the filters.")]
Seconds = Annotated[float, typer.Option(min=0.001, help="To spend on each time, at least.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Images at a time.", show_default="32 on a GPU, 4 on the CPU")]
ModelBatch = Annotated[
    int | None, typer.Option(min=1, help="Images at a time.", show_default="64 on a GPU, 4 on the CPU")
]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let a GPU use TF32 where float32 is asked for.")]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write JSON; - is stdout, and nothing else there.", show_default=False
    ),
]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw a PNG.", show_default=False)]


@app.command("op")
def bench_op(
    resolution: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows, and columns, of the maps. Repeatable.", show_default="7 14 28 56 112 224"),
    ] = None,
    channels: Annotated[int, typer.Option(min=1)] = 256,
    batch: Batch = None,
    dtype: DtypeOption = Dtype.FLOAT32,
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
    debug: Debug = False,
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
            dtype=dtype.value,
            layouts=tuple(dict.fromkeys(chosen.value for chosen in layout or Layout)),
            device=where,
            seconds=seconds,
            compiled=where.type == "cuda" if compiled is None else compiled,
        )
        document = op.run(settings, say)
    _present_figures(document, json_file, plot)


@app.command("up")
def bench_up(
    resolution: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows, and columns, of the input. Repeatable.", show_default="28 56 112"),
    ] = None,
    channels: Annotated[int, typer.Option(min=1)] = 256,
    scale_factor: Annotated[int, typer.Option(help="How many times larger the output is.")] = 2,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at a time.", show_default="16 on a GPU, 1 on the CPU")
    ] = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    layout: LayoutOption = Layout.CONTIGUOUS,
    kernel_size: KernelSize = 3,
    seconds: Seconds = 0.5,
    device: Device = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
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
            dtype=dtype.value,
            layout=layout.value,
            device=where,
            seconds=seconds,
        )
        document = up.run(settings, say)
    _present_figures(document, json_file, plot)


@app.command("layer")
def bench_layer(
    channels: Annotated[int, typer.Option(min=1, help="In and out.")] = 256,
    size: Annotated[int, typer.Option(min=1, help="Rows, and columns, of the input.")] = 56,
    kernel_size: KernelSize = 3,
    stride: Annotated[int, typer.Option(min=1)] = 1,
    dilation: Annotated[int, typer.Option(min=1)] = 1,
    heads: Heads = 1,
    se_ratio: SeRatio = 0.2,
    combine: CombineOption = Combine.MUL,
    batch: Batch = None,
    dtype: DtypeOption = Dtype.FLOAT32,
    layout: LayoutOption = Layout.CONTIGUOUS,
    tf32: Tf32 = False,
    seconds: Seconds = 0.5,
    device: Device = None,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """One convolution, and the DDF layers that can take its place."""
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
            combine=combine.value,
            batch=batch or layer.BATCH[where.type],
            dtype=dtype.value,
            layout=layout.value,
            device=where,
            seconds=seconds,
            tf32=tf32,
        )
        document = layer.run(settings, say)
    _present_figures(document, json_file, plot)


@app.command("model")
@takes_conversion
def bench_model(
    model: Model,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    model_kwargs: ModelKwargs = None,
    batch: ModelBatch = None,
    dtype: Annotated[ModelDtype, typer.Option(help="bfloat16 is autocast's in training.")] = ModelDtype.FLOAT32,
    layout: LayoutOption = Layout.CONTIGUOUS,
    tf32: Tf32 = False,
    seconds: Seconds = 2.0,
    device: Device = None,
    *,
    conversion: Conversion,
    json_file: JsonFile = None,
    plot: PlotFile = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Images a second before and after conversion, in inference and in training."""
    with _measuring(json_file, plot, overwrite, read_by(model, conversion.recipe_file)) as say:
        from ddf_convert.artifacts.source import open_model
        from ddf_convert.bench import model as models
        from ddf_convert.utils.device import choose

        where = choose(device)
        say(f"Opening {model}")
        opened = open_model(model, weights=True, arguments=timm_arguments(num_classes, in_chans, model_kwargs))
        plan = planned(opened, input_size, conversion)
        if not plan.replaced:
            raise UsageError(f"nothing to convert in {model}: `ddf-convert inspect {model}` says why")
        settings = models.ModelSettings(
            input_size=input_size or opened.input_size,
            batch=batch or models.BATCH[where.type],
            dtype=dtype.value,
            layout=layout.value,
            device=where,
            seconds=seconds,
            tf32=tf32,
        )
        document = models.run(opened.name, opened.model, plan, settings, say)
    _present_figures(document, json_file, plot)


@contextlib.contextmanager
def _measuring(json_file: Path | None, plot: Path | None, overwrite: bool, reads: Sequence[Path] = ()) -> Iterator[Any]:
    """Checks the files before hours are spent; what models print while they run is kept out of JSON on stdout."""
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


def _present_figures(document: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
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
