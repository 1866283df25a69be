"""The command that says what runs here."""

from __future__ import annotations

import typer

from ddf_convert.commands.console import busy, out, print_json
from ddf_convert.commands.options import AsJson, with_shared_options


@with_shared_options
def doctor(as_json: AsJson = False) -> None:
    """Say what runs on this machine, and why not what does not."""
    with busy("Looking around; the kernels are compiled if they never were"):
        from ddf_convert.bench.doctor import State, examine

        checks = list(examine())
    if as_json:
        print_json({"checks": [check.to_dict() for check in checks]})
    else:
        from ddf_convert.bench.tables import checks_table

        out.print(checks_table(checks))
    if any(check.state is State.PROBLEM for check in checks):
        raise typer.Exit(1)
