"""Random command lines: every command and option that there is, with values that fit and values that do not."""

from __future__ import annotations

import random
from collections.abc import Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer.main

from ddf_convert.cli import app

_JUNK = (
    "", " ", "-1", "0", "1", "2", "3", "1e9", "nan", "inf", "9" * 40, "x", "é", "a b", "../escaped", "/dev/null", "/",
    ".", "-", "--", "-x", "[red]x[/]", "%s", "{}", "re:[", "re:(a+)+$", "*", "conv1.*", "\ud83d", "a=b", "=", "cpu",
    "cuda:99", "meta", "resnet10t", "none", "2.5G", "1k", "bfloat16", "missing.json", "missing/deep/file", "n" * 300,
)  # fmt: skip
# Values that fit, by the name of the parameter and, where it means different things, of the command too; none, if it
# only fits together with others. A value that is the name of a file of fuzz.prepare is that file.
_FITS: dict[str, Sequence[str]] = {
    "model": ("test_resnet", "test_efficientnet"), "inspect model": ("artifact", "test_resnet"),
    "export model": ("artifact",), "visualize model": ("artifact",), "evaluate model": ("artifact",),
    "finetune model": (), "own_model": (), "folder": ("artifact",),
    "data": ("images",), "val_data": ("images",), "depth train data": ("pairs",), "rgb": ("pairs/rgb/0.png",),
    "depth": ("pairs/small.png",), "truth": ("pairs/depth/0.png",), "images": ("images/train/one/0.png",),
    "convert images": (), "checkpoint": (), "convert checkpoint": ("weights.pt",),
    "depth predict checkpoint": ("network",),
    "teacher_checkpoint": (), "recipe": ("paper", "preserve", "quick"), "depth train recipe": ("depth-upsample",),
    "name": ("paper", "distill", "depth-upsample"), "include": ("layer1.*", "*"), "exclude": ("layer1.0.*", "*.conv1"),
    "layer": ("layer1.*",), "tap": ("1 1",), "filter": ("ddf", "condconv", "spatial"), "filter_options": (),
    "device": ("cpu",), "input_size": ("3 32 32",), "target_macs": ("2.5G", "1M"), "target_params": ("1M",),
    "se_ratio": ("0.5",), "unit": ("mm",), "factor": ("2", "4"), "kernel_size": ("3", "5"), "resolution": ("7",),
    "num_classes": ("2",), "crop": ("16",), "opset": ("18", "20"), "output": ("out/result",),
    "export output": ("out/result.onnx", "out/result.pt2"),
    "depth predict output": ("out/result.png", "out/result.npy"),
    "html": ("out/page.html",), "json_file": ("out/result.json",), "plot": ("out/plot.png",),
}  # fmt: skip
_WRITES = ("output", "html", "json_file", "plot")
# What takes long by its nature gets no more than this, whatever else is said; and what torch.compile takes is not ours.
_LIMITS = {
    "bench": {
        "--seconds": "0.001",
        "--channels": "8",
        "--resolution": "7",
        "--batch": "1",
        "--size": "7",
        "--no-compile": "",
    },
    "evaluate": {"--workers": "0"},
    "export": {"--static": ""},
    "finetune": {"--steps": "1", "--batch-size": "2", "--workers": "0"},
    "depth": {"--steps": "1", "--batch-size": "1", "--width": "4", "--crop": "16"},
}
_NEVER = ("compiled", "epochs", "pretrained", "only_faster", "measure")


@cache
def commands() -> dict[tuple[str, ...], Any]:
    """Every command by its words."""

    def walk(command: Any, words: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
        children = getattr(command, "commands", None)
        if not children:
            return {words: command}
        found: dict[tuple[str, ...], Any] = {}
        for name, child in children.items():
            found |= {} if child.hidden else walk(child, (*words, name))
        return found

    return walk(typer.main.get_command(app), ())


def command_line(rng: random.Random, good: Path) -> tuple[tuple[str, ...], list[str]]:
    """The words of a command, and the whole line: half of them with a few values that fit, half with anything.

    Args:
        rng: Chance.
        good: The folder of ``fuzz.prepare``; what is written goes to ``out`` in the working directory.
    """
    words = rng.choice([words for words in commands() if words != ("doctor",)])  # which takes no arguments
    wild, parameters = rng.random() < 0.5, commands()[words].params
    line = [*words]
    share = 0.25 if wild else 2 / len(parameters)
    for parameter in parameters:
        option = parameter.param_type_name == "option"
        fits = _FITS.get(f"{' '.join(words)} {parameter.name}", _FITS.get(parameter.name))
        if (parameter.name in _NEVER or fits == ()) and not (wild and rng.random() < 0.1):
            continue
        if rng.random() >= (share if option and not parameter.required else 0.9 if wild else 1):
            continue
        for _ in range(2 if parameter.multiple and rng.random() < 0.3 else 1):
            if option:
                line.append(rng.choice(parameter.opts))
            if not getattr(parameter, "is_flag", False):
                line += _values(parameter, fits, rng, good, wild)
    known = {name for parameter in parameters for name in (*parameter.opts, *parameter.secondary_opts)}
    for option, value in _LIMITS.get(words[0], {}).items():
        line += [word for word in (option, value) if word and option in known]
    if wild and rng.random() < 0.1:
        line.insert(rng.randrange(len(line)), rng.choice(_JUNK))
    return words, line


def _values(parameter: Any, fits: Sequence[str] | None, rng: random.Random, good: Path, wild: bool) -> list[str]:
    """What a parameter gets: what fits, unless anything goes."""
    kind = parameter.type_descriptor.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = next(iter(get_args(kind)), kind)  # of lists, what is in them
    if wild and rng.random() < 0.5:  # but what is given to read must not be asked to be written
        files = [] if parameter.name in _WRITES else [str(path) for path in sorted(good.iterdir())]
        return [rng.choice((*_JUNK, *files, "out/result")) for _ in range(max(1, parameter.nargs))]
    if fits:
        value = rng.choice(fits)
        return [str(good / value)] if (good / value).exists() else value.split()
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [str(rng.choice(list(kind)).value)]
    if choices:
        return [rng.choice(choices)]
    if kind is int:
        return [rng.choice(("1", "2", "3"))]
    return [rng.choice(("0.5", "1.0", "1e-3")) if kind is float else rng.choice(_JUNK)]
