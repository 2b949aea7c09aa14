"""Which node a site's name belongs to where nodes have keys: the one it first came with, or the operator's choice.

With `flower-superlink --enable-supernode-auth` a node's id stands for its key: `supernode register` makes it from the
public key, and the node has it for good. Then the ServerApp's environment variable `FEDMETA_SITE_KEYS` names a file
in which each site's name belongs to a node id:

    {"hospital-a": "4242", "hospital-b": "1717"}

The server adds names that are new. The operator may write the file before the first run, and takes a line out to let
another key have a name. Without node authentication ids change whenever a node starts, and names are not bound to keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmeta.errors import FedmetaError
from fedmeta.files import locked, read_json, write_atomic
from fedmeta.text import first_bad_name

SITE_KEYS = "FEDMETA_SITE_KEYS"
"""Environment variable of the ServerApp: the file of names and node ids."""

FOREIGN_NAME = "its name belongs to the key of another node"
SEVERAL_NAMES = "its node has one key and brings several new names"
CONTESTED_NAME = "two nodes bring this new name at once"


def keys_file() -> Path | None:
    """Returns the file that the environment names; None where names are not bound to keys."""
    path = os.environ.get(SITE_KEYS)
    return Path(path) if path else None


def read(path: Path) -> dict[str, int]:
    """Returns the node id of each name; empty where there is no file yet.

    Raises:
        FedmetaError: The file cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FedmetaError(f"{path}: the names of sites and their nodes cannot be read: {error}") from error
    entries = read_json(text, dict[str, str], f"{path}: names of sites and node ids")
    if bad := first_bad_name(entries):
        raise FedmetaError(f"{path}: the site {bad}")
    wrong = [name for name, node in entries.items() if not (node.isascii() and node.isdecimal())]
    if wrong:
        raise FedmetaError(f'{path}: "{wrong[0]}": the node id is no whole number; see: fedmeta flower supernode list')
    return {name: int(node) for name, node in entries.items()}


def claim(path: Path, claims: Mapping[int, Sequence[str]]) -> dict[int, dict[str, str]]:
    """Gives names that are new to the nodes that come with them, and writes that down.

    A node brings one new name, so that none can take those of sites that have not come yet; more can only be given to
    it in the file. Where several nodes come with one new name at once, none of them has it.

    Args:
        path: The file.
        claims: The names that each node comes with.

    Returns:
        The nodes that come with names that they may not have, with these names and the reasons.

    Raises:
        FedmetaError: The file cannot be read or written.
    """
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        owners = read(path)
        refused: dict[int, dict[str, str]] = {}
        fresh: dict[str, list[int]] = {}
        for node, names in claims.items():
            new = [name for name in names if name not in owners]
            refused[node] = {name: FOREIGN_NAME for name in names if owners.get(name, node) != node}
            if len(new) > 1:
                refused[node] |= dict.fromkeys(new, SEVERAL_NAMES)
            elif new and not refused[node]:
                fresh.setdefault(new[0], []).append(node)
        for name, nodes in fresh.items():
            for node in nodes if len(nodes) > 1 else ():
                refused[node][name] = CONTESTED_NAME
        taken = {name: nodes[0] for name, nodes in fresh.items() if len(nodes) == 1}
        if taken:
            _write(path, {**owners, **taken})
    return {node: names for node, names in refused.items() if names}


def _write(path: Path, owners: Mapping[str, int]) -> None:
    content = json.dumps({name: str(owners[name]) for name in sorted(owners)}, indent=1, ensure_ascii=False)
    try:
        write_atomic(path, content.encode() + b"\n")
    except OSError as error:
        raise FedmetaError(f"{path}: the names of sites cannot be written: {error.strerror or error}") from error
