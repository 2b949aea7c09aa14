"""Sends what a run has to log, from the thread of its outbox or after an outage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from fedmeta.tracking import run_page
from fedmeta.tracking.entries import (
    UNSENT,
    Artifact,
    End,
    Entry,
    Metric,
    Model,
    Picture,
    Table,
    Tag,
    read_unsent,
    write_unsent,
)
from fedmeta.tracking.model import log as log_model
from fedmeta.tracking.opening import open_client
from fedmeta.tracking.outbox import deliver
from fedmeta.tracking.store import checked_uri, say, within_time

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Sender:
    """Sends entries of one kind to a run; to send them again changes nothing."""

    def __init__(self, client: MlflowClient, run_id: str, resumed: bool) -> None:
        self._client = client
        self._run_id = run_id
        self._resumed = resumed
        self._logged: dict[str, dict[int, float]] = {}

    def __call__(self, entries: list[Entry]) -> None:
        """Sends entries of one kind; raises where they did not arrive."""
        metrics = [entry for entry in entries if isinstance(entry, Metric)]
        if metrics:
            self._send_metrics(metrics)
        for entry in entries[len(metrics) :]:
            self._send(entry)

    def _send_metrics(self, metrics: list[Metric]) -> None:
        from mlflow.entities import Metric as Entity

        fresh = {(metric.key, metric.step): metric for metric in metrics if not self._is_there(metric)}
        self._client.log_batch(self._run_id, metrics=[Entity(*metric) for metric in fresh.values()])
        if self._resumed:
            for (key, step), metric in fresh.items():
                self._logged[key][step] = metric.value

    def _is_there(self, metric: Metric) -> bool:
        """Says whether a resumed run has the metric: the rounds after its checkpoint come a second time.

        Results may come a second time, where they differ: a run that goes on after its end has better ones.
        """
        if not self._resumed:
            return False
        if metric.key not in self._logged:
            history = self._client.get_metric_history(self._run_id, metric.key)
            before = sorted(history, key=lambda entry: entry.timestamp)
            self._logged[metric.key] = {entry.step: entry.value for entry in before}
        there = self._logged[metric.key]
        if metric.key.startswith(run_page.RESULTS):
            return there.get(metric.step) == metric.value
        return metric.step in there

    def _send(self, entry: Entry) -> None:
        client, run_id = self._client, self._run_id
        match entry:
            case Tag(key, value):
                client.set_tag(run_id, key, value)
            case End(status, timestamp):
                client.set_terminated(run_id, status, timestamp)
            case Table(path):
                self._send_table(Path(path))
            case Model(path, registered):
                problem = log_model(client, run_id, Path(path), registered)
                if problem:
                    say(problem)
            case Picture(path, key, step):
                self._send_picture(path, key, step)
            case Artifact(path, folder) if Path(path).is_dir():
                client.log_artifacts(run_id, path, folder or None)
            case Artifact(path, folder):
                client.log_artifact(run_id, path, folder or None)

    def _send_table(self, path: Path) -> None:
        # `log_table` would add its rows to those of a table that is there.
        if any(file.path == path.name for file in self._client.list_artifacts(self._run_id)):
            self._client.log_artifact(self._run_id, str(path))
        else:
            self._client.log_table(self._run_id, pd.read_json(path, orient="split"), path.name)

    def _send_picture(self, path: str, key: str, step: int) -> None:
        from PIL import Image

        name = f"{key.replace('/', '~')}+step+{step}+"
        if not any(name in file.path for file in self._client.list_artifacts(self._run_id, "images")):
            with Image.open(path) as image:
                self._client.log_image(self._run_id, image, key=key, step=step)


def send_unsent(uri: str, folder: Path) -> list[Entry]:
    """Sends what a finished run's folder holds unsent, once its store is back.

    Returns:
        What is still unsent.

    Raises:
        FedmetaError: The store cannot be reached.
    """
    run_id, entries = read_unsent(folder / UNSENT)
    uri = checked_uri(uri)
    sender = within_time(uri, lambda: Sender(open_client(uri), run_id, resumed=True))
    left, _ = deliver(entries, sender)
    write_unsent(folder / UNSENT, run_id, left)
    return left
