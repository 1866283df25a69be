"""Options that several commands share: those of all, and those that say how to convert."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddf_convert.commands.completion import FILTERS, filter_names, recipe_names, timm_names
from ddf_convert.errors import UsageError

if TYPE_CHECKING:
    from ddf_convert.recipes import Recipe


class Combine(StrEnum):
    """How the two filters make one."""

    MUL = "mul"
    ADD = "add"


class Amp(StrEnum):
    """Autocast's dtype in training."""

    NONE = "none"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Mixing(StrEnum):
    """When a 1x1 convolution follows."""

    AUTO = "auto"
    DENSE = "dense"
    ALWAYS = "always"
    NEVER = "never"


_SE_RATIO = "Squeeze of the channel branch, as a fraction of the channels."
_COMBINE = "How the two filters make one."
_HEADS = "Groups of channels with a spatial filter of their own."


def plain_option(help: str, *names: str, panel: str | None = None, **settings: Any) -> Any:
    """An option whose default its help names, if it has to be named."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **settings)


def stage_change(help: str, *names: str, **settings: Any) -> Any:
    """An option that changes the stages of a recipe."""
    return plain_option(help, *names, panel="Changes to every stage of the recipe", **settings)


# Of converted folders, of runs and of networks for depth maps.
_KEPT = ("manifest.json", "model.safetensors", "original.safetensors", "report.json", "settings.json", "recipe.yaml")

HELP = {"help_option_names": ["-h", "--help"]}  # of every group of commands

# Of many commands.
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

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
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="cpu, cuda or cuda:N.", show_default="the GPU if there is one")
]

# Of those that build models of timm.
_OF_TIMM = "Of a timm model"
NumClasses = Annotated[
    int | None, plain_option("Classes; 0 is no classifier.", "--num-classes", min=0, metavar="N", panel=_OF_TIMM)
]
InChans = Annotated[
    int | None, plain_option("Channels of the image.", "--in-chans", min=1, metavar="N", panel=_OF_TIMM)
]
ModelKwargs = Annotated[
    list[str] | None,
    plain_option(
        "Other arguments of timm.create_model, with values as in Python: drop_rate=0.3 norm_layer=groupnorm.",
        "--model-kwargs",
        metavar="KEY=VALUE ...",
        panel=_OF_TIMM,
    ),
]


def timm_arguments(num_classes: int | None, in_chans: int | None, model_kwargs: Sequence[str] | None) -> dict[str, Any]:
    """The arguments of ``timm.create_model`` that the three options above say; values are read as timm's scripts do.

    Raises:
        UsageError: One is not KEY=VALUE, or was given by its own option too.
    """
    asked = {"num_classes": num_classes, "in_chans": in_chans}
    found: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    for text in model_kwargs or ():
        key, sign, value = text.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--model-kwargs {text}: write KEY=VALUE, such as drop_rate=0.3")
        if asked.get(key) is not None:
            raise UsageError(f"--model-kwargs {text}: --{key.replace('_', '-')} says {asked[key]}: give one of the two")
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            found[key] = value
    return found


# Of those that open converted folders.
OwnModel = Annotated[
    str | None,
    plain_option(
        "package.module:callable that builds the model before conversion, if it is your own.",
        "--model",
        metavar="CALLABLE",
    ),
]
TimmWeights = Annotated[Path | None, plain_option("Weights of a timm model.", metavar="FILE")]

# Of those that train.
TrainingDevice = Annotated[str | None, plain_option("cpu, cuda or cuda:N; the GPU if there is one.", metavar="NAME")]

# Those of a single layer, which is not planned: for `bench layer`.
SeRatio = Annotated[float, typer.Option(help=_SE_RATIO)]
CombineOption = Annotated[Combine, typer.Option(help=_COMBINE)]
Heads = Annotated[int, typer.Option(help=_HEADS)]


@dataclass(frozen=True)
class Conversion:
    """What the options of a command said.

    Attributes:
        include: Patterns.
        exclude: Patterns.
        config: Fields of ConvertConfig.
        recipe: The recipe that they start from, if one was given.
        recipe_file: What it was called: a name or a file.
    """

    include: list[str] | None
    exclude: list[str] | None
    config: dict[str, Any]
    recipe: Recipe | None
    recipe_file: str | None = None


def takes_conversion(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options below in the place of its parameter ``conversion``, a :class:`Conversion`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    options = {
        name: option.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, option in inspect.signature(_options, eval_str=True).parameters.items()
    }

    @functools.wraps(command)
    def with_options(context: typer.Context, **arguments: Any) -> None:
        config = {name: arguments.pop(name) for name in options}
        recipe_file = config.pop("recipe")
        recipe = _recipe(recipe_file)
        if recipe:  # what stands on the command line wins over the recipe
            unsaid = [name for name in config if _is_default(context, name)]
            config |= {name: value for name, value in recipe.options().items() if name in unsaid}
        config["filter_options"] = _filter_options(config["filter_options"])
        include, exclude = (list(config.pop(name) or ()) or None for name in ("include", "exclude"))
        conversion = Conversion(include, exclude, config, recipe, recipe_file)
        command(**arguments, conversion=conversion)

    parameters = [
        inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
        *(each for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY),
        *options.values(),
        *(each for each in own if each.kind is inspect.Parameter.KEYWORD_ONLY and each.name != "conversion"),
    ]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def read_by(model: str, *others: Path | str | None) -> list[Path]:
    """What a command reads, and so must not write over: the files behind its MODEL, and others that it was given.

    Args:
        model: A timm model, a folder, or package.module:callable.
        others: Files and folders.
    """
    folder = Path(model)
    kept = [place / name for place in (folder, folder / "best", folder / "last") for name in _KEPT]
    module = Path(*model.partition(":")[0].split("."))
    sources = (module.with_suffix(".py"), module / "__init__.py") if ":" in model else ()
    code = [Path(place, source) for place in ("", *sys.path) for source in sources]
    given = [Path(other) for other in others if other is not None]
    return [place for place in (*kept, *code, *given) if os.path.lexists(place)]


def _filter_options(given: dict[str, Any] | Sequence[str] | None) -> dict[str, Any] | None:
    """NAME=VALUE as the command line has them; a recipe's come as they should be."""
    if given is None or isinstance(given, dict):
        return given
    found = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise UsageError(f"--filter-option {text}: write NAME=VALUE, such as num_experts=4")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _recipe(name: str | None) -> Recipe | None:
    if name is None:
        return None
    from ddf_convert import recipes

    return recipes.load(name)


def _is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


def spread(
    arguments: Sequence[str], option: str = "--kernel-size", is_value: Callable[[str], bool] = str.isdecimal
) -> list[str]:
    """``--kernel-size 3 5`` as ``--kernel-size 3 --kernel-size 5``, which is how the parser takes several values."""
    found: list[str] = []
    repeating = False
    for argument in arguments:
        if repeating and is_value(argument) and found[-1] != option:
            found.append(option)
        repeating = argument == option or (repeating and is_value(argument))
        found.append(argument)
    return found


def is_assignment(argument: str) -> bool:
    """Whether it is KEY=VALUE, and no option."""
    return argument.partition("=")[0].isidentifier() and "=" in argument


def _option(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel="How to convert", **settings)


def _options(
    recipe: Annotated[
        str | None,
        _option(
            "How to convert and to initialize: a name that `ddf-convert recipes` lists, or a YAML file. Other options"
            " win over it.",
            metavar="NAME|FILE",
            show_default=False,
            autocompletion=recipe_names,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        _option("Only these: a name, a glob, or re:PATTERN. Repeatable.", metavar="PATTERN", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None, _option("All but these. Repeatable.", metavar="PATTERN", show_default=False)
    ] = None,
    kernel_size: Annotated[
        list[int] | None,
        _option("Sizes of the convolutions to replace: 3 5 7.", metavar="K ...", show_default="3"),
    ] = None,
    stem: Annotated[bool, _option("Replace convolutions of the image too.", "--stem")] = False,
    depthwise: Annotated[bool, _option("Replace depthwise convolutions too.", "--depthwise")] = False,
    functional: Annotated[
        bool, _option("Replace F.conv2d calls too; the model becomes a GraphModule.", "--functional")
    ] = False,
    upsample: Annotated[
        bool, _option("Look at upsampling too: interpolation, transposed convolution, pixel shuffle.", "--upsample")
    ] = False,
    allow_growth: Annotated[
        bool, _option("Replace also where that adds parameters or MACs.", "--allow-growth")
    ] = False,
    keep_first: Annotated[int, _option("Leave the first N alone.", metavar="N")] = 0,
    keep_last: Annotated[int, _option("Leave the last N alone.", metavar="N")] = 0,
    target_macs: Annotated[
        str | None, _option("Replace as few as bring the model to so many MACs: 2.5G.", metavar="N", show_default=False)
    ] = None,
    target_params: Annotated[
        str | None, _option("The same for parameters: 12M.", metavar="N", show_default=False)
    ] = None,
    only_faster: Annotated[
        bool, _option("Time every convolution here; leave alone what gets no faster.", "--only-faster")
    ] = False,
    filter: Annotated[
        str,
        _option(
            f"What takes a convolution's place: ddf, or what the paper compares it with: {', '.join(FILTERS[1:])}.",
            metavar="NAME",
            autocompletion=filter_names,
        ),
    ] = "ddf",
    filter_options: Annotated[
        list[str] | None,
        _option(
            "An option of that filter's own, such as num_experts=4. Repeatable.",
            "--filter-option",
            metavar="NAME=VALUE",
            show_default=False,
        ),
    ] = None,
    mixing: Annotated[
        Mixing,
        _option(
            "A 1x1 convolution after it: auto adds it unless 1x1s stand on both sides, dense wherever the convolution"
            " mixed channels."
        ),
    ] = Mixing.AUTO,
    se_ratio: Annotated[float, _option(_SE_RATIO)] = 0.2,
    combine: Annotated[Combine, _option(_COMBINE)] = Combine.MUL,
    heads: Annotated[int, _option(_HEADS)] = 1,
    affine: Annotated[
        bool, _option("Let both FilterNorms learn a scale and a shift, as recipes that keep weights need.", "--affine")
    ] = False,
) -> None:
    """The options, and what they are by default."""
