"""The commands that train and evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Column
from rich.text import Text

from ddf_convert.commands.completion import recipe_names, timm_names
from ddf_convert.commands.console import facts_table, only_results_on_stdout, out, print_json
from ddf_convert.commands.options import (
    Amp,
    AsJson,
    Device,
    Epochs,
    InputSize,
    LearningRate,
    OwnModel,
    Resume,
    Seed,
    Steps,
    TimmArguments,
    TimmWeights,
    plain_option,
    stage_changes,
    stage_option,
    with_shared_options,
)

if TYPE_CHECKING:
    from ddf_convert.training.api import FinetuneOutcome
    from ddf_convert.training.evaluation import Evaluation

_FIGURES = (("top1", "top-1"), ("top5", "top-5"), ("agreement", "agrees with original"), ("loss", "loss"))
_FRACTIONS = ("top1", "top5", "agreement")


Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A converted model.", show_default=False)]
DataOption = Annotated[
    str,
    plain_option(
        "A folder of images, a timm dataset such as torch/cifar10, or package.module:callable.",
        "--data",
        metavar="PATH|NAME",
    ),
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, for each that calculates.")]
OnBroken = Annotated[Literal["stop", "skip"], typer.Option(help="At an image that cannot be read.")]


@with_shared_options
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
    resume: Resume = False,
    model: OwnModel = None,
    teacher_checkpoint: Annotated[
        Path | None, plain_option("Weights of the model before conversion, if DIR does not keep them.", metavar="FILE")
    ] = None,
    num_classes: Annotated[int | None, plain_option("Give the model a new classifier.", min=1, metavar="N")] = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_size: Annotated[int | None, stage_option("Images of a process at a time.", min=1, metavar="N")] = None,
    accumulate: Annotated[int | None, stage_option("Batches that make a step.", min=1, metavar="N")] = None,
    lr: LearningRate = None,
    amp: Amp = None,
    input_size: InputSize = None,
    workers: Workers = 2,
    device: Device = None,
    seed: Seed = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="Use torch.compile.")] = False,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Memory format of the maps.")] = False,
    on_broken: OnBroken = "stop",
    checkpoint_every: Annotated[
        int | None, plain_option("Steps between checkpoints; 10 minutes if not given.", min=1, metavar="N")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train a converted model, on one machine or, under torchrun, on many. Ctrl-C saves; --resume continues."""
    changes = stage_changes(epochs, steps, lr, batch_size=batch_size, accumulate=accumulate, amp=amp)
    with only_results_on_stdout():  # whatever models and data sets print
        from ddf_convert.training import api
        from ddf_convert.training.setup import FinetuneRequest
        from ddf_convert.training.trainer import TrainingOptions

        outcome = api.finetune(
            FinetuneRequest(
                folder=folder,
                data=data,
                output=output,
                validation=val_data,
                recipe=recipe,
                changes=changes,
                resume=resume,
                model=model,
                teacher_checkpoint=teacher_checkpoint,
                classes=num_classes,
                input_size=input_size,
                device=device,
                on_broken=on_broken,
                options=TrainingOptions(
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


@with_shared_options
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
    split: Annotated[
        Literal["train", "validation"], typer.Option(help="Which part, if the data are divided.")
    ] = "validation",
    checkpoint: TimmWeights = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Take timm's weights (a download).")] = False,
    own_model: OwnModel = None,
    *,
    arguments: TimmArguments,
    batch_size: Annotated[int, typer.Option(min=1, help="Images of a process at a time.")] = 64,
    input_size: InputSize = None,
    workers: Workers = 2,
    device: Device = None,
    on_broken: OnBroken = "stop",
    as_json: AsJson = False,
) -> None:
    """Measure a model: accuracy where there are labels, else how often it agrees with the original."""
    with only_results_on_stdout():
        from ddf_convert.training import api

        measured = api.evaluate_model(
            api.EvaluateRequest(
                name=model,
                data=data,
                split=split,
                checkpoint=checkpoint,
                pretrained=pretrained,
                arguments=arguments,
                model=own_model,
                batch_size=batch_size,
                input_size=input_size,
                device=device,
                workers=workers,
                on_broken=on_broken,
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
    figures = [(words, _figure(key, getattr(found, key))) for key, words in _FIGURES if getattr(found, key) is not None]
    rows = [*figures, ("images", f"{found.images:,}"), ("images/s", f"{found.images_per_s:,.0f}")]
    return Group(Text(f"{name} on {data}", style="bold"), facts_table(rows, numbers=True))


def _present(outcome: FinetuneOutcome) -> None:
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
