"""The commands that plan and convert: ``inspect`` and ``convert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ddf_convert.artifacts.path_checks import check_distinct, check_not_input, check_output, check_readable
from ddf_convert.commands.console import busy, out, print_file, print_json
from ddf_convert.commands.options import (
    ARTIFACT_FILES,
    AsJson,
    Conversion,
    ConversionOptions,
    Device,
    InputSize,
    Model,
    Overwrite,
    TimmArguments,
    plain_option,
    read_by,
    with_shared_options,
)
from ddf_convert.errors import UsageError
from ddf_convert.utils.logging import warn

if TYPE_CHECKING:
    import torch

    from ddf_convert.artifacts.source import OpenedModel
    from ddf_convert.conversion import Plan
    from ddf_convert.recipes import Initialized

ListAll = Annotated[bool, typer.Option("--all", help="List every convolution.")]
Html = Annotated[Path | None, plain_option("Also write an HTML page.", metavar="FILE")]


@with_shared_options
def inspect(
    model: Model,
    input_size: InputSize = None,
    *,
    arguments: TimmArguments,
    conversion: Conversion,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the model and every convolution, before and after.")
    ] = False,
    device: Device = None,
    list_all: ListAll = False,
    as_json: AsJson = False,
    html: Html = None,
    overwrite: Overwrite = False,
) -> None:
    """Show what converting a model would replace and save. Changes nothing, downloads nothing."""
    if html:
        check_output("--html", html, overwrite, read_by(model, conversion.recipe_file))
    with busy(f"{'Timing' if measure else 'Looking at'} {model}"):
        from ddf_convert.artifacts.source import open_model
        from ddf_convert.utils.device import choose

        where = choose(device) if measure or device or conversion.config["only_faster"] else None
        opened = open_model(model, arguments=arguments)
        plan = make_plan(opened, input_size, conversion, where)
    _present(plan, opened.name, as_json, html, list_all)


@with_shared_options
def convert(
    model: Model,
    output: Annotated[Path, plain_option("Folder to write.", "--output", "-o", metavar="DIR")],
    input_size: InputSize = None,
    *,
    arguments: TimmArguments,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights (a download).")] = False,
    checkpoint: Annotated[Path | None, plain_option("Start from these weights.", metavar="FILE")] = None,
    images: Annotated[
        str | None,
        plain_option(
            "Images, labelled or not, for recipes that calibrate: a folder, a timm dataset, or module:callable.",
            metavar="DATA",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to calibrate.", show_default="the GPU if there is one")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new layers' weights.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the converted model in DIR, and FILE.")
    ] = False,
    conversion: Conversion,
    list_all: ListAll = False,
    as_json: AsJson = False,
    html: Html = None,
) -> None:
    """Convert a model and save it: DIR/manifest.json, DIR/model.safetensors, DIR/report.json."""
    if pretrained and checkpoint:
        raise UsageError("--pretrained and --checkpoint exclude each other: give one")
    if checkpoint:
        check_readable(f"--checkpoint {checkpoint}", checkpoint)
    reads = read_by(model, checkpoint, conversion.recipe_file, images)
    if html:
        check_output("--html", html, overwrite, reads, beside=output)
        check_distinct([("--html", html), *(("--output", output / name) for name in ARTIFACT_FILES)])
    recipe = conversion.recipe
    chosen = conversion.config["filter"]
    if recipe and recipe.initialize_with.method != "paper" and chosen != "ddf":
        raise UsageError(
            f"recipe {recipe.name} starts new layers from the old weights, which --filter {chosen} cannot: leave one of"
            " the two out"
        )
    calibrates = recipe is not None and recipe.initialize_with.method == "calibrate"
    if images is not None and not calibrates:
        raise UsageError("--images is for recipes that calibrate the new layers, such as --recipe calibrate")
    if recipe and calibrates and images is None:
        raise UsageError(
            f"recipe {recipe.name} fits the new layers on images: give --images FOLDER; labels do not count"
        )
    with busy(f"{'Downloading the weights of' if pretrained else 'Opening'} {model}") as say:
        from ddf_convert.artifacts import artifact

        for name in ARTIFACT_FILES:
            check_not_input(f"--output {output}: {name}", output / name, reads)
        artifact.check_free(output, original=recipe is not None and recipe.needs_teacher)
        if (output / "manifest.json").exists() and not overwrite:
            raise UsageError(
                f"{output} already holds a converted model: give another folder, or --overwrite to lose it"
            )
        import torch

        from ddf_convert.artifacts.source import open_model
        from ddf_convert.conversion import convert as apply
        from ddf_convert.report import report
        from ddf_convert.training.setup import initialize
        from ddf_convert.utils.device import choose

        where = choose(device) if calibrates or device else None
        torch.manual_seed(seed)
        opened = open_model(model, weights=True, pretrained=pretrained, arguments=arguments)
        if checkpoint:
            say(f"Reading {checkpoint}")
            artifact.load_checkpoint(opened.model, checkpoint)
        say(f"Looking at {model}")
        plan = make_plan(opened, input_size, conversion)
        check_replaces(plan, model)
        say(f"Replacing {len(plan.replaced)} layers")
        keeps = recipe is not None and (recipe.needs_teacher or recipe.initialize_with.method != "paper")
        converted = apply(opened.model, plan, inplace=not plan.functional and not keeps)
        document = report(plan, opened.name)
        done = None
        if recipe:
            if keeps and not (pretrained or checkpoint) and ":" not in model and not Path(model).is_dir():
                warn(
                    f"recipe {recipe.name} starts from the old weights, and those of {model} are random here:"
                    " --pretrained or --checkpoint FILE gives it better ones"
                )
            done = initialize(recipe, converted, opened.model, images, input_size, where, say)
            document["recipe"], document["initialised"] = recipe.name, done.model_dump(mode="json")
        say(f"Saving {output}")
        original = opened.model if recipe and recipe.needs_teacher else None
        manifest = artifact.save(converted, output, opened.source, report=document, original=original)
    _present(plan, opened.name, as_json, html, list_all, document, done)
    if not as_json:
        _print_saved(
            output, f"load({str(output)!r})" if manifest.source.kind == "timm" else f"restore(model, {str(output)!r})"
        )


def make_plan(
    opened: OpenedModel,
    input_size: tuple[int, int, int] | None,
    conversion: ConversionOptions,
    measure: torch.device | None = None,
) -> Plan:
    """Plans the conversion of an opened model; times it if a device to measure on is given."""
    from ddf_convert.conversion import plan

    options = {name: value for name, value in conversion.config.items() if value is not None}
    return plan(
        opened.model,
        opened.make_example(input_size),
        include=conversion.include,
        exclude=conversion.exclude,
        measure=measure or False,
        **options,
    )


def check_replaces(plan: Plan, model: str) -> None:
    """Raises UsageError if a plan replaces nothing."""
    if not plan.replaced:
        raise UsageError(f"nothing to convert in {model}: `ddf-convert inspect {model}` says why")


def _present(
    plan: Plan,
    name: str,
    as_json: bool,
    html: Path | None,
    list_all: bool,
    document: dict[str, Any] | None = None,
    initialized: Initialized | None = None,
) -> None:
    from ddf_convert.report import Comparison, report
    from ddf_convert.report.tables import initialized_table, tables

    comparison = Comparison.of(plan, name)
    if html:
        comparison.to_html(html)
    if as_json:
        print_json(document if document is not None else report(plan, name))
        return
    out.print(tables(comparison, list_all))
    if initialized:
        out.print(initialized_table(initialized, list_all))
    if html:
        print_file("\nPage", html)


def _print_saved(output: Path, call: str) -> None:
    from ddf_convert.report import units

    weights = units.size((output / "model.safetensors").stat().st_size)
    out.print(
        f"\nSaved to [bold]{escape(str(output))}[/]: manifest.json, model.safetensors ({weights}), report.json\n"
        f"To use it in Python: ddf_convert.{escape(call)}",
        soft_wrap=True,
    )
