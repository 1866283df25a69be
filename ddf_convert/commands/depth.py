"""The commands of joint depth upsampling: ``depth train`` and ``depth predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Column

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_file, check_output
from ddf_convert.commands.completion import recipe_names
from ddf_convert.commands.console import err, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.options import (
    HELP,
    Amp,
    AsJson,
    Device,
    LearningRate,
    Overwrite,
    Resume,
    Seed,
    Steps,
    plain_option,
    read_by,
    stage_changes,
    stage_option,
    with_shared_options,
)
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.depth.predict import Upsampled

app = typer.Typer(
    help="Upsample depth maps under the guidance of a photo.", no_args_is_help=True, context_settings=HELP
)

Unit = Annotated[
    str | None,
    plain_option(
        "Unit of the numbers in depth files: mm, cm, m, or another word. mm in PNG, else m.", "--unit", metavar="NAME"
    ),
]
Allow8bit = Annotated[bool, typer.Option("--allow-8bit", help="Accept depth in PNG of 8 bits, which hold 256 depths.")]


@app.command("train")
@with_shared_options
def train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="A folder with rgb/ and depth/, or nyu_depth_v2_labeled.mat.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, plain_option("Folder of the run, and of the network.", "--output", "-o", metavar="RUN")],
    factor: Annotated[int, typer.Option("--factor", help="2, 4, 8 or 16.", metavar="S")] = 8,
    recipe: Annotated[
        str, typer.Option(help="A recipe, or a file.", metavar="NAME|FILE", autocompletion=recipe_names)
    ] = "depth-upsample",
    resume: Resume = False,
    epochs: Annotated[int | None, stage_option("Crops of every pair.", min=1, metavar="N")] = None,
    steps: Steps = None,
    batch_size: Annotated[int | None, stage_option("Crops at a time.", min=1, metavar="N")] = None,
    lr: LearningRate = None,
    amp: Amp = None,
    crop: Annotated[int, typer.Option(min=4, help="Rows, and columns, of a crop.")] = 128,
    downsample: Annotated[
        Literal["nearest", "bicubic", "mean"], typer.Option(help="How small depth maps are made.")
    ] = "nearest",
    loss: Annotated[Literal["l1", "l2", "huber"], typer.Option(help="Loss of the depth.")] = "huber",
    turned: Annotated[
        float, typer.Option(min=0, max=1, help="Share of crops whose near and far change places: for few data.")
    ] = 0.0,
    width: Annotated[int | None, plain_option("Channels of the network's features.", min=2, metavar="N")] = None,
    upsampler: Annotated[
        Literal["ddf", "conv"], typer.Option(help="conv is the network that DDF-Up-Net is compared with.")
    ] = "ddf",
    unit: Unit = None,
    allow_8bit: Allow8bit = False,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train DDF-Up-Net on photos with depth maps. Ctrl-C saves; --resume continues."""
    changes = stage_changes(epochs, steps, lr, batch_size=batch_size, amp=amp)
    with only_results_on_stdout():
        from ddf_convert.depth import run
        from ddf_convert.depth.trainer import DepthSettings

        outcome = run.train(
            run.DepthTrainRequest(
                data=data,
                output=output,
                factor=factor,
                upsampler=upsampler,
                arguments={} if width is None else {"width": width, "guide_width": width},
                recipe=recipe,
                changes=changes,
                settings=DepthSettings(crop=crop, downsample=downsample, loss=loss, seed=seed, turned=turned),
                unit=unit,
                allow_8bit=allow_8bit,
                resume=resume,
                device=device,
            )
        )
    if as_json:
        print_json(outcome.to_dict())
        return
    where = escape(str(outcome.output))
    out.print(f"{outcome.steps:,} steps on {outcome.pairs} pairs in {outcome.seconds:.1f} s", soft_wrap=True)
    if not outcome.finished:
        out.print(
            f"Stopped as asked, with a checkpoint in [bold]{where}[/]: the same command with --resume goes on.",
            soft_wrap=True,
        )
        return
    if outcome.rmse is not None:
        out.print(
            f"RMSE on {outcome.validation} validation pairs: {outcome.rmse:.4g} {outcome.unit}"
            f" (bilinear interpolation: {outcome.bilinear:.4g})",
            soft_wrap=True,
        )
    out.print(f"Network of {outcome.parameters:,} parameters: [bold]{where}[/]", soft_wrap=True)


@app.command("predict")
@with_shared_options
def predict(
    rgb: Annotated[Path, plain_option("The photo.", "--rgb", metavar="FILE")],
    depth: Annotated[Path, plain_option("The small depth map: PNG of 16 bits, NPY or PFM.", "--depth", metavar="FILE")],
    checkpoint: Annotated[Path, plain_option("A folder of `depth train`.", "--checkpoint", metavar="DIR")],
    output: Annotated[Path, plain_option("The large depth map: PNG, NPY or PFM.", "--output", "-o", metavar="FILE")],
    factor: Annotated[
        int | None, plain_option("The network's own if not given.", "--factor", min=2, metavar="S")
    ] = None,
    truth: Annotated[
        Path | None, plain_option("The true large depth map, to measure errors.", "--truth", metavar="FILE")
    ] = None,
    unit: Unit = None,
    allow_8bit: Allow8bit = False,
    picture: Annotated[bool, typer.Option("--picture/--no-picture", help="Also draw OUT_compare.png.")] = True,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Upsample a depth map under the guidance of a photo."""
    check_file("--output", output)  # a folder has no name to make another one of
    comparison = output.with_name(f"{output.stem}_compare.png") if picture else None
    for wanted in filter(None, (output, comparison)):
        check_output("--output", wanted, overwrite, read_by(str(checkpoint), rgb, depth, truth))
    with only_results_on_stdout():
        from ddf_convert.depth import predict

        found = predict.upsample_files(
            predict.PredictRequest(
                photo=rgb,
                depth=depth,
                checkpoint=checkpoint,
                output=output,
                factor=factor,
                truth=truth,
                unit=unit,
                allow_8bit=allow_8bit,
                device=device,
            )
        )
        for line in found.notes:
            err.print(escape(line), soft_wrap=True)
        # Everything is made before anything is written.
        contents = [(output, found.content)]
        if comparison is not None:
            try:
                contents.append((comparison, found.picture()))
            except ImportError:
                raise UsageError(
                    "the picture needs matplotlib: pip install 'ddf-convert[plot]', or give --no-picture"
                ) from None
    for file, content in contents:
        write_file(file, content)
    if as_json:
        drawn = None if comparison is None else str(comparison)
        document = {**found.to_dict(), "output": str(output), "picture": drawn}
        print_json(document)
        return
    _present(found)
    print_file("Depth", output)
    if comparison is not None:
        print_file("Picture", comparison)


def _present(found: Upsampled) -> None:
    from ddf_convert.report.tables import new_table, numeric_column

    columns = [
        Column(""),
        numeric_column("size"),
        numeric_column("range"),
        *([numeric_column("RMSE")] if found.measured else []),
    ]
    table = new_table(*columns)
    for row in found.rows:
        low, high = row.range
        cells = [row.name, f"{row.width}x{row.height}", f"{low:.4g} to {high:.4g} {found.unit.name}"]
        if found.measured:
            cells.append("" if row.rmse is None else f"{found.unit.show(row.rmse):.4g} {found.unit.shown}")
        table.add_row(*cells)
    out.print(table)
