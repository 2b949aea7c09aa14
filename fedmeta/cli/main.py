"""The command line: the program and the order of its commands in the help."""

from __future__ import annotations

import os
import sys

import click

from fedmeta.cli import listing, operating, reading, training, unlearning
from fedmeta.cli.application import app
from fedmeta.errors import FedmetaError

INTERRUPTED = 130
ORDER = [module.__name__ for module in (training, reading, listing, unlearning, operating)]
"""In which order the help lists the modules' commands."""

app.registered_commands.sort(key=lambda command: ORDER.index(getattr(command.callback, "__module__", "")))


def main() -> None:
    """Runs the command line; what the user can mend is one line on stderr and exit code 2."""
    # Torch's threads wait for one another by spinning, which on a busy machine makes two of them much slower than one.
    # So many turns are some microseconds; after that they sleep. Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # An experiment may name a model by import path; a script's own folder is not on the path, the user's is.
    sys.path.insert(0, os.getcwd())
    try:
        code = app(standalone_mode=False)
    except FedmetaError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError:
        sys.exit(2)  # the help has been printed
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()))
    except (KeyboardInterrupt, click.Abort):
        print("fedmeta: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if not error.filename:
            raise
        _fail(f"{str(error.filename)[:200]}: {error.strerror}")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"fedmeta: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)
