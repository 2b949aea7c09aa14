"""The commands of the command line, and what they share: the program, and options that several take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Federated meta-learning: a start from which every site, also a new one, adapts in a few steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

File = Annotated[Path, typer.Argument(help="The experiment, a TOML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the experiment; may be repeated."),
]

Quiet = Annotated[bool, typer.Option("--quiet", help="Show neither progress nor tables; errors are still printed.")]
