"""MLflow: one run per experiment run, written by the server alone. The only file that imports MLflow.

MLflow is imported where a run starts and not with this module, which therefore costs nothing to import.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Tracking
from fedmeta.tracking import experiment_page, results, run_page
from fedmeta.tracking.entries import (
    Artifact,
    Dataset,
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
from fedmeta.tracking.outbox import Outbox, deliver
from fedmeta.tracking.store import (
    MLFLOW_DEFAULTS,
    artifact_folder,
    checked_uri,
    create_sqlite,
    first_line,
    shown,
    within_time,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]
PARAMS_PER_BATCH = 100
LONGEST_PARAM = 6000
UNSENT = "unsent.jsonl"
FOLDER_TAG = "fedmeta.folder"
"""The tag that names the run's folder, which is known before MLflow's id of the run is."""


class Tracker:
    """One MLflow run. Nothing that happens to the store after `start` stops the training or slows it."""

    def __init__(
        self, client: "MlflowClient", uri: str, run_id: str, folder: Path, site_curves: int, resumed: bool
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._folder = folder
        self._site_curves = site_curves
        self._suffixes: dict[str, str] | None = None
        self._of_many = False
        self._steps: dict[str, int] = {}
        self._outbox: Outbox[Entry] = Outbox(_Sender(client, run_id, resumed), self._lost)

    @classmethod
    def start(
        cls,
        settings: Tracking,
        params: Mapping[str, Any],
        folder: Path,
        dataset: Dataset | None = None,
        resume_run_id: str | None = None,
    ) -> "Tracker":
        """Opens the store and a run in it, new or resumed.

        Args:
            settings: the experiment's section [tracking].
            params: the whole experiment as flat "section.key" values.
            folder: the run's folder, for the files that go up as artifacts and for what could not be sent.
            dataset: the data to list as the run's input.
            resume_run_id: the MLflow run to go on with; what `folder` holds unsent of it goes first. Empty where it is
                not known whether the run was opened before the process died: then it is looked for.

        Raises:
            FedmetaError: the store cannot be reached or written, or has no such run.
        """
        uri = checked_uri(settings.uri)
        client, run_id = within_time(uri, lambda: _open(uri, settings, params, dataset, folder, resume_run_id))
        tracker = cls(client, uri, run_id, folder, settings.site_curves, resume_run_id is not None)
        tracker._of_many = bool(settings.parent)
        unsent_id, unsent = read_unsent(folder / UNSENT)
        if unsent_id == run_id:
            tracker._outbox.put(entry for entry in unsent if not isinstance(entry, End))
        return tracker

    def round(self, round_number: int, metrics: Mapping[str, float | None]) -> None:
        """Queues a round's metrics under their full names; takes microseconds."""
        self._outbox.put(self._metrics(round_number, run_page.finite(metrics)))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Queues tags of the run."""
        self._outbox.put(Tag(key, value) for key, value in tags.items())

    def evaluation(self, round_number: int, sites: pd.DataFrame, groups: Mapping[str, Any]) -> None:
        """Queues an evaluation, the groups' summaries and the chosen sites' curves, and has everything sent.

        Args:
            round_number: the round that was evaluated; 0 is before training.
            sites: one row per site, as `fedmeta.tracking.run_page` describes it.
            groups: summaries of "new_sites" and "training_sites".
        """
        if self._suffixes is None:
            self._suffixes = run_page.curves(sites, self._site_curves)
        metrics = run_page.evaluation_metrics(sites, groups, self._suffixes)
        self._outbox.put(self._metrics(round_number, metrics), now=True)

    def finish(
        self,
        summary: Mapping[str, Any],
        sites: pd.DataFrame,
        artifacts: Sequence[Path] = (),
        model: Callable[[], Path] | None = None,
        registered: str = "",
    ) -> list[Entry]:
        """Logs the results, the pictures and the artifacts, and ends the run. Never raises for the store's sake.

        Args:
            summary: the run's JSON object.
            sites: every evaluation with a row per site, told apart by `round`; the last one is the result.
            artifacts: further files and folders to upload, such as the checkpoint and the experiment file.
            model: writes the run's model in MLflow's form and returns its folder.
            registered: the name that the model is registered under; "" = none.

        Returns:
            What could not be sent; the run's folder holds it as JSON lines.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._outbox.put(self._metrics(0, run_page.final_metrics(summary, sites)))
        self._outbox.put([Tag("mlflow.note.content", run_page.description(summary, sites))])

        def handed_on(sites: pd.DataFrame, folder: Path) -> list[Entry]:
            return [Model(str(model().absolute()), registered)] if model else []

        makers = {"tables": results.tables}
        if not self._of_many:  # nobody looks at a trial's pictures or serves its model, and they take seconds
            makers |= {"drawings": results.drawings, "model": handed_on}
        for name, make in makers.items():
            try:
                self._outbox.put(make(sites, self._folder))
            except Exception as error:
                # A training that went well does not end over a picture of it.
                _say(f"the run's {name} could not be made: {first_line(error)}")
        self._outbox.put(results.artifact(path) for path in artifacts)
        return self.stop("FINISHED")

    def stop(self, status: Status, artifacts: Sequence[Path] = ()) -> list[Entry]:
        """Ends the run with what it has logged and further files; returns what could not be sent, as `finish` does."""
        self._outbox.put(results.artifact(path) for path in artifacts)
        self._outbox.put([End(status, _now_ms())])
        try:
            self._outbox.close()
        finally:
            unsent = self._outbox.pending()
            self._keep(unsent)
        return unsent

    def _keep(self, unsent: list[Entry]) -> None:
        """Writes what could not be sent into the run's folder, and says how it gets to the store later."""
        path = self._folder / UNSENT
        try:
            write_unsent(path, self.run_id, unsent)
        except OSError as error:
            _say(f"{len(unsent)} entries are lost: {path} cannot be written ({error.strerror or error})")
        else:
            if unsent:
                _say(
                    f"{shown(self.uri)} did not take {len(unsent)} entries; they are in {path}; "
                    f"once it is back: fedmeta sync {self._folder}"
                )

    def _metrics(self, round_number: int, metrics: Mapping[str, float]) -> list[Metric]:
        fresh = {key: value for key, value in metrics.items() if self._steps.get(key, -1) < round_number}
        self._steps |= dict.fromkeys(fresh, round_number)
        now = _now_ms()
        return [Metric(key, value, now, int(round_number)) for key, value in fresh.items()]

    def _lost(self, error: Exception) -> None:
        _say(f"{shown(self.uri)} does not answer ({first_line(error)}); the run goes on and keeps what it has to send")


class _Sender:
    """Sends entries of one kind to a run; to send them again changes nothing."""

    def __init__(self, client: "MlflowClient", run_id: str, resumed: bool) -> None:
        self._client = client
        self._run_id = run_id
        self._resumed = resumed
        self._logged: dict[str, dict[int, float]] = {}

    def __call__(self, entries: list[Entry]) -> None:
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
                    _say(problem)
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
        FedmetaError: the store cannot be reached.
    """
    run_id, entries = read_unsent(folder / UNSENT)
    uri = checked_uri(uri)
    sender = within_time(uri, lambda: _Sender(open_client(uri), run_id, resumed=True))
    left, _ = deliver(entries, sender)
    write_unsent(folder / UNSENT, run_id, left)
    return left


def open_client(uri: str) -> "MlflowClient":
    """Returns a client of a store, set to fail at once and quietly: whoever uses it tries again."""
    for key, value in MLFLOW_DEFAULTS.items():
        os.environ.setdefault(key, value)
    from mlflow import MlflowClient

    create_sqlite(uri, lambda new: MlflowClient(new).search_experiments(max_results=1))
    return MlflowClient(uri)


def _open(
    uri: str,
    settings: Tracking,
    params: Mapping[str, Any],
    dataset: Dataset | None,
    folder: Path,
    resume_run_id: str | None,
) -> tuple["MlflowClient", str]:
    client = open_client(uri)
    if resume_run_id:
        client.update_run(resume_run_id, status="RUNNING")
        return client, resume_run_id
    from mlflow.entities import Param

    experiment_id = experiment_of(client, uri, settings.experiment)
    run_id = _begun_for(client, experiment_id, folder) if resume_run_id is not None else None
    if run_id is None:
        tags = {**run_page.tags(params), FOLDER_TAG: folder.name}
        name = settings.name or run_page.run_name(params)
        run_id = str(client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    entries = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in params.items()]
    for start in range(0, len(entries), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=entries[start : start + PARAMS_PER_BATCH])
    if dataset is not None:
        _log_dataset(client, run_id, dataset)
    return client, run_id


def _begun_for(client: "MlflowClient", experiment_id: str, folder: Path) -> str | None:
    """Returns the run that was created for a folder, where its process died before it could write down which."""
    runs = client.search_runs([experiment_id], filter_string=f"tags.{FOLDER_TAG} = '{folder.name}'")
    return str(runs[0].info.run_id) if runs else None


def experiment_of(client: "MlflowClient", uri: str, name: str) -> str:
    """Returns the experiment's id; its artifacts lie beside a database, wherever the process runs."""
    from mlflow import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            created = client.create_experiment(name, artifact_folder(uri), tags=experiment_page.experiment_tags())
            return str(created)
        except MlflowException:
            # Another run may have created it meanwhile.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise FedmetaError(f'tracking.experiment "{name}" was deleted in {shown(uri)}; restore it or name another')
    if experiment_page.VIEW_TAG not in experiment.tags:
        client.set_experiment_tag(experiment.experiment_id, experiment_page.VIEW_TAG, experiment_page.view())
    return str(experiment.experiment_id)


def _log_dataset(client: "MlflowClient", run_id: str, dataset: Dataset) -> None:
    from mlflow import entities

    source, profile = json.dumps({"path": dataset.source}), json.dumps({"sites": dataset.sites})
    logged = entities.Dataset(dataset.name, dataset.digest, "local", source, profile=profile)
    client.log_inputs(
        run_id, datasets=[entities.DatasetInput(logged, [entities.InputTag("mlflow.data.context", "federation")])]
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _say(message: str) -> None:
    print(f"fedmeta: tracking: {message}", file=sys.stderr)
