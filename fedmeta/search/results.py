"""What a search has found: its trials, the best settings, and how much each key matters."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
from optuna import Study
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from fedmeta.experiment import Experiment
from fedmeta.problems.metric import Metric, metric_of
from fedmeta.search.final_evaluation import FinalEvaluation
from fedmeta.search.space import with_settings
from fedmeta.search.study import (
    PROBLEM,
    RUN_ID,
    SCORE,
    SECONDS,
    SETTINGS,
    SearchConfig,
    current_trials,
    load_study,
    was_interrupted,
)
from fedmeta.search.trial import State, Trial

STATES: dict[TrialState, State] = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
MIN_TRIALS_FOR_IMPORTANCE = 8


@dataclass(frozen=True)
class StudyResult:
    """The result of a search.

    Attributes:
        config: The search.
        trials: Its trials in their order.
        score: What they are scored by.
        wall_s: Seconds that its trials took.
        final: The best trial and the baseline on new sites, where that was evaluated.
    """

    config: SearchConfig
    trials: Sequence[Trial]
    score: Metric
    wall_s: float
    final: FinalEvaluation | None = None

    @property
    def completed(self) -> list[Trial]:
        """The completed trials, the best first; of equals, the earliest."""
        ended = [each for each in self.trials if each.state == "done"]
        return sorted(ended, key=lambda each: -self.score.sign * (each.score or 0.0))

    @property
    def ranked(self) -> list[Trial]:
        """All trials: the completed ones, the best first, then the pruned, failed and waiting ones."""
        order = ("pruned", "failed", "waiting")
        return self.completed + [each for state in order for each in self.trials if each.state == state]

    @property
    def best(self) -> Trial:
        """The best completed trial; there must be one."""
        return self.completed[0]

    @property
    def baseline(self) -> Trial | None:
        """The completed trial of the experiment's own settings, where they lie in the space."""
        return next((each for each in self.completed if each.untuned), None)

    @property
    def experiment(self) -> Experiment:
        """The experiment with the best settings."""
        return with_settings(self.config.experiment, self.best.settings)

    @cached_property
    def importance(self) -> dict[str, float]:
        """What share of the scores' variance each key explains (functional ANOVA, Hutter 2014), the largest first.

        Empty where too few trials completed.
        """
        keys, scores = [each.key for each in self.config.space], {each.score for each in self.completed}
        if len(self.completed) < MIN_TRIALS_FOR_IMPORTANCE or len(scores) == 1:
            return {}
        if len(keys) == 1:
            return {keys[0]: 1.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            evaluator = FanovaImportanceEvaluator(seed=self.config.seed)
            return get_param_importances(load_study(self.config), evaluator=evaluator)

    def best_so_far(self) -> list[float]:
        """Returns the best score up to each trial, from the first that completed; trials are in their order."""
        sign = -self.score.sign
        scores = [math.inf if each.state != "done" else sign * (each.score or 0.0) for each in self.trials]
        return [sign * best for best in itertools.accumulate(scores, min) if math.isfinite(best)]

    def frame(self) -> pd.DataFrame:
        """Returns the trials as a table in the order of `ranked`, one column per key."""
        rows: list[dict[str, Any]] = [
            {"trial": each.number, "state": each.state, "score": each.score, **each.settings, "rounds": each.rounds}
            | {"seconds": each.seconds, "problem": each.problem, "run_id": each.run_id}
            for each in self.ranked
        ]
        return pd.DataFrame(rows)


def load_results(config: SearchConfig, study: Study) -> StudyResult:
    """Returns what a study holds."""
    trials = current_trials(study)
    found = [_trial(trial, place, config) for place, trial in enumerate(trials) if SETTINGS in trial.user_attrs]
    seconds = sum((each.duration.total_seconds() for each in trials if each.duration), 0.0)
    return StudyResult(config, found, metric_of(study.user_attrs[SCORE]), seconds)


def _trial(trial: FrozenTrial, place: int, config: SearchConfig) -> Trial:
    state: State = "waiting" if was_interrupted(trial) else STATES.get(trial.state, "waiting")
    settings = trial.user_attrs[SETTINGS]
    return Trial(
        number=place,
        settings=settings,
        state=state,
        score=trial.value if state in ("done", "pruned") else None,
        rounds=(trial.last_step or 0) if state == "pruned" else 0,
        seconds=trial.user_attrs.get(SECONDS),
        run_id=trial.user_attrs.get(RUN_ID, ""),
        problem=trial.user_attrs.get(PROBLEM, ""),
        untuned=settings == config.baseline,
    )
