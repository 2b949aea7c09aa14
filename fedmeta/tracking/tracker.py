"""MLflow: one run per experiment run, written by the server alone."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from fedmeta.experiment import Tracking
from fedmeta.tracking import results, run_page
from fedmeta.tracking.entries import UNSENT, Dataset, End, Entry, Metric, Model, Tag, read_unsent, write_unsent
from fedmeta.tracking.opening import open_run
from fedmeta.tracking.outbox import Outbox
from fedmeta.tracking.sender import Sender
from fedmeta.tracking.store import checked_uri, first_line, say, shown, within_time

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]


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
        self._outbox: Outbox[Entry] = Outbox(Sender(client, run_id, resumed), self._lost)

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
        client, run_id = within_time(uri, lambda: open_run(uri, settings, params, dataset, folder, resume_run_id))
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
                say(f"the run's {name} could not be made: {first_line(error)}")
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
            say(f"{len(unsent)} entries are lost: {path} cannot be written ({error.strerror or error})")
        else:
            if unsent:
                say(
                    f"{shown(self.uri)} did not take {len(unsent)} entries; they are in {path}; "
                    f"once it is back: fedmeta sync {self._folder}"
                )

    def _metrics(self, round_number: int, metrics: Mapping[str, float]) -> list[Metric]:
        fresh = {key: value for key, value in metrics.items() if self._steps.get(key, -1) < round_number}
        self._steps |= dict.fromkeys(fresh, round_number)
        now = _now_ms()
        return [Metric(key, value, now, int(round_number)) for key, value in fresh.items()]

    def _lost(self, error: Exception) -> None:
        say(f"{shown(self.uri)} does not answer ({first_line(error)}); the run goes on and keeps what it has to send")


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
