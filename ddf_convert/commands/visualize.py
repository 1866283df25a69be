"""The command that looks at the filters of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column
from rich.text import Text

from ddf_convert.artifacts.atomic import write_file
from ddf_convert.artifacts.path_checks import check_output, check_readable
from ddf_convert.commands.console import busy, only_results_on_stdout, out, print_file, print_json
from ddf_convert.commands.options import (
    AsJson,
    Device,
    InputSize,
    Overwrite,
    OwnModel,
    TimmArguments,
    TimmWeights,
    model_argument,
    plain_option,
    read_by,
    with_shared_options,
)
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.visualize import LayerFilters
    from ddf_convert.visualize.run import VisualizeResult


@with_shared_options
def visualize(
    model: Annotated[
        str,
        model_argument(
            "A converted folder, a run, a DDF-ResNet of timm, or package.module:callable, which returns a model."
        ),
    ],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE", help="The first one is drawn; the table is of all.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        plain_option("The picture: .png, .pdf or .svg; none if not given.", "--output", "-o", metavar="FILE"),
    ] = None,
    layer: Annotated[
        list[str] | None,
        plain_option(
            "Draw these: a name, a glob, or re:PATTERN. Repeatable. Six, evenly spread, if not given.",
            "--layer",
            metavar="PATTERN",
        ),
    ] = None,
    head: Annotated[int, typer.Option(min=0, help="Which head of each layer to draw.")] = 0,
    branch: Annotated[int, typer.Option(min=0, help="Of DDF-Up layers, the branch whose taps to draw.")] = 0,
    tap: Annotated[
        list[str] | None,
        plain_option(
            "Draw this tap of the filters large, instead of all: 1,1 is the center of 3x3. Repeatable.",
            "--tap",
            metavar="ROW,COLUMN",
        ),
    ] = None,
    checkpoint: TimmWeights = None,
    own_model: OwnModel = None,
    *,
    arguments: TimmArguments,
    input_size: InputSize = None,
    plain: Annotated[bool, typer.Option("--plain", help="Images as values from 0 to 1, not normalized.")] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Look at the dynamic filters of a model: how dynamic each layer is, and pictures of them."""
    taps = [_parse_tap(each) for each in tap or ()]
    if output is not None:
        check_output("--output", output, overwrite, read_by(model, checkpoint, *images))
    if checkpoint is not None:
        check_readable(f"--checkpoint {checkpoint}", checkpoint)
    with only_results_on_stdout(), busy(f"Looking at {model}"):
        from ddf_convert.visualize import run

        kind = None if output is None else run.check_output(output)
        seen = run.run(
            run.VisualizeRequest(
                name=model,
                images=images,
                layers=layer or (),
                head=head,
                branch=branch,
                taps=taps,
                checkpoint=checkpoint,
                arguments=arguments,
                model=own_model,
                input_size=input_size,
                plain=plain,
                device=device,
            )
        )
        content = None if kind is None else seen.picture(kind)
    if output is not None and content is not None:
        write_file(output, content)
    if as_json:
        document = {**seen.to_dict(), "picture": None if output is None else str(output)}
        print_json(document)
        return
    _present(seen)
    if output is not None:
        shown = f"{len(seen.drawn)} of {len(seen.layers)} layers; --layer chooses"
        print_file("\nPicture", output, f" ({shown})")


def _parse_tap(text: str) -> tuple[int, int]:
    row, comma, column = text.partition(",")
    if not (comma and row.strip().isdecimal() and column.strip().isdecimal()):
        raise UsageError(f"--tap {text}: give a row and a column, counted from 0, such as 1,1")
    return int(row), int(column)


def _present(seen: VisualizeResult) -> None:
    from ddf_convert.report.tables import new_table, numeric_column
    from ddf_convert.visualize.picture import percent

    several = len(seen.images) > 1
    sizes = "x".join(map(str, seen.input_size))
    on = f"{len(seen.images)} images" if several else seen.images[0].name
    out.print(Text.assemble((seen.name, "bold"), f" on {on}, {sizes}: {len(seen.layers)} DDF layers\n"))
    names = ("dynamic", *(("pixels", "images") if several else ()), "channels")
    table = new_table(Column("name", overflow="fold", style="bold"), Column("filters"), *map(numeric_column, names))
    for layer in seen.ranked():
        dynamics = layer.dynamics
        total = Text("fixed", style="yellow") if layer.untouched else Text(percent(dynamics.total))
        parts = (dynamics.pixels, dynamics.images or 0.0) if several else ()
        table.add_row(layer.title, _describe_filters(layer), total, *map(percent, (*parts, dynamics.channels)))
    out.print(table)
    out.print(Text(_LEGEND + (_SEVERAL if several else ""), style="dim"))
    for note in seen.notes:
        out.print(Text(f"{note[0].upper()}{note[1:]}.", style="yellow"))


_LEGEND = (
    "dynamic: what of a layer's filters, in norm, no fixed depthwise filter could do. channels: what would be lost if"
    " all channels shared one filter; fixed filters have that too."
)
_SEVERAL = " pixels, images: what would be lost with the mean over the pixels, or over the images, in their place."


def _describe_filters(layer: LayerFilters) -> str:
    kernel, (height, width) = layer.kernel_size, layer.size
    heads = f", {layer.heads} heads" if layer.heads > 1 else ""
    up = f", {layer.scale_factor}x up" if layer.scale_factor > 1 else ""
    return f"{kernel}x{kernel}, {layer.channels} channels{heads}{up}, {height}x{width}"
