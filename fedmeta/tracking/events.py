"""What a run logs, as values that can wait in memory or, as JSON lines, in the run's folder; and how MLflow gets them.

MLflow's own asynchronous logging cannot replace this: it drops a batch whose request fails, keeps nothing when the
process ends, and its flush waits without a limit. Here an event is kept until the store has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.files import write_atomic
from fedmeta.tracking.async_queue import deliver
from fedmeta.tracking.metrics import RESULTS
from fedmeta.tracking.mlflow_client import checked_uri, log_notice, log_picture, log_table, open_client, with_timeout
from fedmeta.tracking.model import log as log_model

if TYPE_CHECKING:
    from mlflow import MlflowClient


class MetricValue(NamedTuple):
    """A metric's value at a round; `timestamp` in ms since 1970."""

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
    """A file that `pandas.DataFrame.to_json(orient="split")` wrote, shown as a table beside other runs'."""

    path: str


class Picture(NamedTuple):
    """A picture shown among the run's charts at a round."""

    path: str
    key: str
    step: int


class Model(NamedTuple):
    """The folder of the run's model in MLflow's form, and the name that it is registered under; "" = none."""

    path: str
    registered: str


class End(NamedTuple):
    """The end of the run, FINISHED, FAILED or KILLED; `timestamp` in ms since 1970."""

    status: str
    timestamp: int


Event = MetricValue | Tag | Artifact | Table | Picture | Model | End
KINDS: dict[str, type[Event]] = {
    kind.__name__: kind for kind in (MetricValue, Tag, Artifact, Table, Picture, Model, End)
}
UNSENT = "unsent.jsonl"
"""The file of a run's folder that holds what could not be sent."""


def artifact(path: Path) -> Artifact:
    """Returns what sends a file to the root of the artifacts, or a folder under its name."""
    return Artifact(str(path.absolute()), path.name if path.is_dir() else "")


class EventSender:
    """Sends events of one kind to a run; sending them twice changes nothing.

    Args:
        client: The store's client.
        run_id: The run.
        resumed: Whether the run may have some of the metrics already.
    """

    def __init__(self, client: MlflowClient, run_id: str, resumed: bool) -> None:
        self._client = client
        self._run_id = run_id
        self._resumed = resumed
        self._logged: dict[str, dict[int, float]] = {}

    def __call__(self, events: list[Event]) -> None:
        """Sends events of one kind; raises where they did not arrive."""
        metrics = [event for event in events if isinstance(event, MetricValue)]
        if metrics:
            self._send_metrics(metrics)
        for event in events[len(metrics) :]:
            self._send(event)

    def _send_metrics(self, metrics: list[MetricValue]) -> None:
        from mlflow.entities import Metric

        fresh = {(metric.key, metric.step): metric for metric in metrics if not self._is_logged(metric)}
        self._client.log_batch(self._run_id, metrics=[Metric(*metric) for metric in fresh.values()])
        if self._resumed:
            for (key, step), metric in fresh.items():
                self._logged[key][step] = metric.value

    def _is_logged(self, metric: MetricValue) -> bool:
        """Returns whether a resumed run has the metric: it repeats the rounds after its checkpoint.

        Results that differ are logged again: a run that is extended after its end has better ones.
        """
        if not self._resumed:
            return False
        if metric.key not in self._logged:
            history = self._client.get_metric_history(self._run_id, metric.key)
            in_order = sorted(history, key=lambda entry: entry.timestamp)
            self._logged[metric.key] = {entry.step: entry.value for entry in in_order}
        logged = self._logged[metric.key]
        if metric.key.startswith(RESULTS):
            return logged.get(metric.step) == metric.value
        return metric.step in logged

    def _send(self, event: Event) -> None:
        client, run_id = self._client, self._run_id
        match event:
            case Tag(key, value):
                client.set_tag(run_id, key, value)
            case End(status, timestamp):
                client.set_terminated(run_id, status, timestamp)
            case Table(path):
                log_table(client, run_id, pd.read_json(path, orient="split"), Path(path).name)
            case Model(path, registered):
                if problem := log_model(client, run_id, Path(path), registered):
                    log_notice(problem)
            case Picture(path, key, step):
                log_picture(client, run_id, Path(path), key, step)
            case Artifact(path, folder) if Path(path).is_dir():
                client.log_artifacts(run_id, path, folder or None)
            case Artifact(path, folder):
                client.log_artifact(run_id, path, folder or None)


# What an outage left in a run's folder


class Sent(NamedTuple):
    """A run's folder, how many of its unsent events arrived, and how many are left."""

    folder: Path
    arrived: int
    left: int


def write_unsent(path: Path, run_id: str, events: Iterable[Event]) -> None:
    """Writes the run and its events as JSON lines; removes the file where there are none."""
    lines = [json.dumps({"kind": type(event).__name__, **event._asdict()}) for event in events]
    if lines:
        write_atomic(path, ("\n".join([json.dumps({"run_id": run_id}), *lines]) + "\n").encode())
    else:
        path.unlink(missing_ok=True)


def read_unsent(path: Path) -> tuple[str, list[Event]]:
    """Reads what `write_unsent` wrote.

    Returns:
        The run's id and its events in order; an empty id and no events where there is no file.

    Raises:
        FedmetaError: The file holds something else.
    """
    if not path.is_file():
        return "", []
    try:
        head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return str(head["run_id"]), [KINDS[line.pop("kind")](**line) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedmetaError(f"{path}: not the unsent events of a run; move it away to continue without them") from error


def sync(folder: Path, uri: str = "") -> Iterator[Sent]:
    """Sends what a run's folder, or each run's in a folder of runs, holds unsent; may be stopped and repeated.

    Args:
        folder: A run's folder, or the folder of runs.
        uri: The store, in place of the one that each run's experiment names.

    Yields:
        What became of each run's events.

    Raises:
        FedmetaError: There is no such folder, a file in it is damaged, or the store cannot be reached.
    """
    if not folder.is_dir():
        raise FedmetaError(f"{folder}: no such folder; name a run's, or the one of all runs")
    single = [folder / UNSENT] if (folder / UNSENT).is_file() else []
    for file in single or sorted(folder.glob(f"*/{UNSENT}")):
        run_id, events = read_unsent(file)
        store = checked_uri(uri or _store_of(file.parent))
        sender = EventSender(with_timeout(store, partial(open_client, store)), run_id, resumed=True)
        left, _ = deliver(events, sender)
        write_unsent(file, run_id, left)
        yield Sent(file.parent, len(events) - len(left), len(left))


def _store_of(folder: Path) -> str:
    path = folder / "experiment.toml"
    try:
        return Experiment.from_toml(path.read_text(encoding="utf-8"), origin=str(path)).tracking.uri
    except OSError as error:
        raise FedmetaError(f"{path}: {error.strerror or error}; name the store with --uri") from error
