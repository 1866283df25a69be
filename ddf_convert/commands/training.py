"""The commands that train and evaluate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column
from rich.text import Text

from ddf_convert.commands.completion import recipe_names, timm_names
from ddf_convert.commands.console import only_results_on_stdout, out, print_json
from ddf_convert.commands.options import (
    Amp,
    AsJson,
    Debug,
    InChans,
    ModelKwargs,
    NumClasses,
    OwnModel,
    TimmWeights,
    TrainingDevice,
    plain_option,
    stage_change,
    timm_arguments,
)
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.training.api import Outcome
    from ddf_convert.training.evaluation import Evaluation

_FIGURES = (("top1", "top-1"), ("top5", "top-5"), ("agreement", "agrees with original"), ("loss", "loss"))
_FRACTIONS = ("top1", "top5", "agreement")


class Broken(StrEnum):
    """What to do with images that cannot be read."""

    STOP = "stop"
    SKIP = "skip"


class Part(StrEnum):
    """Of data that are divided."""

    TRAIN = "train"
    VALIDATION = "validation"


_DATA = "A folder of images, a timm dataset such as torch/cifar10, or package.module:callable."

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A converted model.", show_default=False)]
DataOption = Annotated[str, plain_option(_DATA, "--data", metavar="PATH|NAME")]
InputSize = Annotated[
    tuple[int, int, int] | None, plain_option("Size of the images; the model's own if not given.", metavar="C H W")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, for each that calculates.")]
OnBroken = Annotated[Broken, typer.Option(help="At an image that cannot be read.")]


def finetune(
    folder: Folder,
    data: DataOption,
    output: Annotated[Path, plain_option("Folder of the run.", "--output", "-o", metavar="RUN")],
    val_data: Annotated[
        str | None,
        plain_option(
            "Data to evaluate on; the validation part of --data if not given, or a tenth of it.", metavar="PATH"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        plain_option(
            "A built-in recipe, or a file; if not given, the one that the model was converted with, or finetune.",
            metavar="NAME|FILE",
            autocompletion=recipe_names,
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in RUN, if there is one.")] = False,
    model: OwnModel = None,
    teacher_checkpoint: Annotated[
        Path | None, plain_option("Weights of the model before conversion, if DIR does not keep them.", metavar="FILE")
    ] = None,
    num_classes: Annotated[int | None, plain_option("Give the model a new classifier.", min=1, metavar="N")] = None,
    epochs: Annotated[int | None, stage_change("Passes over the data.", min=1, metavar="N")] = None,
    steps: Annotated[int | None, stage_change("Steps, in the place of epochs.", min=1, metavar="N")] = None,
    batch_size: Annotated[int | None, stage_change("Images of a process at a time.", min=1, metavar="N")] = None,
    accumulate: Annotated[int | None, stage_change("Batches that make a step.", min=1, metavar="N")] = None,
    lr: Annotated[float | None, stage_change("Learning rate of the new layers.", metavar="X")] = None,
    amp: Annotated[Amp | None, stage_change("Autocast's dtype.")] = None,
    input_size: InputSize = None,
    workers: Workers = 2,
    device: TrainingDevice = None,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is random.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of the maps.")] = False,
    on_broken: OnBroken = Broken.STOP,
    checkpoint_every: Annotated[
        int | None, plain_option("Steps between checkpoints; 10 minutes if not given.", min=1, metavar="N")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a converted model, on one machine or, under torchrun, on many. Ctrl-C saves; --resume goes on."""
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps exclude each other: give one")
    if lr is not None and lr <= 0:
        raise UsageError(f"--lr {lr:g}: must be above 0")
    with only_results_on_stdout():  # whatever models and data sets print
        from ddf_convert.training import api
        from ddf_convert.training.stage import Options

        outcome = api.finetune(
            api.Request(
                folder=folder,
                data=data,
                output=output,
                validation=val_data,
                recipe=recipe,
                changes={
                    "epochs": epochs,
                    "steps": steps,
                    "batch_size": batch_size,
                    "accumulate": accumulate,
                    "lr": lr,
                    "amp": None if amp is None else amp.value,
                },
                resume=resume,
                model=model,
                teacher_checkpoint=teacher_checkpoint,
                classes=num_classes,
                input_size=input_size,
                device=device,
                on_broken=on_broken.value,
                options=Options(
                    seed=seed,
                    workers=workers,
                    channels_last=channels_last,
                    compiled=compiled,
                    checkpoint_every=checkpoint_every,
                ),
            )
        )
    if outcome is None:  # in all processes but the first one
        return
    if as_json:
        print_json(outcome.to_dict())
    else:
        _present(outcome)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="A run, a converted folder, or a timm model with --checkpoint or --pretrained.",
            autocompletion=timm_names,
            show_default=False,
        ),
    ],
    data: DataOption,
    split: Annotated[Part, typer.Option(help="Which part, if the data are divided.")] = Part.VALIDATION,
    checkpoint: TimmWeights = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's weights (a download).")] = False,
    own_model: OwnModel = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    model_kwargs: ModelKwargs = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a process at a time.")] = 64,
    input_size: InputSize = None,
    workers: Workers = 2,
    device: TrainingDevice = None,
    on_broken: OnBroken = Broken.STOP,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a model: accuracy where there are labels, else how often it agrees with the original."""
    with only_results_on_stdout():
        from ddf_convert.training import api

        measured = api.measure(
            api.Question(
                name=model,
                data=data,
                split=split.value,
                checkpoint=checkpoint,
                pretrained=pretrained,
                arguments=timm_arguments(num_classes, in_chans, model_kwargs),
                model=own_model,
                batch_size=batch_size,
                input_size=input_size,
                device=device,
                workers=workers,
                on_broken=on_broken.value,
            )
        )
    if measured is None:
        return
    found, name = measured
    figures = {key: getattr(found, key) for key, _ in _FIGURES}
    if as_json:
        document = {"model": name, "data": data, "images": found.images, **figures, "images_per_s": found.images_per_s}
        print_json(document)
        return
    out.print(_evaluation_table(found, name, data))


def _evaluation_table(found: Evaluation, name: str, data: str) -> RenderableType:
    from ddf_convert.report.tables import new_table, numeric_column

    table = new_table(Column(""), numeric_column(""))
    table.show_header = False
    for key, words in _FIGURES:
        if getattr(found, key) is not None:
            table.add_row(words, _figure(key, getattr(found, key)))
    table.add_row("images", f"{found.images:,}")
    table.add_row("images/s", f"{found.images_per_s:,.0f}")
    return Group(Text(f"{name} on {data}", style="bold"), table)


def _present(outcome: Outcome) -> None:
    from ddf_convert.report.tables import new_table, numeric_column

    rows = [("before training", outcome.before), ("best", outcome.best), ("last", outcome.last)]
    columns = [*_FIGURES[:3], _FIGURES[3] if outcome.one_loss else ("features", "error of the layers")]
    shown = [(key, words) for key, words in columns if any(getattr(row, key, None) is not None for _, row in rows)]
    table = new_table(Column("", no_wrap=True), *map(numeric_column, ["epoch", "step", *(words for _, words in shown)]))
    for name, row in rows:
        if row is not None:
            figures = [_figure(key, getattr(row, key)) for key, _ in shown]
            table.add_row(name, f"{row.epoch:.4g}", f"{row.step:,}", *figures)
    out.print(table)
    where = escape(str(outcome.output))
    speed = f", {outcome.images_per_s:,.0f} images/s in training" if outcome.images_per_s else ""
    out.print(f"{outcome.steps:,} steps in {_duration(outcome.seconds)}{speed}", soft_wrap=True)
    if not outcome.finished:
        out.print(
            f"Stopped as asked, with a checkpoint in [bold]{where}[/]: the same command with --resume goes on.",
            soft_wrap=True,
        )
        return
    if outcome.best is not None and outcome.best.step == 0:
        out.print("No evaluation was better than that before training: best/ is the model as it was.", soft_wrap=True)
    beside = [name for name in ("log.csv", "curves.png", "tensorboard") if (outcome.output / name).exists()]
    out.print(f"Models: [bold]{where}/best[/], [bold]{where}/last[/]; beside them {', '.join(beside)}", soft_wrap=True)


def _figure(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2f}%" if key in _FRACTIONS else f"{value:.4g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02} min" if minutes else f"{seconds:.1f} s"
