"""Options that several commands share, and groups of options that become one argument of a command."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from ddf_convert.commands.completion import filter_names, recipe_names, timm_names
from ddf_convert.conversion.config import ConvertConfig
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.recipes import Recipe

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
HELP = {"help_option_names": ["-h", "--help"]}  # context settings of every group of commands

ARTIFACT_FILES = ("manifest.json", "model.safetensors", "original.safetensors", "report.json")
_FOLDER_FILES = (*ARTIFACT_FILES, "settings.json", "recipe.yaml")  # of converted models, runs and depth networks


def plain_option(help: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    """Returns an option whose help names its default, if that has to be named."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **settings)


def stage_option(help: str, *names: str, **settings: Any) -> Any:
    """Returns an option that changes the stages of a recipe."""
    return plain_option(help, *names, panel="Changes to every stage of the recipe", **settings)


def config_option(name: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    """Returns an option for a field of ConvertConfig, with the field's description."""
    description = (ConvertConfig.model_fields[name].description or "").replace("``", "`")
    repeatable = " Repeatable." if settings.get("metavar") == "NAME=VALUE" else ""
    return typer.Option(*names, help=description + repeatable, rich_help_panel=panel, **settings)


Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
InputSize = Annotated[
    tuple[int, int, int] | None,
    plain_option("Size of the images; the model's own if not given.", "--input-size", metavar="C H W"),
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", show_default="the GPU if there is one")
]
OwnModel = Annotated[
    str | None,
    plain_option(
        "package.module:callable that builds the model before conversion, if it is your own.",
        "--model",
        metavar="CALLABLE",
    ),
]
TimmWeights = Annotated[Path | None, plain_option("Weights of a timm model.", metavar="FILE")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is random.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in RUN, if there is one.")]

Epochs = Annotated[int | None, stage_option("Passes over the data.", min=1, metavar="N")]
Steps = Annotated[int | None, stage_option("Steps, instead of epochs.", min=1, metavar="N")]
LearningRate = Annotated[float | None, stage_option("Learning rate of the new layers.", "--lr", metavar="X")]
Amp = Annotated[Literal["none", "bfloat16", "float16"] | None, stage_option("Dtype of autocast.")]


def model_argument(help: str) -> Any:
    """Returns the argument MODEL, completed with timm's names."""
    return typer.Argument(metavar="MODEL", help=help, autocompletion=timm_names, show_default=False)


Model = Annotated[
    str,
    model_argument(
        "A timm model, a converted folder, or package.module:callable, which returns a model (or a model and an example"
        " input)."
    ),
]


def stage_changes(epochs: int | None, steps: int | None, lr: float | None, **others: Any) -> dict[str, Any]:
    """Returns the options that change the stages of a recipe, checked."""
    if epochs is not None and steps is not None:
        raise UsageError("--epochs and --steps exclude each other: give one")
    if lr is not None and lr <= 0:
        raise UsageError(f"--lr {lr:g}: must be above 0")
    return {"epochs": epochs, "steps": steps, "lr": lr, **others}


# --- groups of options that become one argument of a command ---


class OptionGroup:
    """Annotates a parameter of a command that stands for several options.

    Args:
        build: Returns the command's argument; its own parameters are the options, and "context" if it needs that.
        more: Further options, which it takes as keyword arguments.
    """

    def __init__(self, build: Callable[..., Any], more: Iterable[inspect.Parameter] = ()) -> None:
        own = inspect.signature(build, eval_str=True).parameters.values()
        named = [each.replace(kind=_KEYWORD) for each in own if each.kind is not inspect.Parameter.VAR_KEYWORD]
        self.build, self.parameters = build, {each.name: each for each in (*named, *more)}


def with_shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Expands the option groups among a command's parameters, and adds ``--debug``."""
    groups: dict[str, OptionGroup] = {}
    parameters = {"context": inspect.Parameter("context", _KEYWORD, annotation=typer.Context)}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        group = next((each for each in get_args(parameter.annotation) if isinstance(each, OptionGroup)), None)
        if group is None:
            parameters[name] = parameter.replace(kind=_KEYWORD)
        else:
            groups[name] = group
            parameters |= {option: each for option, each in group.parameters.items() if option != "context"}
    parameters["debug"] = inspect.Parameter("debug", _KEYWORD, default=False, annotation=Debug)

    @functools.wraps(command)
    def expanded(context: typer.Context, debug: bool, **arguments: Any) -> None:  # cli.run looks for --debug itself
        for name, group in groups.items():
            values = {each: context if each == "context" else arguments.pop(each) for each in group.parameters}
            arguments[name] = group.build(**values)
        command(**arguments)

    expanded.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    expanded.__annotations__ = {name: each.annotation for name, each in parameters.items()}
    return expanded


_timm_option = functools.partial(plain_option, panel="Of a timm model")


def timm_arguments(
    num_classes: Annotated[int | None, _timm_option("Classes; 0 is no classifier.", min=0, metavar="N")] = None,
    in_chans: Annotated[int | None, _timm_option("Channels of the image.", min=1, metavar="N")] = None,
    model_kwargs: Annotated[
        list[str] | None,
        _timm_option(
            "Other arguments of timm.create_model, with values as in Python: drop_rate=0.3 norm_layer=groupnorm.",
            metavar="KEY=VALUE ...",
        ),
    ] = None,
) -> dict[str, Any]:
    """Returns arguments of ``timm.create_model``; values are read as timm's scripts read them."""
    named = {"num_classes": num_classes, "in_chans": in_chans}
    arguments: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for text in model_kwargs or ():
        key, sign, value = text.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--model-kwargs {text}: write KEY=VALUE, such as drop_rate=0.3")
        if named.get(key) is not None:
            raise UsageError(f"--model-kwargs {text}: --{key.replace('_', '-')} says {named[key]}: give one of the two")
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments


TimmArguments = Annotated[dict[str, Any], OptionGroup(timm_arguments)]


@dataclass(frozen=True)
class ConversionOptions:
    """The options of a command that say how to convert."""

    include: list[str] | None  # patterns
    exclude: list[str] | None
    config: dict[str, Any]  # fields of ConvertConfig; None where the default holds
    recipe: Recipe | None  # that the options start from
    recipe_file: str | None  # its name or file


# Options that do not follow from the type of their field: the type, the default, and settings.
_SPECIAL_OPTIONS: dict[str, tuple[Any, Any, tuple[str, ...], dict[str, Any]]] = {
    "filter": (str, "ddf", (), {"metavar": "NAME", "autocompletion": filter_names}),
    "filter_options": (list[str] | None, None, ("--filter-option",), {"metavar": "NAME=VALUE", "show_default": False}),
    "kernel_size": (list[int] | None, None, (), {"metavar": "K ...", "show_default": "3"}),
    "target_macs": (str | None, None, (), {"metavar": "N", "show_default": False}),
    "target_params": (str | None, None, (), {"metavar": "N", "show_default": False}),
}


def _config_parameter(name: str) -> inspect.Parameter:
    """Returns the option for a field of ConvertConfig."""
    field = ConvertConfig.model_fields[name]
    kind, default = field.annotation, field.default
    names: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    if name in _SPECIAL_OPTIONS:
        kind, default, names, settings = _SPECIAL_OPTIONS[name]
    elif kind is bool:
        names, settings = (f"--{name.replace('_', '-')}",), {"show_default": False}
    elif get_origin(kind) is Literal:
        settings = {"metavar": "|".join(get_args(kind)) if len(get_args(kind)) < 3 else "MODE"}
    else:
        settings = {"metavar": "X" if kind is float else "N"}
    option = config_option(name, *names, panel="How to convert", **settings)
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])


_conversion_option = functools.partial(plain_option, panel="How to convert")


def _conversion_options(
    context: typer.Context,
    recipe: Annotated[
        str | None,
        _conversion_option(
            "How to convert and to initialize: a name that `ddf-convert recipes` lists, or a YAML file. Other options"
            " win over it.",
            metavar="NAME|FILE",
            autocompletion=recipe_names,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        _conversion_option("Only these: a name, a glob, or re:PATTERN. Repeatable.", metavar="PATTERN"),
    ] = None,
    exclude: Annotated[list[str] | None, _conversion_option("All but these. Repeatable.", metavar="PATTERN")] = None,
    **config: Any,
) -> ConversionOptions:
    loaded = None
    values = {"include": include, "exclude": exclude, **config}
    if recipe is not None:
        from ddf_convert import recipes

        loaded = recipes.load(recipe)
        # What is given on the command line wins over the recipe.
        values |= {name: value for name, value in loaded.options().items() if _is_default(context, name)}
    values["filter_options"] = _filter_options(values["filter_options"])
    include, exclude = (list(values.pop(name) or ()) or None for name in ("include", "exclude"))
    return ConversionOptions(include, exclude, values, loaded, recipe)


def _filter_options(given: dict[str, Any] | Sequence[str] | None) -> dict[str, Any] | None:
    """Parses NAME=VALUE; the options of a recipe are a dict already."""
    if given is None or isinstance(given, dict):
        return given
    options = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UsageError(f"--filter-option {text}: write NAME=VALUE, such as num_experts=4")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


Conversion = Annotated[
    ConversionOptions, OptionGroup(_conversion_options, more=map(_config_parameter, ConvertConfig.model_fields))
]


# --- arguments before they are parsed, and the files behind them ---


def read_by(model: str, *others: Path | str | None) -> list[Path]:
    """Returns the files and folders behind a command's MODEL and other arguments, which it must not write over."""
    folder = Path(model)
    kept = [place / name for place in (folder, folder / "best", folder / "last") for name in _FOLDER_FILES]
    module = Path(*model.partition(":")[0].split("."))
    sources = (module.with_suffix(".py"), module / "__init__.py") if ":" in model else ()
    code = [Path(place, source) for place in ("", *sys.path) for source in sources]
    given = [Path(other) for other in others if other is not None]
    return [place for place in (*kept, *code, *given) if os.path.lexists(place)]


def spread(
    arguments: Sequence[str], option: str = "--kernel-size", is_value: Callable[[str], bool] = str.isdecimal
) -> list[str]:
    """Turns ``--kernel-size 3 5`` into ``--kernel-size 3 --kernel-size 5``: the parser takes one value at a time."""
    spread_out: list[str] = []
    repeating = False
    for argument in arguments:
        if repeating and is_value(argument) and spread_out[-1] != option:
            spread_out.append(option)
        repeating = argument == option or (repeating and is_value(argument))
        spread_out.append(argument)
    return spread_out


def is_assignment(argument: str) -> bool:
    """Returns whether an argument is KEY=VALUE, and no option."""
    return argument.partition("=")[0].isidentifier() and "=" in argument
