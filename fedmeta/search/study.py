"""A search as it was asked for, and its study in Optuna's store."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from optuna import Study, create_study
from optuna import load_study as load_optuna_study
from optuna import logging as optuna_logging
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fedmeta.experiment import UNTRACKED, Experiment, Scalar
from fedmeta.problems.metric import Metric
from fedmeta.search.samplers import build_pruner, build_sampler, grid_levels, report_every
from fedmeta.search.space import Choices, Dimension, Range, Settings, default_space, describe, rounded, with_settings
from fedmeta.tracking.mlflow_client import SQLITE, sqlite_file
from fedmeta.tracking.parent_run import annotate

STORE = "tuning.db"
"""Optuna's file: every trial of every search, beside the MLflow store."""
LOCK_TIMEOUT_S = 60
"""How long a process waits for others to release Optuna's file."""
SCORE = "score"
"""The study's attribute that holds what trials are scored by."""
SETTINGS, RUN_ID, SECONDS, PROBLEM = "settings", "run_id", "seconds", "problem"
"""Attributes of a trial: what was tried, its run, what that took, and why it failed; empty where it was interrupted."""


@dataclass(frozen=True)
class SearchConfig:
    """A search.

    Attributes:
        experiment: What is tuned; its paths are absolute.
        space: What may vary, and how far.
        trials: How many settings are tried.
        sampler: One of `fedmeta.search.samplers.SAMPLERS`.
        pruner: One of `fedmeta.search.samplers.PRUNERS`.
        seed: Key of the search's own draws.
        workers: How many trials run in parallel.
        runtime: Where each trial runs: "local" or "ray".
    """

    experiment: Experiment
    space: tuple[Dimension, ...]
    trials: int
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    workers: int = 1
    runtime: str = "local"

    @property
    def name(self) -> str:
        """The study's name: the same experiment, space and methods are the same search, also with more trials."""
        parts = [self.experiment.identity(), repr(self.space), self.sampler, self.pruner, self.seed]
        parts += [self.trials] if self.sampler == "grid" else []
        return f"tune-{self.sampler}-{blake2b(json.dumps(parts).encode(), digest_size=6).hexdigest()}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return Path(self.experiment.tracking.folder) / self.name

    @property
    def storage(self) -> str:
        """The address of Optuna's file."""
        mlflow = sqlite_file(self.experiment.tracking.uri)
        return f"{SQLITE}{(mlflow.parent if mlflow else Path(self.experiment.tracking.folder)) / STORE}"

    @property
    def baseline(self) -> Settings:
        """The experiment's own values of what is tuned; empty where one of them lies outside the space."""
        params = self.experiment.params()
        middle = {each.key: each.at(0.5) for each in default_space(self.experiment)}
        settings: Settings = {}
        for each in self.space:
            value = params.get(each.key)
            if value == "auto" and isinstance(each, Range):
                value = middle.get(each.key)
            if value is None or not each.holds(value):
                return {}
            settings[each.key] = rounded(value) if isinstance(value, float) else value
        return settings

    @property
    def first(self) -> Settings:
        """The settings of the first trial: the baseline, unless the sampler's grid holds it anyway."""
        on_grid = self.sampler == "grid" and all(isinstance(each, Choices) for each in self.space)
        return {} if on_grid else self.baseline

    @property
    def total(self) -> int:
        """How many trials it has: of a grid, the largest that fits into the budget."""
        if self.sampler != "grid":
            return self.trials
        return bool(self.first) + math.prod(len(values) for values in self.levels.values())

    @property
    def report_every(self) -> int:
        """The number of rounds between two reports of a trial; 0 where none is pruned."""
        return report_every(self.experiment.server.rounds) if self.pruner != "none" else 0

    @property
    def levels(self) -> dict[str, list[Scalar]]:
        """The values of each key of the sampler's grid; empty for other samplers."""
        return grid_levels(self.space, self.trials - bool(self.first)) if self.sampler == "grid" else {}

    def trial_experiment(self, settings: Settings, parent: str) -> Experiment:
        """Returns the run that scores settings: on validation sites, with its files in the search's folder.

        Args:
            settings: The values to try.
            parent: The MLflow run that shows it; "" = none.

        Raises:
            FedmetaError: The experiment is not possible with these values.
        """
        changed = with_settings(self.experiment, settings)
        how = {"judge": "validation_sites", "every": self.report_every, "local_baseline": "none"}
        evaluation = changed.evaluation.model_copy(update=how)
        name = f"{changed.learner.name} · {describe({k: v for k, v in settings.items() if k != 'learner.name'})}"
        files = {"folder": str(self.folder / "trials"), "name": name, "parent": parent, "site_curves": 0}
        tracking = changed.tracking.model_copy(update=files)
        # Parallel trials share the processors, unless the experiment sets a number.
        threads = changed.runtime.threads or (max(1, (os.cpu_count() or 1) // self.workers) if self.workers > 1 else 0)
        runtime = changed.runtime.model_copy(update={"threads": threads})
        return changed.model_copy(update={"evaluation": evaluation, "tracking": tracking, "runtime": runtime})


def load_study(config: SearchConfig, score: Metric | None = None) -> Study:
    """Returns the search's study, ready for its next trial.

    Args:
        config: The search.
        score: What trials are scored by. Given, a study that does not exist is created, with the baseline as its first
            trial.
    """
    optuna_logging.set_verbosity(optuna_logging.ERROR)
    storage = RDBStorage(config.storage, engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}})
    if score:
        direction = StudyDirection.MAXIMIZE if score.higher_is_better else StudyDirection.MINIMIZE
        study = create_study(storage=storage, study_name=config.name, direction=direction, load_if_exists=True)
        study.set_user_attr(SCORE, score.to_json())
        if config.first:
            study.enqueue_trial(dict(config.first), skip_if_exists=True)
    study = load_optuna_study(study_name=config.name, storage=storage)
    study.pruner = build_pruner(config.pruner, config.experiment.server.rounds)
    known = places(study.get_trials(deepcopy=False))
    study.sampler = build_sampler(config.sampler, config.seed, config.workers, config.levels, known)
    return study


def places(trials: Sequence[FrozenTrial]) -> dict[int, int]:
    """Returns each trial's place in the search by its number: a repetition has that of the interrupted trial."""
    found: dict[int, int] = {}
    repetitions = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        for trial in trials:
            first = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
            repetitions += first is not None
            found[trial.number] = trial.number - repetitions if first is None else found[first]
    return found


def current_trials(study: Study) -> list[FrozenTrial]:
    """Returns the trials in the order of their places; of an interrupted one, its last repetition."""
    trials = study.get_trials(deepcopy=False)
    last = {place: trials[number] for number, place in places(trials).items()}
    return [last[place] for place in sorted(last)]


def was_interrupted(trial: FrozenTrial) -> bool:
    """Returns whether a trial, in a study that no process works on, was neither finished nor failed for a reason."""
    failed = trial.state is TrialState.FAIL and not trial.user_attrs.get(PROBLEM)
    return failed or trial.state is TrialState.RUNNING


def requeue(study: Study, trial: FrozenTrial) -> None:
    """Lets a trial be repeated with the settings that it has, before anything new is tried."""
    if not trial.state.is_finished():
        study.tell(trial.number, state=TrialState.FAIL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)


def requeue_interrupted(config: SearchConfig, study: Study) -> None:
    """Lets every interrupted trial be repeated, and ends its run in MLflow where its process could not."""
    for trial in filter(was_interrupted, current_trials(study)):
        run_id = trial.user_attrs.get(RUN_ID)
        if run_id and trial.state is TrialState.RUNNING and config.experiment.tracking.uri != UNTRACKED:
            annotate(config.experiment.tracking.uri, run_id, {"fedmeta.killed": "repeated"}, killed=True)
        requeue(study, trial)
