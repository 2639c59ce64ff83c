"""The application: what all commands have in common, and how errors end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, cast

import typer

import onnx_kfe as kfe
from onnx_kfe import _options as options
from onnx_kfe import console
from onnx_kfe.errors import KfeError, UsageError

__all__ = ["app", "command", "main"]

_INTERRUPTED = 130
_ClickError = cast(
    "type[Exception]", typer.BadParameter.__mro__[2]
)  # click's ClickException, of whichever click this typer uses

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a trained ONNX model smaller and measurably faster, from the .onnx file and some inputs alone.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script.

    Args:
        arguments: The command line without the program's name; the process's own when None.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 3 a budget that cannot be met, 130 interrupted.
    """
    try:
        return app(None if arguments is None else list(arguments), standalone_mode=False) or 0
    except KfeError as error:
        console.print_error(str(error))
        return error.exit_code
    except _ClickError as error:
        console.print_error(f"{error.format_message().rstrip('.')} (see --help)")  # type: ignore[attr-defined]
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose options come in groups."""
    return app.command()(options.flattened(function))


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Print the version or the help where no command is given."""
    if version:
        console.print_line(f"onnx-kfe {kfe.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
