"""One trial of a search: settings are drawn, a run with them is judged on validation sites, and the score is told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna import Study, Trial, create_study
from optuna import logging as optuna_logging
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from fedmeta import checkpoint
from fedmeta.errors import FedmetaError
from fedmeta.experiment import UNTRACKED, Experiment
from fedmeta.problems.metric import Metric
from fedmeta.progress import Progress, Pruned
from fedmeta.runtime import run
from fedmeta.tracking.summary_run import annotate
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.samplers import distributions, interval, pruner_of, sampler_of
from fedmeta.tuning.space import Dimension, Range, Settings, rounded

SCORE_ATTRIBUTE = "score"
"""The study's attribute that names what settings are scored by."""

PATIENCE_S = 60
"""How long a process waits for the others to let go of Optuna's file."""


def opened(plan: Plan, score: Metric | None = None) -> Study:
    """Returns the search's study in Optuna's file; begins it where it is not there.

    Args:
        plan: The search.
        score: What settings are scored by; needed where the study begins.
    """
    optuna_logging.set_verbosity(optuna_logging.ERROR)
    Path(plan.storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    storage = RDBStorage(plan.storage, engine_kwargs={"connect_args": {"timeout": PATIENCE_S}})
    study = create_study(
        storage=storage,
        study_name=plan.name,
        sampler=sampler_of(plan.sampler, plan.seed, plan.workers),
        pruner=pruner_of(plan.pruner, plan.experiment.server.rounds),
        direction="maximize" if score is None or score.higher_is_better else "minimize",
        load_if_exists=True,
    )
    if score is not None:
        study.set_user_attr(SCORE_ATTRIBUTE, score.name)
    return study


def settings_of(parameters: Mapping[str, Any], space: tuple[Dimension, ...]) -> Settings:
    """Returns what a trial's parameters mean, numbers rounded as `Range` rounds them."""
    return {
        each.key: rounded(parameters[each.key]) if isinstance(each, Range) and not each.whole else parameters[each.key]
        for each in space
    }


def attempt(plan: Plan, parent: str) -> None:
    """Tries the next settings of a search, those of an interrupted trial first, and tells the study what came of it.

    Args:
        plan: The search.
        parent: Its MLflow run; "" = none.

    Raises:
        KeyboardInterrupt: The user stopped it; the trial waits for the search to go on.
    """
    study = opened(plan)
    trial = study.ask(distributions(plan.space))
    watch = _Watch(trial, interval(plan.experiment.server.rounds) if plan.pruner != "none" else 0)
    try:
        variant = plan.variant(settings_of(trial.params, plan.space), parent)
        summary = run(variant, runtime=plan.runtime, resume=_unfinished(variant), report=watch).summary
        score = summary["new_sites"]["personalized"]["mean"]
        if score is None:
            raise FedmetaError("no validation site has a score")
        trial.set_user_attr("seconds", summary["wall_s"])
        study.tell(trial, score)
    except Pruned as pruned:
        study.tell(trial, state=TrialState.PRUNED)
        if watch.run_id and plan.experiment.tracking.uri != UNTRACKED:
            note = {"fedmeta.pruned": str(watch.round_number), "mlflow.note.content": f"**Given up early**: {pruned}"}
            annotate(plan.experiment.tracking.uri, watch.run_id, note)
    except FedmetaError as error:
        trial.set_user_attr("problem", str(error))
        study.tell(trial, state=TrialState.FAIL)
    except BaseException:
        put_back(study, trial.number)
        raise


def bury(plan: Plan, trial: FrozenTrial) -> None:
    """Says in MLflow that the run of a trial whose process is gone was killed; the trial itself is tried again."""
    run_id = trial.user_attrs.get("run_id")
    if run_id and plan.experiment.tracking.uri != UNTRACKED:
        annotate(plan.experiment.tracking.uri, run_id, {"fedmeta.killed": "tried again"}, killed=True)


def put_back(study: Study, number: int) -> None:
    """Lets a trial wait, with the settings that it has, to be tried before anything new is."""
    storage = study._storage
    storage.set_trial_state_values(
        storage.get_trial_id_from_study_id_trial_number(study._study_id, number), TrialState.WAITING
    )


def interrupted(study: Study) -> list[FrozenTrial]:
    """Returns the trials that were running when the search was killed."""
    return study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


def _unfinished(variant: Experiment) -> str | None:
    try:
        checkpoint.find(Path(variant.tracking.folder), "auto", variant.to_toml())
    except FedmetaError:
        return None
    return "auto"


class _Watch:
    """Takes a run's progress: tells the study its scores on the way, and ends it where others do better."""

    def __init__(self, trial: Trial, every: int) -> None:
        self.run_id = ""
        self.round_number = 0
        self._trial, self._every = trial, every

    def __call__(self, progress: Progress) -> None:
        if progress.run_id and progress.run_id != self.run_id:
            self.run_id = progress.run_id
            self._trial.set_user_attr("run_id", progress.run_id)
        number, score = progress.round_number, progress.personalized_score
        # Notes come between a round and its evaluation, with the score of the evaluation before.
        due = self._every and number and number % self._every == 0 and not progress.note
        if not due or score is None or number <= self.round_number or number >= progress.rounds:
            return
        self.round_number = number
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a trial that goes on tells some rounds a second time
            self._trial.report(score, number)
        if self._trial.should_prune():
            raise Pruned(f"after round {number} of {progress.rounds} others had done better than {score:.3f}")
