"""Sends what runs could not send while their store was away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.tracking.entries import UNSENT, read_unsent
from fedmeta.tracking.sender import send_unsent


class Sent(NamedTuple):
    """What became of one run's unsent entries: the run's folder, how many arrived and how many are left."""

    folder: Path
    arrived: int
    left: int


def sync(folder: Path, uri: str = "") -> Iterator[Sent]:
    """Sends what a run's folder, or each run's in a folder of runs, holds unsent.

    To send an entry twice changes nothing, so that this may be stopped and called again.

    Args:
        folder: A run's folder, or the folder of runs.
        uri: The store, in place of the one that each run's experiment names.

    Raises:
        FedmetaError: There is no such folder, a file in it is damaged, or the store cannot be reached.
    """
    if not folder.is_dir():
        raise FedmetaError(f"{folder}: no such folder; name a run's, or the one of all runs")
    alone = [folder / UNSENT] if (folder / UNSENT).is_file() else []
    for file in alone or sorted(folder.glob(f"*/{UNSENT}")):
        waiting = len(read_unsent(file)[1])
        left = len(send_unsent(uri or _store_of(file.parent), file.parent))
        yield Sent(file.parent, waiting - left, left)


def _store_of(folder: Path) -> str:
    path = folder / "experiment.toml"
    try:
        return Experiment.from_toml(path.read_text(encoding="utf-8"), origin=str(path)).tracking.uri
    except OSError as error:
        raise FedmetaError(f"{path}: {error.strerror or error}; name the store with --uri") from error
