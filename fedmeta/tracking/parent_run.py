"""An MLflow run about other runs: a comparison or a search, with its figures, tables and pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd

from fedmeta.experiment import UNTRACKED, Experiment, without_user_info
from fedmeta.tables import plain
from fedmeta.tracking import experiment_view
from fedmeta.tracking.async_queue import batches
from fedmeta.tracking.description import DESCRIPTION_LIMIT, data_name
from fedmeta.tracking.metrics import finite
from fedmeta.tracking.mlflow_client import (
    checked_uri,
    experiment_of,
    log_notice,
    log_params,
    log_picture,
    log_table,
    open_client,
    picture_steps,
    reason_of,
    with_timeout,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

DESCRIPTION = "mlflow.note.content"
VARIED = ("learner.", "tracking.", "runtime.seed", "evaluation.judge")
"""Params that differ between the runs below this one, or that describe where they are and not what they are."""
VERDICTS = "fedmeta.verdict."
"""How the tags of an experiment begin that hold the verdict on each data set."""
COLOUR = "#222222"
KEPT = "mlflow.json"
"""The file of a folder that names its run."""


@contextmanager
def parent_run(
    experiment: Experiment, kind: Literal["comparison", "search"], name: str, folder: Path, parent: str = ""
) -> Iterator[ParentRun | None]:
    """Opens the store and a run in it, a new one or the one that the folder names, and ends the run with the block.

    Args:
        experiment: What the runs below it have in common.
        kind: What it is; becomes a tag.
        name: The run's name: what is compared, or searched for.
        folder: Keeps which run this is, so that a command that is repeated finds it.
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
    address = without_user_info(experiment.tracking.uri)
    known = json.loads(kept.read_text()) if kept.exists() else {}
    earlier = str(known.get("run_id", "")) if known.get("uri") == address else ""
    uri = checked_uri(experiment.tracking.uri)
    client, run_id = with_timeout(uri, lambda: _open(uri, experiment, kind, name, earlier, parent))
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"run_id": run_id, "uri": address}))
    run = ParentRun(client, uri, run_id)
    try:
        yield run
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
        raise
    run.end("FINISHED")


class ParentRun:
    """One run of the store. Once it is open, failures of the store become notices on stderr."""

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
        """Logs results, unless the run has them already.

        Args:
            description: Markdown, its verdict in the first lines; results with the same description are the same.
            metrics: Figures by name.
            tables: What the artifact view shows as tables, by file name.
            files: Further files.
            pictures: PNG files by the name of their chart.
            curves: Figures by name that have a value at every step, from 0.
        """
        client, run_id = self._client, self.run_id
        description = description[:DESCRIPTION_LIMIT]
        try:
            if client.get_run(run_id).data.tags.get(DESCRIPTION) == description:
                return
            self._log_metrics({name: [value] for name, value in finite(metrics).items()} | dict(curves or {}))
            for name, frame in tables.items():
                log_table(client, run_id, frame, name)
            for key, path in pictures.items():
                log_picture(client, run_id, path, key, step=len(picture_steps(client, run_id, key)))
            for path in [*files, *pictures.values()]:
                client.log_artifact(run_id, str(path), "pictures" if path.suffix == ".png" else None)
            client.set_tag(run_id, DESCRIPTION, description)
        except Exception as error:
            self._notice(error)

    def adopt(self, run_ids: Iterable[str]) -> None:
        """Shows runs under this one."""
        try:
            for run_id in run_ids:
                self._client.set_tag(run_id, "mlflow.parentRunId", self.run_id)
        except Exception as error:
            self._notice(error)

    def announce(self, verdict: str, data: str) -> None:
        """Puts the verdict on a data set, with a link to this run, into the experiment's description.

        It stands there for each data set; a description that a person wrote stays as it is.
        """
        try:
            experiment_id = self._client.get_run(self.run_id).info.experiment_id
            tags = dict(self._client.get_experiment(experiment_id).tags)
            link = f"#/experiments/{experiment_id}/runs/{self.run_id}?workflowType=machine_learning"
            key = f"{VERDICTS}{experiment_view.view_of(data)}"
            new = tags | {key: f"{plain(data)}: [{verdict}]({link})"}
            if tags.get(DESCRIPTION, "") != _verdicts(tags):
                return
            for name, value in {key: new[key], DESCRIPTION: _verdicts(new)}.items():
                self._client.set_experiment_tag(experiment_id, name, value)
        except Exception as error:
            self._notice(error)

    def end(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Ends the run; it may be resumed."""
        try:
            self._client.set_terminated(self.run_id, status)
        except Exception as error:
            self._notice(error)

    def _log_metrics(self, curves: Mapping[str, Sequence[float]]) -> None:
        from mlflow import entities

        now = time.time_ns() // 1_000_000
        for batch in batches(
            entities.Metric(key, value, now, step)
            for key, values in curves.items()
            for step, value in enumerate(values)
        ):
            self._client.log_batch(self.run_id, metrics=batch)

    def _notice(self, error: Exception) -> None:
        log_notice(f"{self.uri} did not take the results: {reason_of(error)}")


def _open(
    uri: str, experiment: Experiment, kind: str, name: str, earlier: str, parent: str
) -> tuple[MlflowClient, str]:
    from fedmeta.in_force import params_in_force  # it imports torch, which takes seconds

    client = open_client(uri)  # before any import of MLflow, which reads its log level when it is imported
    from mlflow import MlflowException

    if earlier:
        with suppress(MlflowException):
            client.update_run(earlier, status="RUNNING", name=name)
            return client, earlier
    params = params_in_force(experiment)
    tags = {experiment_view.KIND_TAG: kind, experiment_view.DATA_TAG: data_name(params), "mlflow.runColor": COLOUR}
    tags |= {"mlflow.parentRunId": parent} if parent else {}
    created = client.create_run(experiment_of(client, uri, experiment.tracking.experiment), tags=tags, run_name=name)
    run_id: str = created.info.run_id
    log_params(client, run_id, {key: value for key, value in params.items() if not key.startswith(VARIED)})
    return client, run_id


def _verdicts(tags: Mapping[str, str]) -> str:
    """Returns the description of an experiment: a line for each data set that was compared on."""
    return "\n\n".join(tags[key] for key in sorted(tags) if key.startswith(VERDICTS))[:DESCRIPTION_LIMIT]


def annotate(uri: str, run_id: str, tags: Mapping[str, str], killed: bool = False) -> None:
    """Sets tags of a run, and marks one whose process died as killed; does nothing where no store answers."""
    with suppress(Exception):
        client = open_client(checked_uri(uri))
        if killed:
            client.set_terminated(run_id, "KILLED")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)


def add_results(
    uri: str, run_id: str, metrics: Mapping[str, float], pictures: Mapping[str, Path], files: Sequence[Path]
) -> None:
    """Adds figures, pictures and files to a run that has ended; a store that does not take them is a notice on stderr.

    Args:
        uri: The store.
        run_id: The run.
        metrics: Figures by name.
        pictures: PNG files by the name of their chart.
        files: Further files.
    """
    try:
        client = open_client(checked_uri(uri))
        for key, value in metrics.items():
            client.log_metric(run_id, key, value)
        for key, path in pictures.items():
            log_picture(client, run_id, path, key, step=len(picture_steps(client, run_id, key)))
        for path in [*files, *pictures.values()]:
            client.log_artifact(run_id, str(path), "pictures" if path.suffix == ".png" else None)
    except Exception as error:
        log_notice(f"{uri} did not take the results: {reason_of(error)}")
