"""The command line: parse, call, print. What it calls is imported inside the commands, so that completion is quick."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ddf_convert.commands_depth import upsample, upsample_train
from ddf_convert.commands_training import evaluate, finetune
from ddf_convert.commands_visualize import visualize
from ddf_convert.completion import timm_names
from ddf_convert.errors import DDFError, UsageError
from ddf_convert.files import check_file, write_file
from ddf_convert.notices import tell
from ddf_convert.options import (
    AsJson,
    Combine,
    CombineOption,
    Conversion,
    Debug,
    Heads,
    SeRatio,
    spread,
    takes_conversion,
)

if TYPE_CHECKING:
    import torch

    from ddf_convert.graph import Plan
    from ddf_convert.inputs import ExampleInput
    from ddf_convert.recipes import Initialised
    from ddf_convert.source import Opened

app = typer.Typer(
    name="ddf-convert",
    help="Replaces 3x3 convolutions of PyTorch vision models with decoupled dynamic filters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    help="Measure the operator, a layer or a model beside what they replace.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(
    help="The built-in recipes: how to convert, to initialise and to train.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
app.add_typer(recipes, name="recipes")
_out = Console(highlight=False, emoji=False)
_err = Console(stderr=True, highlight=False, emoji=False)
_STDOUT = Path("-")
_INTERRUPTED = 130  # what a shell gives a program that Ctrl-C ended
# Loggers that tell of an error at length (a traceback, every retry) before it reaches the user as one line, or that
# torch finds no GPU when nobody asked for one.
_WORDY = ("torch._subclasses.fake_tensor", "torch.utils.cpp_extension", "huggingface_hub")
_debug = False  # whether --debug was given


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


def _print_version(value: bool) -> None:
    if value:
        from ddf_convert.version import __version__

        typer.echo(f"ddf-convert {__version__}")
        raise typer.Exit


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A timm model, a converted folder, or package.module:callable, which returns a model (or a model and an"
        " example input).",
        autocompletion=timm_names,
        show_default=False,
    ),
]
InputSize = Annotated[
    tuple[int, int, int] | None,
    typer.Option(
        metavar="C H W",
        help="Size of the images that costs are counted for; the model's own if not given.",
        show_default=False,
    ),
]
Everything = Annotated[bool, typer.Option("--all", help="List every convolution.")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write an HTML page.", show_default=False)]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the tensors and the weights.")]
LayoutOption = Annotated[Layout, typer.Option(help="Memory format of the maps.")]
KernelSize = Annotated[int, typer.Option(help="Rows, and columns, of the filters.")]
Seconds = Annotated[float, typer.Option(min=0.001, help="To spend on each time, at least.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Images at a time.", show_default="32 on a GPU, 4 on the CPU")]
ModelBatch = Annotated[
    int | None, typer.Option(min=1, help="Images at a time.", show_default="64 on a GPU, 4 on the CPU")
]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let a GPU use TF32 where float32 is asked for.")]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", show_default="the GPU if there is one")
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write JSON; - is stdout, and nothing else there.", show_default=False
    ),
]
PlotFile = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw a PNG.", show_default=False)]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@takes_conversion
def inspect(
    model: Model,
    input_size: InputSize = None,
    *,
    conversion: Conversion,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the model and every convolution, before and after.")
    ] = False,
    device: Device = None,
    everything: Everything = False,
    as_json: AsJson = False,
    html: Html = None,
    debug: Debug = False,
) -> None:
    """Show what converting a model would replace and save. Changes nothing, downloads nothing."""
    if html:
        check_file("--html", html)
    with _busy(f"{'Timing' if measure else 'Looking at'} {model}"):
        from ddf_convert.devices import choose
        from ddf_convert.source import open_model

        where = choose(device) if measure or device or conversion.config["only_faster"] else None
        opened = open_model(model)
        plan = _plan(opened, input_size, conversion, where)
    _present(plan, opened.name, as_json, html, everything)


@app.command()
@takes_conversion
def convert(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.", show_default=False)],
    input_size: InputSize = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Start from timm's weights (a download).")] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start from these weights.", show_default=False)
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images, labelled or not, for recipes that calibrate: a folder, a timm dataset, or module:callable.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="Where to calibrate.", show_default="the GPU if there is one")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new layers' weights.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the converted model in DIR.")] = False,
    *,
    conversion: Conversion,
    everything: Everything = False,
    as_json: AsJson = False,
    html: Html = None,
    debug: Debug = False,
) -> None:
    """Convert a model and save it: DIR/manifest.json, DIR/model.safetensors, DIR/report.json."""
    if pretrained and checkpoint:
        raise UsageError("--pretrained and --checkpoint exclude each other: give one")
    if checkpoint and not checkpoint.is_file():
        raise UsageError(f"--checkpoint {checkpoint}: no such file")
    if html:
        check_file("--html", html, beside=output)
    recipe = conversion.recipe
    chosen = conversion.config["filter"]
    if recipe and recipe.initialise_with.method != "paper" and chosen != "ddf":
        raise UsageError(
            f"recipe {recipe.name} starts new layers from the old weights, which --filter {chosen} cannot: leave one of"
            " the two out"
        )
    calibrates = recipe is not None and recipe.initialise_with.method == "calibrate"
    if images is not None and not calibrates:
        raise UsageError("--images is for recipes that calibrate the new layers, such as --recipe calibrate")
    if recipe and calibrates and images is None:
        raise UsageError(
            f"recipe {recipe.name} fits the new layers on images: give --images FOLDER; labels do not count"
        )
    with _busy(f"{'Downloading the weights of' if pretrained else 'Opening'} {model}") as say:
        from ddf_convert import artifact

        artifact.check_writable(output)
        if (output / "manifest.json").exists() and not overwrite:
            raise UsageError(
                f"{output} already holds a converted model: give another folder, or --overwrite to lose it"
            )
        import torch

        from ddf_convert.devices import choose
        from ddf_convert.graph import convert as apply
        from ddf_convert.report import report
        from ddf_convert.source import open_model
        from ddf_convert.training.start import initialise

        where = choose(device) if calibrates or device else None
        torch.manual_seed(seed)
        opened = open_model(model, weights=True, pretrained=pretrained)
        if checkpoint:
            say(f"Reading {checkpoint}")
            artifact.load_checkpoint(opened.model, checkpoint)
        say(f"Looking at {model}")
        plan = _plan(opened, input_size, conversion)
        if not plan.replaced:
            raise UsageError(f"nothing to convert in {model}: `ddf-convert inspect {model}` says why")
        say(f"Replacing {len(plan.replaced)} layers")
        keeps = recipe is not None and (recipe.needs_teacher or recipe.initialise_with.method != "paper")
        converted = apply(opened.model, plan, inplace=not plan.functional and not keeps)
        document = report(plan, opened.name)
        done = None
        if recipe:
            if keeps and not (pretrained or checkpoint) and ":" not in model and not Path(model).is_dir():
                tell(
                    f"recipe {recipe.name} starts from the old weights, and those of {model} are random here:"
                    " --pretrained or --checkpoint FILE gives it better ones"
                )
            done = initialise(recipe, converted, opened.model, images, input_size, where, say)
            document["recipe"], document["initialised"] = recipe.name, done.model_dump(mode="json")
        say(f"Saving {output}")
        original = opened.model if recipe and recipe.needs_teacher else None
        manifest = artifact.save(converted, output, report=document, original=original)
    _present(plan, opened.name, as_json, html, everything, document, done)
    if not as_json:
        _saved(
            output, f"load({str(output)!r})" if manifest.source.kind == "timm" else f"restore(model, {str(output)!r})"
        )


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Say what runs on this machine, and why not what does not."""
    with _busy("Looking around; the kernels are compiled if they never were"):
        from ddf_convert.doctor import State, examine

        checks = list(examine())
    if as_json:
        _print_json({"checks": [check.to_dict() for check in checks]})
    else:
        from ddf_convert.report.tables import checks_table

        _out.print(checks_table(checks))
    if any(check.state is State.PROBLEM for check in checks):
        raise typer.Exit(1)


app.command()(finetune)
app.command()(evaluate)
app.command()(upsample_train)
app.command()(upsample)
app.command()(visualize)


@recipes.callback()
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes.command("list")
def recipes_list(as_json: AsJson = False, debug: Debug = False) -> None:
    """Name the built-in recipes."""
    from ddf_convert.recipes import load, names

    found = [load(name) for name in names()]
    if as_json:
        _print_json({"recipes": [recipe.model_dump(mode="json", by_alias=True) for recipe in found]})
        return
    from ddf_convert.report.recipes import recipes_table

    _out.print(recipes_table(found))


@recipes.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A built-in recipe, or a file.", show_default=False)],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print a recipe; a built-in one as its file, to copy and to change."""
    from ddf_convert import recipes as package

    recipe = package.load(name)
    if as_json:
        _print_json(recipe.model_dump(mode="json", by_alias=True))
    else:
        typer.echo((package.source(name) if name in package.names() else recipe.to_yaml()).rstrip())


@bench.command("op")
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
    debug: Debug = False,
) -> None:
    """The operator beside convolutions and plain PyTorch, at the paper's sizes."""
    with _measuring(json_file, plot) as say:
        from ddf_convert.bench import op
        from ddf_convert.devices import choose

        where = choose(device)
        settings = op.Settings(
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


@bench.command("up")
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
    debug: Debug = False,
) -> None:
    """DDF-Up beside interpolation, a transposed convolution and unfolding."""
    with _measuring(json_file, plot) as say:
        from ddf_convert.bench import up
        from ddf_convert.devices import choose

        where = choose(device)
        settings = up.Settings(
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


@bench.command("layer")
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
    debug: Debug = False,
) -> None:
    """One convolution, and the DDF layers that can take its place."""
    with _measuring(json_file, plot) as say:
        from ddf_convert.bench import layer
        from ddf_convert.devices import choose

        where = choose(device)
        settings = layer.Settings(
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


@bench.command("model")
@takes_conversion
def bench_model(
    model: Model,
    input_size: InputSize = None,
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
    debug: Debug = False,
) -> None:
    """Images a second before and after conversion, in inference and in training."""
    with _measuring(json_file, plot) as say:
        from ddf_convert.bench import model as models
        from ddf_convert.devices import choose
        from ddf_convert.source import open_model

        where = choose(device)
        say(f"Opening {model}")
        opened = open_model(model, weights=True)
        plan = _plan(opened, input_size, conversion)
        if not plan.replaced:
            raise UsageError(f"nothing to convert in {model}: `ddf-convert inspect {model}` says why")
        settings = models.Settings(
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
def _measuring(json_file: Path | None, plot: Path | None) -> Iterator[Any]:
    """Checks the files before hours are spent; what models print while they run is kept out of JSON on stdout."""
    if json_file and json_file != _STDOUT:
        check_file("--json", json_file)
    if plot:
        check_file("--plot", plot)
    with _busy("Measuring") as say, contextlib.redirect_stdout(sys.stderr):
        if plot:
            from ddf_convert.bench.plot import check_plot

            check_plot(plot)
        yield say


def _present_figures(document: dict[str, Any], json_file: Path | None, plot: Path | None) -> None:
    if plot:
        from ddf_convert.bench.plot import png

        write_file(plot, png(document))
    if json_file == _STDOUT:
        _print_json(document)
        return
    if json_file:
        write_file(json_file, json.dumps(document, indent=1) + "\n")
    from ddf_convert.bench.tables import tables

    _out.print(tables(document))
    for name, file in (("Figures", json_file), ("Plot", plot)):
        if file:
            _out.print(f"{name}: [bold]{escape(str(file))}[/]", soft_wrap=True)


def _plan(
    opened: Opened,
    input_size: tuple[int, int, int] | None,
    conversion: Conversion,
    measure: torch.device | None = None,
) -> Plan:
    import torch

    from ddf_convert.graph import plan

    config = conversion.config
    example: ExampleInput
    if input_size is None and opened.example_input is not None:
        example = opened.example_input
    else:
        size = input_size or opened.input_size
        if min(size) < 1:
            raise UsageError(f"--input-size {' '.join(map(str, size))}: every number must be at least 1")
        example = torch.empty(1, *size, device="meta")
    options = {name: value for name, value in config.items() if value is not None}
    return plan(
        opened.model,
        example,
        include=conversion.include,
        exclude=conversion.exclude,
        measure=measure or False,
        **options,
    )


def _present(
    plan: Plan,
    name: str,
    as_json: bool,
    html: Path | None,
    everything: bool,
    document: dict[str, Any] | None = None,
    initialised: Initialised | None = None,
) -> None:
    from ddf_convert.report import Comparison, report
    from ddf_convert.report.tables import tables

    comparison = Comparison.of(plan, name)
    if html:
        comparison.to_html(html)
    if as_json:
        _print_json(document if document is not None else report(plan, name))
        return
    _out.print(tables(comparison, everything))
    if initialised:
        from ddf_convert.report.recipes import initialised_table

        _out.print(initialised_table(initialised, everything))
    if html:
        _out.print(f"\nPage: [bold]{escape(str(html))}[/]", soft_wrap=True)


def _saved(output: Path, call: str) -> None:
    from ddf_convert.report import units

    weights = units.size((output / "model.safetensors").stat().st_size)
    _out.print(
        f"\nSaved to [bold]{escape(str(output))}[/]: manifest.json, model.safetensors ({weights}), report.json\n"
        f"To use it in Python: ddf_convert.{escape(call)}",
        soft_wrap=True,
    )


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


@contextlib.contextmanager
def _busy(doing: str) -> Iterator[Any]:
    """A spinner on stderr while something takes its time, on a terminal only; yields what changes its words."""
    if not _debug:
        for name in _WORDY:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with _err.status(f"{escape(doing)} ...") as status:
        yield lambda words: status.update(f"{escape(words)} ...")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C.

    Args:
        arguments: Those of the process if None.
    """
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs the command line; every error becomes one line on stderr and an exit code."""
    global _debug
    _debug = "--debug" in arguments  # and not as it is parsed: the parser's errors have tracebacks too
    try:
        code = app(_several_kernel_sizes(arguments), prog_name="ddf-convert", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # some versions of typer swallow the KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        if _first_to_say("interrupted"):
            _err.print("interrupted; nothing was left half-written")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`): nobody is there to be told. Python must not try to flush at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _report_error(error)


def _several_kernel_sizes(arguments: list[str]) -> list[str]:
    converting = arguments[:1] in (["inspect"], ["convert"]) or arguments[:2] == ["bench", "model"]
    return spread(arguments) if converting else arguments


def _report_error(error: Exception) -> int:
    code = int(getattr(error, "exit_code", 1))
    if getattr(error, "told_elsewhere", False) or not _first_to_say(str(error)):
        return code
    if _debug:
        traceback.print_exception(error)
    elif isinstance(error, DDFError):
        _complain(str(error))
    elif hasattr(error, "format_message"):  # click's own errors, from whichever copy of click typer carries
        # With no arguments at all typer prints the help and then complains in no words.
        if message := error.format_message():
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "ddf-convert"
            _complain(f"{message.rstrip('.')}; see {command} --help")
    else:
        _complain(f"{type(error).__name__}: {error} (this is a fault of ddf-convert; --debug shows where)")
    return code


def _first_to_say(message: str) -> bool:
    """Whether this process has to say it: of several under torchrun the first that finds it does, and no other."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from ddf_convert.training import distributed

    return distributed.first_to_say(message)


def _complain(message: str) -> None:
    """One line, whatever the message: pasted paths and torch's reasons can hold several."""
    line = " ".join(message.split())
    _err.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)


if __name__ == "__main__":
    main()
