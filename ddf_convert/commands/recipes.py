"""The commands that show recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from ddf_convert.commands.completion import recipe_names
from ddf_convert.commands.console import out, print_json
from ddf_convert.commands.options import HELP, AsJson, with_shared_options

app = typer.Typer(
    help="The built-in recipes: how to convert, to initialize and to train.",
    invoke_without_command=True,
    context_settings=HELP,
)


@app.callback()
def _recipes(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        recipes_list(context, debug=False)


@app.command("list")
@with_shared_options
def recipes_list(as_json: AsJson = False) -> None:
    """Name the built-in recipes."""
    from ddf_convert.recipes import load, names

    found = [load(name) for name in names()]
    if as_json:
        print_json({"recipes": [recipe.model_dump(mode="json", by_alias=True) for recipe in found]})
        return
    from ddf_convert.report.tables import recipes_table

    out.print(recipes_table(found))


@app.command("show")
@with_shared_options
def recipes_show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE",
            help="A built-in recipe, or a file.",
            autocompletion=recipe_names,
            show_default=False,
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Print a recipe; a built-in one as its file, to copy and to change."""
    from ddf_convert import recipes as package

    recipe = package.load(name)
    if as_json:
        print_json(recipe.model_dump(mode="json", by_alias=True))
    else:
        typer.echo((package.source(name) if name in package.names() else recipe.to_yaml()).rstrip())
