"""Random command lines: every command and option that there is, with values that fit and values that do not."""

from __future__ import annotations

import random
from enum import Enum
from functools import cache
from typing import Any

import typer.main

from ddf_convert.cli import app

_JUNK = (
    "", " ", "-1", "0", "1", "2", "3", "1e9", "nan", "inf", "9" * 40, "x", "é", "a b", "../escaped", "/dev/null", "/",
    ".", "-", "--", "-x", "[red]x[/]", "%s", "{}", "re:[", "re:(a+)+$", "*", "conv1.*", "\ud83d", "a=b", "=", "cpu",
    "cuda:99", "meta", "resnet10t", "none", "2.5G", "1k", "bfloat16", "missing.json", "missing/deep/file",
)  # fmt: skip
# What takes long by its nature gets no more than this, whatever else is said.
_LIMITS = {
    "bench": ["--seconds", "0.001", "--channels", "8", "--resolution", "7", "--batch", "1"],
    "finetune": ["--steps", "1", "--batch-size", "2", "--workers", "0"],
    "upsample-train": ["--steps", "1"],
}


@cache
def commands() -> dict[tuple[str, ...], Any]:
    """Every command by its words."""

    def walk(command: Any, words: tuple[str, ...]) -> dict[tuple[str, ...], Any]:
        children = getattr(command, "commands", None)
        if not children:
            return {words: command}
        found: dict[tuple[str, ...], Any] = {}
        for name, child in children.items():
            found |= walk(child, (*words, name))
        return found

    return walk(typer.main.get_command(app), ())


def command_line(dice: random.Random, files: list[str], output: str) -> list[str]:
    """One command with random arguments and options.

    Args:
        dice: Chance.
        files: Paths that exist: folders of artifacts, images, weights, whatever.
        output: A path that may be written.
    """
    words = dice.choice([words for words in commands() if words not in (("doctor",),)])  # doctor takes no arguments
    line = [*words]
    for parameter in commands()[words].params:
        option = parameter.param_type_name == "option"
        if option and not parameter.required and dice.random() < 0.75:
            continue
        if not option and dice.random() < 0.1:
            continue
        for _ in range(2 if parameter.multiple and dice.random() < 0.3 else 1):
            if option:
                line.append(dice.choice(parameter.opts))
            if getattr(parameter, "is_flag", False):
                continue
            line += [_value(parameter, dice, files, output) for _ in range(max(1, parameter.nargs))]
    for start, limits in _LIMITS.items():
        if words[0] == start:
            known = {name for parameter in commands()[words].params for name in parameter.opts}
            pairs = zip(limits[::2], limits[1::2], strict=True)
            line += [word for name, value in pairs if name in known for word in (name, value)]
    if words == ("bench", "layer"):
        line += ["--size", "7"]
    if words == ("bench", "op"):
        line.append("--no-compile")  # what torch.compile takes is not ours
    if dice.random() < 0.05:
        line.insert(dice.randrange(len(line)), dice.choice(_JUNK))
    return line


def _value(parameter: Any, dice: random.Random, files: list[str], output: str) -> str:
    """A value for a parameter: likely one that fits."""
    kind, name = getattr(parameter, "bare_type", str), parameter.name or ""
    writes = name in ("output", "html", "json_file", "plot")
    if dice.random() < 0.35:  # but what is given to read must not be asked to be written
        return dice.choice((*_JUNK, output) if writes else (*_JUNK, *files, output))
    if writes:
        return output + dice.choice(("", "", ".png", ".html", ".json", ".onnx", ".pt2"))
    if name == "model":
        return dice.choice((files[0], files[0], "test_resnet", "test_efficientnet", "test_vit"))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return str(dice.choice(list(kind)).value)
    if name in ("input_size", "channels", "size", "resolution"):
        return str(dice.choice((1, 3, 7, 32)))
    if kind is int:
        return str(dice.choice((0, 1, 2, 3, 5, 7)))
    if kind is float:
        return str(dice.choice((0.0, 0.1, 0.5, 1.0, 1e-9)))
    return dice.choice((*files, "paper", "preserve", "quick", "ddf", "condconv", "conv1.*", "cpu", "num_experts=2"))
