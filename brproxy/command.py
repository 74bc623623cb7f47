"""What the two commands have in common: ``--version``, and mistakes told, a line each."""

from importlib.metadata import version
from typing import Annotated

import typer

from brproxy.types import BrproxyError

USAGE_ERROR = 2
"""Exit code of a user's mistake."""


def make_command(name: str, text: str) -> typer.Typer:
    """Return an empty command line that knows ``--help`` and ``--version``."""
    app = typer.Typer(help=text, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

    def print_version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {version('brproxy')}")
            raise typer.Exit

    @app.callback()
    def common(
        _version: Annotated[
            bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    return app


def run_command(app: typer.Typer, name: str) -> None:
    """Run a command line; a user's mistakes are a line each on standard error, and exit code 2."""
    try:
        app()
    except BrproxyError as error:
        for line in str(error).split("\n"):
            typer.echo(f"{name}: {line}", err=True)
        raise SystemExit(USAGE_ERROR) from None
