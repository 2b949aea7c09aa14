"""What a run writes down: its folder, its MLflow run, its summary."""

from __future__ import annotations

import json
import math
import secrets
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedmeta.adapt.export_meta_model import export_meta_model
from fedmeta.checkpoint import UNFINISHED, Checkpoint, Evaluation
from fedmeta.errors import FedmetaError
from fedmeta.evaluation import sites_frame, summarize
from fedmeta.experiment import UNTRACKED, Experiment
from fedmeta.files import make_folder, write_atomic
from fedmeta.in_force import params_in_force
from fedmeta.messages import EngineReply
from fedmeta.problems import Metric
from fedmeta.tracking.description import data_name
from fedmeta.tracking.mlflow_client import SUMMARY, Dataset
from fedmeta.tracking.run_logger import Tracker
from fedmeta.trust import code_of
from fedmeta.versions import versions
from server import stream
from server.adaptation_schedule import AdaptationSchedule
from server.federation import Federation

FAILURES_FILE = "failures.json"
"""The file of who did not take part in which round, and why."""


STARTED_FROM = "started_from.json"
"""The file of what a run took of an earlier one."""


class RunLogger:
    """Writes a run down: figures by round, evaluations, results.

    Args:
        experiment: The run's description.
        folder: The run's folder; created.
        earlier: The checkpoint that the run resumes from; what tracking has not had of it is sent first.

    Raises:
        FedmetaError: The folder cannot be written.
    """

    def __init__(
        self, experiment: Experiment, folder: Path, earlier: Checkpoint | None, metrics: Sequence[Metric]
    ) -> None:
        self.experiment = experiment
        self.folder = folder
        self.scored_by = metrics
        self.metrics: dict[int, dict[str, float]] = {}
        self.schedule: dict[str, Any] = dict(earlier.schedule) if earlier else {}
        self._earlier = earlier
        self._missed = _missed_before(folder / FAILURES_FILE, earlier)
        _prepare(folder, experiment)
        self.tracker: Tracker | None = None
        tracked = experiment.tracking.uri != UNTRACKED
        self.run_id = earlier.run_id if earlier else "" if tracked else secrets.token_hex(16)

    def start(self, federation: Federation) -> None:
        """Starts the MLflow run and replays metrics logged before the checkpoint.

        Raises:
            FedmetaError: Tracking cannot be reached.
        """
        earlier = self._earlier
        if self.experiment.tracking.uri != UNTRACKED:
            self.tracker = _start_tracker(self.experiment, federation, self.folder, earlier, self.scored_by[0])
            self.run_id = self.tracker.run_id
        if earlier:
            self._replay(earlier, federation)

    def engine(self, choice: EngineReply | None) -> None:
        """Writes down which cohort engine was chosen, and what each took in the trial."""
        if self.tracker and choice:
            tags = {"fedmeta.engine": choice.engine, "fedmeta.engine_budget_bytes": str(choice.budget)}
            tags |= {f"fedmeta.engine_trial_s.{name}": f"{seconds:.6f}" for name, seconds in choice.seconds.items()}
            self.tracker.tags(tags)

    def round(self, number: int, figures: Mapping[str, float]) -> None:
        """Writes down one round's figures."""
        self.metrics[number] = dict(figures)
        if self.tracker:
            self.tracker.round(number, figures)

    def add(self, number: int, figures: Mapping[str, float]) -> None:
        """Writes down further figures of a round."""
        self.metrics[number] = {**self.metrics.get(number, {}), **figures}
        if self.tracker:
            self.tracker.round(number, figures)

    def log_failures(self, number: int, reasons: Mapping[str, str], what: str = "training") -> None:
        """Writes down who did not take part in a round, and why; round 0 is the start.

        Args:
            number: The round.
            reasons: Sites, and why each is missing.
            what: What they were log_failures at: "start", "training" or "evaluation".
        """
        entries = [{"round": number, "what": what, "site": site, "reason": why} for site, why in reasons.items()]
        known = [entry for entry in self._missed if entry["round"] == number]
        fresh = [entry for entry in entries if entry not in known]
        self._missed += fresh
        if fresh:
            _write(self.folder / FAILURES_FILE, json.dumps(self._missed, indent=1))

    def evaluation(
        self, number: int, frame: pd.DataFrame, groups: Mapping[str, Any], schedule: AdaptationSchedule | None = None
    ) -> None:
        """Writes down one evaluation, and how far sites adapted in it where that was chosen."""
        if schedule:
            self.schedule = {"steps": schedule.steps, "rate": schedule.rate, "validation_losses": schedule.losses}
        if self.tracker:
            self.tracker.evaluation(number, frame, groups)
            if schedule:
                self.tracker.round(number, {"schedule/steps": schedule.steps, "schedule/rate": schedule.rate})

    def finish(
        self,
        sites: pd.DataFrame,
        groups: Mapping[str, Any],
        score: Metric,
        totals: Mapping[str, float],
        rounds: int,
        checkpoint: Path,
        privacy: Mapping[str, float],
        held_out: bool,
        steering: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Writes down the results, ends the tracked run, and returns the summary."""
        start = self.folder / STARTED_FROM
        summary: dict[str, Any] = {
            "run_id": self.run_id,
            "learner": self.experiment.learner.name,
            "seed": self.experiment.runtime.seed,
            "rounds": rounds,
            "wall_s": round(totals.get("wall_s", 0.0), 3),
            "bytes_down": int(totals.get("bytes_down", 0)),
            "bytes_up": int(totals.get("bytes_up", 0)),
            "failures": int(totals.get("failures", 0)),
            "score": score.to_json(),
            **({} if held_out else {"held_out": False}),
            **({} if self.experiment.evaluation.judge == "new_sites" else {"judge": self.experiment.evaluation.judge}),
            **groups,
            **({"schedule": self.schedule} if self.schedule else {}),
            **({"privacy": dict(privacy)} if privacy else {}),
            **({"started_from": json.loads(start.read_text())} if start.is_file() else {}),
            **steering,
            "versions": versions(),
            "checkpoint": str(checkpoint),
        }
        summary = _without_nan(summary)
        _write(self.folder / SUMMARY, json.dumps(summary))
        if self.tracker:
            files = [self.folder / name for name in (SUMMARY, FAILURES_FILE, "experiment.toml")]
            artifacts = [checkpoint, *(file for file in files if file.exists())]
            export = partial(export_meta_model, checkpoint, self.folder, code_of(self.experiment))
            self.tracker.finish(summary, sites, artifacts, export, self.experiment.tracking.model)
        else:
            _write(self.folder / "sites.parquet", sites.to_parquet(index=False))
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        return summary

    def keep_start(self, facts: Mapping[str, Any]) -> None:
        """Keeps what the run took of an earlier one, for its summary, also where the run is resumed."""
        _write(self.folder / STARTED_FROM, json.dumps(facts))

    def stop(self, status: Literal["FAILED", "KILLED"]) -> None:
        """Ends the tracked run before its time, with the failures in it."""
        if self.tracker:
            self.tracker.stop(status, [path for path in (self.folder / FAILURES_FILE,) if path.exists()])

    def _replay(self, earlier: Checkpoint, federation: Federation) -> None:
        for number, figures in earlier.metrics.items():
            self.round(number, figures)
        for evaluation in earlier.evaluations:
            frame = evaluation_frame(self.experiment, federation, evaluation, self.scored_by)
            last = evaluation is earlier.evaluations[-1] and earlier.finished
            schedule = _schedule_of(earlier.schedule) if last and earlier.schedule else None
            self.evaluation(evaluation.round_number, frame, summarize(frame, self.scored_by), schedule)


def make_run_folder(folder: Path) -> None:
    """Creates a run's folder; raises `FedmetaError` where that is not possible."""
    try:
        make_folder(folder)
    except OSError as error:
        raise FedmetaError(f"[tracking] folder: cannot write {folder}: {error.strerror or error}") from error


def _prepare(folder: Path, experiment: Experiment) -> None:
    try:
        make_folder(folder)
        (folder / UNFINISHED).touch()
        write_atomic(folder / "experiment.toml", experiment.to_toml().encode())
    except OSError as error:
        raise FedmetaError(f"[tracking] folder: cannot write {folder}: {error.strerror or error}") from error


def _write(path: Path, content: str | bytes) -> None:
    try:
        write_atomic(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise FedmetaError(f"{path}: cannot be written: {error.strerror or error}") from error


def _schedule_of(entries: Mapping[str, Any]) -> AdaptationSchedule:
    return AdaptationSchedule(entries["steps"], entries["rate"], entries["validation_losses"])


def _start_tracker(
    experiment: Experiment, federation: Federation, folder: Path, earlier: Checkpoint | None, score: Metric
) -> Tracker:
    dataset = _dataset(experiment, federation)
    resumed = earlier.run_id if earlier else None
    try:
        return Tracker.start(experiment.tracking, params_in_force(experiment), folder, dataset, resumed, score)
    except FedmetaError:
        if not earlier:
            remove_unused(folder)
        raise


def _missed_before(path: Path, earlier: Checkpoint | None) -> list[dict[str, Any]]:
    """Returns the failures of each round up to the checkpoint; later rounds come a second time."""
    if earlier is None or not path.exists():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())
        return [entry for entry in entries if entry["round"] <= earlier.round_number]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedmetaError(f"{path}: not the list of failures by round; move it away to continue") from error


def remove_unused(folder: Path) -> None:
    """Removes the folder of a run that never began, and the folder of all runs where it was the first."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def evaluation_frame(
    experiment: Experiment,
    federation: Federation,
    evaluation: Evaluation,
    metrics: Sequence[Metric],
    subgroups: Sequence[str] = (),
) -> pd.DataFrame:
    """Returns an evaluation as a frame with one row per site (see `fedmeta.evaluation.sites_frame`)."""
    sites = evaluation.sites
    train_rows, test_rows = stream.rows_at(experiment, federation, sites, evaluation.round_number)
    return sites_frame(
        [federation.names[site] for site in sites],
        [federation.kind(site) for site in sites],
        train_rows.tolist(),
        test_rows.tolist(),
        evaluation,
        metrics,
        subgroups,
    )


def new_folder(experiment: Experiment) -> Path:
    """Returns a folder for a new run, named after learner, data, seed and time."""
    own = experiment.problem.name.rpartition(":")[2] if ":" in experiment.problem.name else ""
    parts = (experiment.learner.name, own or experiment.data.source, str(experiment.runtime.seed))
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    name = "-".join((*parts, moment, secrets.token_hex(2))).replace(":", ".").replace("/", ".")
    return Path(experiment.tracking.folder) / name


def _dataset(experiment: Experiment, federation: Federation) -> Dataset:
    """Returns what MLflow lists as the run's data; the digest is over sites and their sizes, for rows stay there."""
    content = blake2b(digest_size=16)
    known = (federation.names, federation.classes, federation.features, federation.shape)
    content.update(repr((*known, federation.categories) if federation.categories else known).encode())
    content.update(federation.train_rows.tobytes() + federation.test_rows.tobytes())
    source = experiment.problem.name if ":" in experiment.problem.name else experiment.data.path
    source = source or experiment.data.source
    return Dataset(
        name=data_name(experiment.params()), source=source, digest=content.hexdigest(), sites=len(federation.names)
    )


def _without_nan(value: Any) -> Any:
    """Returns a JSON value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
