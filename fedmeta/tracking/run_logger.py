"""A run in progress as an MLflow run, written by the server alone."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from fedmeta.experiment import Tracking
from fedmeta.problems.metric import Metric, metric_of
from fedmeta.tracking import description, metrics
from fedmeta.tracking.async_queue import AsyncQueue
from fedmeta.tracking.events import (
    UNSENT,
    End,
    Event,
    EventSender,
    MetricValue,
    Model,
    Picture,
    Table,
    Tag,
    artifact,
    read_unsent,
    write_unsent,
)
from fedmeta.tracking.experiment_view import PICTURES, SITES_PICTURE
from fedmeta.tracking.mlflow_client import (
    SITES,
    Dataset,
    checked_uri,
    experiment_of,
    log_dataset,
    log_notice,
    log_params,
    open_client,
    reason_of,
    with_timeout,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

FOLDER_TAG = "fedmeta.folder"
"""The tag that names the run's folder, which is known before MLflow's id of the run is."""
SITE_TABLE = "per_site.json"


class Tracker:
    """One MLflow run. Whatever happens to the store after `start`, training neither stops nor waits.

    Args:
        client: The store's client.
        uri: The store, as `checked_uri` returns it.
        run_id: The run.
        folder: The run's folder, for files that become artifacts and for what could not be sent.
        settings: The experiment's section [tracking].
        resumed: Whether the run was logged to before.
    """

    def __init__(
        self, client: MlflowClient, uri: str, run_id: str, folder: Path, settings: Tracking, resumed: bool
    ) -> None:
        self.uri = uri
        self.run_id = run_id
        self._folder = folder
        self._settings = settings
        self._suffixes: dict[str, str] | None = None
        self._steps: dict[str, int] = {}
        self._queue: AsyncQueue[Event] = AsyncQueue(EventSender(client, run_id, resumed), self._on_failure)

    @classmethod
    def start(
        cls,
        settings: Tracking,
        params: Mapping[str, Any],
        folder: Path,
        dataset: Dataset | None = None,
        resume_run_id: str | None = None,
        score: Metric | None = None,
    ) -> Tracker:
        """Opens the store and a run in it, new or resumed.

        Args:
            settings: The experiment's section [tracking].
            params: The whole experiment as flat "section.key" values.
            folder: The run's folder.
            dataset: The data to list as the run's input.
            resume_run_id: The MLflow run to resume; what `folder` holds unsent of it is sent first. Empty where it is
                unknown whether the run was opened before the process died: then it is searched for.
            score: The run's score, by which a new experiment sorts its runs.

        Raises:
            FedmetaError: The store cannot be reached or written, or has no such run.
        """
        uri = checked_uri(settings.uri)

        def open_run() -> tuple[MlflowClient, str]:
            client = open_client(uri)
            if resume_run_id:
                client.update_run(resume_run_id, status="RUNNING")
                return client, resume_run_id
            experiment_id = experiment_of(client, uri, settings.experiment, score, description.data_name(params))
            known = _run_of(client, experiment_id, folder) if resume_run_id is not None else ""
            run_id = known or _create(client, experiment_id, settings.name, params, folder)
            log_params(client, run_id, params)
            if dataset is not None:
                log_dataset(client, run_id, dataset)
            return client, run_id

        client, run_id = with_timeout(uri, open_run)
        tracker = cls(client, uri, run_id, folder, settings, resume_run_id is not None)
        unsent_id, unsent = read_unsent(folder / UNSENT)
        if unsent_id == run_id:
            tracker._queue.put(event for event in unsent if not isinstance(event, End))
        return tracker

    def round(self, round_number: int, figures: Mapping[str, float | None]) -> None:
        """Queues a round's metrics under their full names; takes microseconds."""
        self._queue.put(self._values(round_number, metrics.finite(figures)))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Queues tags of the run."""
        self._queue.put(Tag(key, value) for key, value in tags.items())

    def evaluation(self, round_number: int, sites: pd.DataFrame, groups: Mapping[str, Any]) -> None:
        """Queues an evaluation, the groups' summaries and the chosen sites' curves, and has everything sent.

        Args:
            round_number: The round that was evaluated; 0 is before training.
            sites: One row per site (see `fedmeta.evaluation.sites_frame`).
            groups: Summaries of "new_sites" and "training_sites".
        """
        if self._suffixes is None:
            self._suffixes = metrics.curves(sites, self._settings.site_curves)
        found = metrics.evaluation_metrics(sites, groups, self._suffixes)
        self._queue.put(self._values(round_number, found), now=True)

    def finish(
        self,
        summary: Mapping[str, Any],
        sites: pd.DataFrame,
        artifacts: Sequence[Path] = (),
        model: Callable[[], Path | None] | None = None,
        registered: str = "",
    ) -> list[Event]:
        """Logs the results, the pictures and the artifacts, and ends the run. The store cannot make it raise.

        Args:
            summary: The run's JSON object.
            sites: Every evaluation with a row per site, distinguished by `round`; the last one is the result.
            artifacts: Further files and folders to upload, such as the checkpoint and the experiment file.
            model: Writes the run's model in MLflow's form and returns its folder; None where it has no such form.
            registered: The name that the model is registered under; "" = none.

        Returns:
            What could not be sent; the run's folder holds it as JSON lines.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._queue.put(self._values(0, metrics.final_metrics(summary, sites)))
        self._queue.put([Tag("mlflow.note.content", description.description(summary, sites))])
        self.tags(description.score_tags(summary))
        makers: dict[str, Callable[[], list[Event]]] = {"tables": lambda: self._tables(sites)}
        # With secure aggregation there is no row of a site, and so nothing to draw.
        if not self._settings.parent and len(
            sites
        ):  # a trial's pictures and model take seconds, and are never looked at
            makers["pictures"] = lambda: self._pictures(summary, sites)
            if model:
                makers["model"] = lambda: [Model(str(made.absolute()), registered) for made in (model(),) if made]
        for name, make in makers.items():
            try:
                self._queue.put(make())
            except Exception as error:
                # A finished training must not fail because of a picture of it.
                log_notice(f"the run's {name} could not be made: {reason_of(error)}")
        self._queue.put(artifact(path) for path in artifacts)
        return self.stop("FINISHED")

    def stop(self, status: Literal["FINISHED", "FAILED", "KILLED"], artifacts: Sequence[Path] = ()) -> list[Event]:
        """Ends the run with what it has logged and further files; returns what could not be sent, as `finish` does."""
        self._queue.put(artifact(path) for path in artifacts)
        self._queue.put([End(status, _now_ms())])
        try:
            self._queue.close()
        finally:
            unsent = self._queue.pending()
            self._keep(unsent)
        return unsent

    def _tables(self, sites: pd.DataFrame) -> list[Event]:
        """Writes the results for MLflow to show as a table, and every evaluation to be read."""
        results, history = self._folder / SITE_TABLE, self._folder / SITES
        metrics.per_site(sites).to_json(results, orient="split", index=False)
        sites.to_parquet(history, index=False)
        return [Table(str(results.absolute())), artifact(history)]

    def _pictures(self, summary: Mapping[str, Any], sites: pd.DataFrame) -> list[Event]:
        """Draws the run; its sites, as wide as a card, and its problem's own pictures stand among MLflow's charts."""
        from fedmeta.tracking import plots

        folder, last = self._folder / plots.FOLDER, int(sites["round"].max())
        score, own = metric_of(summary["score"]), plots.own_pictures(folder)
        plots.save(sites, score, folder)
        card = plots.write(plots.site_card(sites, score), folder / f"{plots.CARD_NAME}.png")
        keys = metrics.metric_suffixes(file.stem for file in own)
        shown = [Picture(str(card.absolute()), SITES_PICTURE, last)]
        shown += [Picture(str(file.absolute()), f"{PICTURES}/{keys[file.stem]}", last) for file in own]
        return [*shown, artifact(folder)]

    def _keep(self, unsent: list[Event]) -> None:
        """Writes what could not be sent into the run's folder."""
        path = self._folder / UNSENT
        try:
            write_unsent(path, self.run_id, unsent)
        except OSError as error:
            log_notice(f"{len(unsent)} events are lost: {path} cannot be written ({error.strerror or error})")
        else:
            if unsent:
                log_notice(
                    f"{self.uri} did not take {len(unsent)} events; they are in {path}; "
                    f"once it is back: fedmeta sync {shlex.quote(str(self._folder))}"
                )

    def _values(self, round_number: int, found: Mapping[str, float]) -> list[MetricValue]:
        fresh = {key: value for key, value in found.items() if self._steps.get(key, -1) < round_number}
        self._steps |= dict.fromkeys(fresh, round_number)
        now = _now_ms()
        return [MetricValue(key, value, now, int(round_number)) for key, value in fresh.items()]

    def _on_failure(self, error: Exception) -> None:
        log_notice(f"{self.uri} does not take events ({reason_of(error)}); training continues and keeps them")


def _run_of(client: MlflowClient, experiment_id: str, folder: Path) -> str:
    """Returns the run that was created for a folder by a process that died before it could note which; "" = none."""
    runs = client.search_runs([experiment_id], filter_string=f"tags.{FOLDER_TAG} = '{folder.name}'")
    return str(runs[0].info.run_id) if runs else ""


def _create(client: MlflowClient, experiment_id: str, name: str, params: Mapping[str, Any], folder: Path) -> str:
    tags = {**description.tags(params), FOLDER_TAG: folder.name}
    created = client.create_run(experiment_id, tags=tags, run_name=name or description.run_name(params))
    return str(created.info.run_id)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
