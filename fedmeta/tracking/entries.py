"""What a run sends to its store, as values that can wait in memory or, as JSON lines, in the run's folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fedmeta.errors import FedmetaError
from fedmeta.files import write_atomic


class Metric(NamedTuple):
    """A metric's value at a round; `timestamp`, in ms since 1970, makes sending it twice harmless."""

    key: str
    value: float
    timestamp: int
    step: int


class Tag(NamedTuple):
    """A tag of the run."""

    key: str
    value: str


class Artifact(NamedTuple):
    """A file or folder to upload to `folder` among the artifacts; "" is their root."""

    path: str
    folder: str


class Table(NamedTuple):
    """A file that `pandas.DataFrame.to_json(orient="split")` wrote, to be shown as a table beside other runs'."""

    path: str


class Picture(NamedTuple):
    """A picture to be shown among the run's charts at a round."""

    path: str
    key: str
    step: int


class Model(NamedTuple):
    """The folder of the run's model in MLflow's form, and the name that it is registered under; "" = none."""

    path: str
    registered: str


class Dataset(NamedTuple):
    """The data of a run as MLflow lists it; `digest` has at most 36 characters."""

    name: str
    source: str
    digest: str
    sites: int


class End(NamedTuple):
    """The end of the run, FINISHED, FAILED or KILLED; `timestamp` in ms since 1970."""

    status: str
    timestamp: int


Entry = Metric | Tag | Artifact | Table | Picture | Model | End
KINDS: dict[str, type[Entry]] = {kind.__name__: kind for kind in (Metric, Tag, Artifact, Table, Picture, Model, End)}
UNSENT = "unsent.jsonl"
"""The file of a run's folder that holds what could not be sent."""


def write_unsent(path: Path, run_id: str, entries: Iterable[Entry]) -> None:
    """Writes the run and its entries as JSON lines; removes the file where there are none."""
    lines = [json.dumps({"kind": type(entry).__name__, **entry._asdict()}) for entry in entries]
    if lines:
        write_atomic(path, ("\n".join([json.dumps({"run_id": run_id}), *lines]) + "\n").encode())
    else:
        path.unlink(missing_ok=True)


def read_unsent(path: Path) -> tuple[str, list[Entry]]:
    """Reads what `write_unsent` wrote.

    Returns:
        The run's id and its entries in order; an empty id and no entries where there is no file.

    Raises:
        FedmetaError: The file holds something else.
    """
    if not path.is_file():
        return "", []
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return str(head["run_id"]), [KINDS[line.pop("kind")](**line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedmetaError(f"{path}: not what a run kept to send later; move it away to go on without") from error
