"""One trial of a search: Optuna suggests settings, a run with them is scored on validation sites."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import optuna

from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED
from fedmeta.progress import Progress, ProgressCallback, Pruned
from fedmeta.runtime import run
from fedmeta.search.runs import resumable
from fedmeta.search.space import Settings
from fedmeta.search.study import PROBLEM, RUN_ID, SECONDS, SETTINGS, SearchConfig, load_study, places
from fedmeta.tracking.parent_run import annotate

State = Literal["done", "pruned", "failed", "waiting"]
"""Completed, stopped early, failed, or interrupted and waiting to be repeated."""

TrialProgress = Callable[[str, int], ProgressCallback]
"""Returns what takes a trial's progress, given its run's name and its place in the search from 1."""


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: Its place in the search, from 0.
        settings: What was tried.
        state: Its state.
        score: The mean personalized score of validation sites; of a pruned trial, its last one; None where there is
            none.
        rounds: After how many rounds it was pruned; 0 where it was not.
        seconds: Duration of its run; None where it did not complete.
        run_id: Its run.
        problem: Why it failed.
        untuned: Whether the settings are the experiment's own.
    """

    number: int
    settings: Settings
    state: State
    score: float | None
    rounds: int
    seconds: float | None
    run_id: str
    problem: str
    untuned: bool


def run_trial(config: SearchConfig, parent: str, progress: TrialProgress | None = None) -> None:
    """Runs the next trial of a search, one that waits to be repeated first, and records its outcome.

    Args:
        config: The search.
        parent: The MLflow run that shows the trial's; "" = none.
        progress: Returns what takes the trial's progress.

    Raises:
        KeyboardInterrupt: The user stopped it; the trial will be repeated when the search is resumed.
    """
    study = load_study(config)
    objective = partial(_score, config=config, parent=parent, progress=progress)
    study.optimize(objective, n_trials=1, catch=(FedmetaError,))


def _score(trial: optuna.Trial, config: SearchConfig, parent: str, progress: TrialProgress | None) -> float:
    """Returns the mean personalized score of validation sites."""
    settings = {each.key: each.suggest(trial) for each in config.space}
    trial.set_user_attr(SETTINGS, settings)
    trial.set_user_attr(PROBLEM, "")  # a repetition inherits the attributes of the interrupted trial
    watch = _Watch(trial, config.report_every)
    try:
        variant = config.trial_experiment(settings, parent)
        if progress:
            place = places(trial.study.get_trials(deepcopy=False))[trial.number]
            watch.forward = progress(variant.tracking.name, place + 1)
        summary = run(variant, runtime=config.runtime, resume=resumable(variant), report=watch).summary
        score = summary["new_sites"]["personalized"]["mean"]
        if score is None:
            raise FedmetaError("no validation site has a score")
    except Pruned as pruned:
        if watch.run_id and config.experiment.tracking.uri != UNTRACKED:
            note = {"fedmeta.pruned": str(watch.round_number), "mlflow.note.content": f"**Pruned**: {pruned}"}
            annotate(config.experiment.tracking.uri, watch.run_id, note)
        raise optuna.TrialPruned(str(pruned)) from None
    except FedmetaError as error:
        trial.set_user_attr(PROBLEM, str(error))
        raise
    trial.set_user_attr(SECONDS, summary["wall_s"])
    return float(score)


class _Watch:
    """Takes a run's progress: reports its intermediate scores to Optuna, and ends the run where that prunes it."""

    def __init__(self, trial: optuna.Trial, every: int) -> None:
        self.forward: ProgressCallback | None = None
        self.run_id = ""
        self.round_number = 0
        self._trial, self._every = trial, every

    def __call__(self, progress: Progress) -> None:
        if progress.run_id and progress.run_id != self.run_id:
            self.run_id = progress.run_id
            self._trial.set_user_attr(RUN_ID, progress.run_id)
        self._report(progress)
        if self.forward:
            self.forward(progress)

    def _report(self, progress: Progress) -> None:
        number, score = progress.round_number, progress.personalized_score
        # Notes come between a round and its evaluation, with the score of the evaluation before.
        due = self._every and number and number % self._every == 0 and not progress.note
        if not due or score is None or number <= self.round_number or number >= progress.rounds:
            return
        self.round_number = number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a resumed trial reports some rounds again
            self._trial.report(score, number)
        if self._trial.should_prune():
            raise Pruned(f"after round {number} of {progress.rounds} others had done better than {score:.3f}")
