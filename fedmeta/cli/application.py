"""The commands of the command line, and what they share: the program, and options that several take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmeta.versions import __version__

app = typer.Typer(
    help="Federated meta-learning: a start from which every site, also a new one, adapts in a few steps.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fedmeta {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the program itself."""


File = Annotated[Path, typer.Argument(help="The experiment, a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the experiment; may be repeated."),
]

Quiet = Annotated[bool, typer.Option("--quiet", help="Show neither progress nor tables; errors are still printed.")]
