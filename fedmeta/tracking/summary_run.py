"""An MLflow run about other runs: a comparison, or a search for settings, with its figures, tables and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from fedmeta.experiment import UNTRACKED, Experiment, without_user_info
from fedmeta.tracking.opening import experiment_of, log_params, open_client
from fedmeta.tracking.run_page import DESCRIPTION_LIMIT, data_name, finite
from fedmeta.tracking.store import checked_uri, first_line, say, shown, within_time

if TYPE_CHECKING:
    from mlflow import MlflowClient

DESCRIPTION = "mlflow.note.content"
PARENT = "mlflow.parentRunId"
VARIED = ("learner.", "tracking.", "runtime.seed", "evaluation.judge")
"""Params that differ between the runs that this one is about, or that say where they are and not what they are."""
COLOUR = "#222222"
METRICS_PER_BATCH = 1000
KEPT = "mlflow.json"
"""The file of a folder that names its run."""


@contextmanager
def summary_run(
    experiment: Experiment, kind: Literal["comparison", "search"], name: str, folder: Path, parent: str = ""
) -> Iterator[SummaryRun | None]:
    """Opens the store and a run in it, a new one or the one that the folder names, and ends the run with the block.

    Args:
        experiment: What the runs that it is about have in common.
        kind: What it is; becomes a tag.
        name: The run's name: what is compared, or searched for.
        folder: Keeps which run this is, so that there is one however often a command stops and goes on.
        parent: The run that it is shown under; "" = none.

    Yields:
        The run; None where nothing is tracked.

    Raises:
        FedmetaError: The store cannot be reached or written.
    """
    if experiment.tracking.uri == UNTRACKED:
        yield None
        return
    kept = folder / KEPT
    known = json.loads(kept.read_text()) if kept.exists() else {}
    named = without_user_info(experiment.tracking.uri)
    earlier = known.get("run_id", "") if known.get("uri") == named else ""
    uri = checked_uri(experiment.tracking.uri)
    client, run_id = within_time(uri, lambda: _open(uri, experiment, kind, name, earlier, parent))
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"run_id": run_id, "uri": named}))
    run = SummaryRun(client, uri, run_id)
    try:
        yield run
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    run.end("FINISHED")


class SummaryRun:
    """One run of the store. Nothing that happens to the store once it is open raises: it is said on stderr."""

    def __init__(self, client: MlflowClient, uri: str, run_id: str) -> None:
        self.uri = uri
        self.run_id = run_id
        self._client = client

    def publish(
        self,
        description: str,
        metrics: Mapping[str, float | None],
        tables: Mapping[str, pd.DataFrame],
        files: list[Path],
        pictures: Mapping[str, Path],
        curves: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Logs results; of a run that has the same ones already, nothing.

        Args:
            description: Markdown, its verdict in the first lines; also what tells new results from old ones.
            metrics: Figures by name.
            tables: What the artifact view shows as tables, by file name.
            files: Further files.
            pictures: PNG files by the name of their chart.
            curves: Figures by name that have a value at every step, from 0.
        """
        description = description[:DESCRIPTION_LIMIT]
        try:
            if self._client.get_run(self.run_id).data.tags.get(DESCRIPTION) == description:
                return
            self._log_metrics({name: [value] for name, value in finite(metrics).items()} | dict(curves or {}))
            for name, frame in tables.items():
                self._log_table(frame, name)
            for key, path in pictures.items():
                self._log_picture(path, key)
            for path in [*files, *pictures.values()]:
                self._client.log_artifact(self.run_id, str(path), "pictures" if path.suffix == ".png" else None)
            self._client.set_tag(self.run_id, DESCRIPTION, description)
        except Exception as error:
            self._say(error)

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run; it may go on later."""
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:
            self._say(error)

    def _log_metrics(self, curves: Mapping[str, Sequence[float]]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(key, value, now, step) for key, values in curves.items() for step, value in enumerate(values)]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def _log_table(self, frame: pd.DataFrame, name: str) -> None:
        there = {file.path for file in self._client.list_artifacts(self.run_id)}
        if name in there:  # `log_table` would add its rows to those that are there
            columns: dict[str, Any] = json.loads(frame.to_json(orient="split", index=False))
            self._client.log_text(self.run_id, json.dumps(columns), name)
        else:
            self._client.log_table(self.run_id, frame, name)

    def _log_picture(self, path: Path, key: str) -> None:
        from PIL import Image

        name = f"{key.replace('/', '~')}+step+"
        earlier = [file.path for file in self._client.list_artifacts(self.run_id, "images") if name in file.path]
        steps = {path.split("+step+")[1].partition("+")[0] for path in earlier}
        with Image.open(path) as image:
            self._client.log_image(self.run_id, image, key=key, step=len(steps))

    def _say(self, error: Exception) -> None:
        say(f"{shown(self.uri)} did not take the results: {first_line(error)}")


def _open(
    uri: str, experiment: Experiment, kind: str, name: str, earlier: str, parent: str
) -> tuple[MlflowClient, str]:
    client = open_client(uri)  # and only then MLflow: it reads how much to say where it is imported
    from mlflow import MlflowException

    if earlier:
        try:
            client.update_run(earlier, status="RUNNING", name=name)
        except MlflowException:
            earlier = ""
    if earlier:
        return client, earlier
    params = experiment.params()
    tags = {"fedmeta.kind": kind, "fedmeta.data": data_name(params), "mlflow.runColor": COLOUR}
    tags |= {PARENT: parent} if parent else {}
    created = client.create_run(experiment_of(client, uri, experiment.tracking.experiment), tags=tags, run_name=name)
    run_id: str = created.info.run_id
    common = {key: value for key, value in params.items() if not key.startswith(VARIED)}
    log_params(client, run_id, common)
    return client, run_id


def annotate(uri: str, run_id: str, tags: Mapping[str, str], killed: bool = False) -> None:
    """Sets tags of a run, and says of one whose process is gone that it was killed; not where no store answers."""
    with suppress(Exception):
        client = open_client(uri)
        if killed:
            client.set_terminated(run_id, "KILLED")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
