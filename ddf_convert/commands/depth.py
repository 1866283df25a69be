"""The commands of joint depth upsampling."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_file, check_output
from ddf_convert.commands.completion import recipe_names
from ddf_convert.commands.console import err, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.options import (
    Amp,
    AsJson,
    Debug,
    Overwrite,
    TrainingDevice,
    plain_option,
    read_by,
    stage_change,
)
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.depth.single import Upsampled


class Downsample(StrEnum):
    """How a small depth map is made of a large one."""

    NEAREST = "nearest"
    BICUBIC = "bicubic"
    MEAN = "mean"


class Upsampler(StrEnum):
    """What doubles features."""

    DDF = "ddf"
    CONV = "conv"


class LossOption(StrEnum):
    """What is minimized."""

    L1 = "l1"
    L2 = "l2"
    HUBER = "huber"


UnitOption = Annotated[
    str | None,
    plain_option(
        "What the numbers of depth files are: mm, cm, m, or another word. mm in PNG, else m.", "--unit", metavar="NAME"
    ),
]
Allow8bit = Annotated[bool, typer.Option("--allow-8bit", help="Take depth in PNG of 8 bits, which hold 256 depths.")]


def upsample_train(
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN, if there is one.")] = False,
    epochs: Annotated[int | None, stage_change("Crops of every pair.", min=1, metavar="N")] = None,
    steps: Annotated[int | None, stage_change("Steps, in the place of epochs.", min=1, metavar="N")] = None,
    batch_size: Annotated[int | None, stage_change("Crops at a time.", min=1, metavar="N")] = None,
    lr: Annotated[float | None, stage_change("Learning rate.", metavar="X")] = None,
    amp: Annotated[Amp | None, stage_change("Autocast's dtype.")] = None,
    crop: Annotated[int, typer.Option(min=4, help="Rows, and columns, of a crop.")] = 128,
    downsample: Annotated[Downsample, typer.Option(help="How small depth maps are made.")] = Downsample.NEAREST,
    loss: Annotated[LossOption, typer.Option(help="Of the errors.")] = LossOption.HUBER,
    turned: Annotated[
        float, typer.Option(min=0, max=1, help="Share of crops whose near and far change places: for few data.")
    ] = 0.0,
    width: Annotated[int | None, plain_option("Channels of the network's features.", min=2, metavar="N")] = None,
    upsampler: Annotated[
        Upsampler, typer.Option(help="conv is the network that DDF-Up-Net is compared with.")
    ] = Upsampler.DDF,
    unit: UnitOption = None,
    allow_8bit: Allow8bit = False,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 0,
    device: TrainingDevice = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train DDF-Up-Net on photos with depth maps. Ctrl-C saves; --resume goes on."""
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps exclude each other: give one")
    if lr is not None and lr <= 0:
        raise UsageError(f"--lr {lr:g}: must be above 0")
    with only_results_on_stdout():
        from ddf_convert.depth import run
        from ddf_convert.depth.training import Settings

        outcome = run.train(
            run.Request(
                data=data,
                output=output,
                factor=factor,
                upsampler=upsampler.value,
                arguments={} if width is None else {"width": width, "guide_width": width},
                recipe=recipe,
                changes={
                    "epochs": epochs,
                    "steps": steps,
                    "batch_size": batch_size,
                    "lr": lr,
                    "amp": None if amp is None else amp.value,
                },
                settings=Settings(crop=crop, downsample=downsample.value, loss=loss.value, seed=seed, turned=turned),
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


def upsample(
    rgb: Annotated[Path, plain_option("The photo.", "--rgb", metavar="FILE")],
    depth: Annotated[Path, plain_option("The small depth map: PNG of 16 bits, NPY or PFM.", "--depth", metavar="FILE")],
    checkpoint: Annotated[Path, plain_option("A folder of upsample-train.", "--checkpoint", metavar="DIR")],
    output: Annotated[Path, plain_option("The large depth map: PNG, NPY or PFM.", "--output", "-o", metavar="FILE")],
    factor: Annotated[
        int | None, plain_option("The network's own if not given.", "--factor", min=2, metavar="S")
    ] = None,
    truth: Annotated[
        Path | None, plain_option("The true large depth map, to measure errors.", "--truth", metavar="FILE")
    ] = None,
    unit: UnitOption = None,
    allow_8bit: Allow8bit = False,
    picture: Annotated[bool, typer.Option("--picture/--no-picture", help="Also draw OUT_compare.png.")] = True,
    overwrite: Overwrite = False,
    device: TrainingDevice = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Upsample a depth map under the guidance of a photo."""
    check_file("--output", output)  # a folder has no name to make another one of
    comparison = output.with_name(f"{output.stem}_compare.png") if picture else None
    for wanted in filter(None, (output, comparison)):
        check_output("--output", wanted, overwrite, read_by(str(checkpoint), rgb, depth, truth))
    with only_results_on_stdout():
        from ddf_convert.depth import single

        found = single.upsample_files(
            single.Request(
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
