"""The command line: all the commands, and how their errors are reported.

Commands import what they call inside their functions, so that completion is quick.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Annotated

import typer
from rich.markup import escape

from ddf_convert.artifacts.atomic import is_full, os_error_text
from ddf_convert.commands import bench, depth, recipes
from ddf_convert.commands.console import err, secure_streams, silence_loggers
from ddf_convert.commands.conversion import convert, inspect
from ddf_convert.commands.doctor import doctor
from ddf_convert.commands.export import export
from ddf_convert.commands.options import HELP, is_assignment, spread
from ddf_convert.commands.training import evaluate, finetune
from ddf_convert.commands.visualize import visualize
from ddf_convert.errors import DDFError, UsageError

app = typer.Typer(
    name="ddf-convert",
    help="Replaces 3x3 convolutions of PyTorch vision models with decoupled dynamic filters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
for command in (inspect, convert, finetune, evaluate, export, visualize, doctor):
    app.command()(command)
app.add_typer(bench.app, name="bench")
app.add_typer(recipes.app, name="recipes")
app.add_typer(depth.app, name="depth")
app.command("upsample-train", hidden=True)(depth.train)  # the names of older versions
app.command("upsample", hidden=True)(depth.predict)

_MAX_NAME = 40  # characters of a name that no file can have, in an error
_INTERRUPTED = 130  # exit code that shells give a program that Ctrl-C ended


def _print_version(value: bool) -> None:
    if value:
        from ddf_convert.version import __version__

        typer.echo(f"ddf-convert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits with 0, 1 for a failure, 2 for a user's mistake, or 130 for Ctrl-C.

    Args:
        arguments: None are those of the process.
    """
    secure_streams()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Runs the command line; every error becomes one line on stderr and an exit code."""
    debug = "--debug" in arguments  # and not as it is parsed: the parser's errors have tracebacks too
    if not debug:
        silence_loggers()
    try:
        code = app(repeat_options(arguments), prog_name="ddf-convert", standalone_mode=False)
        sys.stdout.flush()
        if code == _INTERRUPTED:  # some versions of typer swallow the KeyboardInterrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        if _is_first_to_report("interrupted"):
            err.print("interrupted; nothing was left half-written")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`| head`). Python must not try to flush at exit either.
        _discard_stdout()
        return 1
    except Exception as error:
        return _report_error(_translate_os_error(error) if isinstance(error, OSError) and not debug else error, debug)


def _translate_os_error(error: OSError) -> Exception:
    """Returns the error to report: a full disk, or a name that is too long, is no fault of ddf-convert."""
    if is_full(error):
        _discard_stdout()
        where = f" {error.filename}" if error.filename else ""
        return DDFError(f"could not write{where}: {os_error_text(error)}")
    if error.errno == errno.ENAMETOOLONG:  # wherever a name is looked up
        return UsageError(f"{str(error.filename)[:_MAX_NAME]}...: {error.strerror}")
    return error


def _discard_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def repeat_options(arguments: list[str]) -> list[str]:
    """Repeats options that are given several values, ``--kernel-size 3 5``: the parser takes one value each."""
    converting = arguments[:1] in (["inspect"], ["convert"]) or arguments[:2] == ["bench", "model"]
    arguments = spread(arguments) if converting else arguments
    return spread(arguments, "--model-kwargs", is_assignment)


def _report_error(error: Exception, debug: bool) -> int:
    code = int(getattr(error, "exit_code", 1))
    if getattr(error, "reported_elsewhere", False) or not _is_first_to_report(str(error)):
        return code
    if debug:
        traceback.print_exception(error)
    elif isinstance(error, DDFError):
        _print_error(str(error))
    elif hasattr(error, "format_message"):  # click's own errors, from whichever copy of click typer carries
        # With no arguments at all typer prints the help and then complains in no words.
        if message := error.format_message().replace("Value error, ", ""):  # pydantic's prefix
            context = getattr(error, "ctx", None)
            command = context.command_path if context else "ddf-convert"
            _print_error(f"{message.rstrip('.')}; see {command} --help")
    else:
        _print_error(f"{type(error).__name__}: {error} (this is a fault of ddf-convert; --debug shows where)")
    return code


def _is_first_to_report(message: str) -> bool:
    """Returns whether this process reports it: under torchrun only the first process that finds it does."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from ddf_convert.training import distributed

    return distributed.first_to_report(message)


def _print_error(message: str) -> None:
    """Prints a message as one line: pasted paths and torch's reasons can hold several."""
    line = " ".join(message.split())
    err.print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)


if __name__ == "__main__":
    main()
