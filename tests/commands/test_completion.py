"""What the shell completes, and that it does not wait for torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
from support.command_line import start

import ddf_convert as ddf
from ddf_convert import recipes
from ddf_convert.commands.completion import filter_names, recipe_names, timm_names
from ddf_convert.conversion import registry


def completed(words: str, incomplete: str = "") -> tuple[list[str], bool]:
    """What bash is offered by typer's protocol, and whether torch was imported for it, which takes seconds."""
    environment = {
        **os.environ,
        "_DDF_CONVERT_COMPLETE": "complete_bash",
        "COMP_WORDS": f"ddf-convert {words} {incomplete}",
        "COMP_CWORD": str(1 + len(words.split())),
    }
    code = (
        "import atexit, sys; from ddf_convert.cli import main;"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); main([])"
    )
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stderr in ("True\n", "False\n")
    return ran.stdout.split(), ran.stderr == "True\n"


def test_completion_knows_timms_names() -> None:
    assert set(timm_names("resnet10")) == set(timm.list_models("resnet10*"))
    assert set(timm_names("ddf_")) == set(timm.list_models("ddf_*"))
    assert set(timm_names("")) >= set(timm.list_models())
    assert timm_names("no-model") == []


def test_completion_knows_recipes_and_filters() -> None:
    assert recipe_names("") == sorted(recipes.names())
    assert recipe_names("pre") == ["preserve"]
    built_in = [each.name for each in ddf.list_filters() if registry.is_built_in(each)]
    assert filter_names("") == built_in
    assert filter_names("dw-") == ["dw-condconv", "dw-weightnet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        ("inspect", "resnet10t", {"resnet10t"}),
        ("convert", "resnet10t", {"resnet10t"}),
        ("bench model", "resnet10t", {"resnet10t"}),
        ("export", "resnet10t", {"resnet10t"}),
        ("evaluate", "resnet10t", {"resnet10t"}),
        ("visualize", "ddf_mul_resnet1", {"ddf_mul_resnet18", "ddf_mul_resnet101", "ddf_mul_resnet152"}),
        ("convert resnet10t --recipe", "", set(recipes.names())),
        ("finetune folder --recipe", "dis", {"distill"}),
        ("depth train folder --recipe", "de", {"depth-upsample"}),
        ("recipes show", "ca", {"calibrate"}),
        ("inspect resnet10t --filter", "dw-", {"dw-condconv", "dw-weightnet"}),
        ("convert resnet10t --mixing", "a", {"auto", "always"}),
        ("bench", "la", {"layer"}),
    ],
)
def test_completion_in_a_shell(words: str, incomplete: str, expected: set[str]) -> None:
    found, with_torch = completed(words, incomplete)
    assert set(found) == expected
    assert not with_torch


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "finetune",
        "inspect resnet10t --html",
        "convert resnet10t -o",
        "convert resnet10t --checkpoint",
        "finetune folder --data",
        "visualize resnet10t",
        "export resnet10t -o",
        "depth predict",
    ],
)
def test_files_are_left_to_the_shell(words: str) -> None:
    """bash and zsh complete files where the answer is empty."""
    assert completed(words, "net_for") == ([], False)


def test_bash_completes_files_where_nothing_is_offered() -> None:
    environment = {**os.environ, "_DDF_CONVERT_COMPLETE": "source_bash"}
    assert "complete -o default" in start(env=environment).stdout
