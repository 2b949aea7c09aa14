"""Classes and functions of the user's own, by import path."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from fedmeta.errors import FedmetaError, nearest

SHOWN = 3
"""How many of the folders that were searched a message lists."""


def load_object(path: str, key: str) -> Any:
    """Returns what an import path `package.module:name` names.

    Args:
        path: The import path.
        key: The key that it was given for, such as "[model] name", for messages.

    Raises:
        FedmetaError: It cannot be imported; the message has where it was looked for.
    """
    module, _, attribute = path.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # importing runs a user's own code
        raise FedmetaError(f'{key} = "{path}" cannot be imported: {_reason(error, module)}') from error
    try:
        return getattr(found, attribute)
    except AttributeError:
        names = [name for name in vars(found) if not name.startswith("_")]
        raise FedmetaError(
            f'{key} = "{path}" cannot be imported: {getattr(found, "__file__", module)} defines no {attribute}'
            f"{nearest(attribute, names)}"
        ) from None


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _reason(error: Exception, module: str) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return first_line(error)
    own = error.name is not None and (module == error.name or module.startswith(f"{error.name}."))
    if not own:
        return f"{module} needs the module {error.name}, which is not installed here"
    folders = list(dict.fromkeys(str(Path(each or ".").absolute()) for each in sys.path))
    libraries = [entry for entry in folders if "site-packages" in entry or "/lib/python" in entry or ".zip" in entry]
    mine = [entry for entry in folders if entry not in libraries]
    more = f" and {len(mine) - SHOWN} more" if len(mine) > SHOWN else ""
    return (
        f"there is no module {error.name}; looked in {', '.join(mine[:SHOWN]) or 'no folder but the libraries'}{more}, "
        "and the installed packages: run the command in the module's folder, or set PYTHONPATH"
    )
