"""What a search has found: its trials, the best settings, and how much each key matters."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from optuna import Study
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Experiment
from fedmeta.problems.metric import Metric
from fedmeta.tuning.judging import Judged
from fedmeta.tuning.plan import Plan
from fedmeta.tuning.space import Settings, with_settings
from fedmeta.tuning.trial import SCORE_ATTRIBUTE, settings_of

State = Literal["done", "pruned", "failed", "waiting"]
STATES: dict[TrialState, State] = {TrialState.COMPLETE: "done", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
ENOUGH = 8
"""Of fewer trials that came to their end, no importance is told."""


@dataclass(frozen=True)
class Attempt:
    """One trial.

    Attributes:
        number: Its place in the search, from 0.
        settings: What was tried.
        state: "done", "pruned" (given up on its way), "failed", or "waiting" to go on.
        score: The mean personalized score of validation sites; of a pruned one, the last on its way.
        rounds: After how many rounds it was pruned; 0 where it was not.
        seconds: What the run took; None where it did not come to its end.
        run_id: The run.
        problem: Why it failed.
    """

    number: int
    settings: Settings
    state: State
    score: float | None
    rounds: int
    seconds: float | None
    run_id: str
    problem: str


@dataclass(frozen=True)
class Search:
    """What came of a search.

    Attributes:
        plan: The search.
        attempts: Its trials in their order.
        score: What settings are scored by.
        importance: What share of the scores' variance each key explains (functional ANOVA, Hutter 2014), the greatest
            first; empty where too few trials came to their end.
        wall_s: Seconds that its trials took.
        judged: The best settings and the experiment's own on new sites, where that was asked for.
    """

    plan: Plan
    attempts: Sequence[Attempt]
    score: Metric
    importance: dict[str, float]
    wall_s: float
    judged: Judged | None = None

    @property
    def done(self) -> list[Attempt]:
        """The trials that came to their end, the best first; of equals, the earliest."""
        sign = -self.score.sign
        ended = [each for each in self.attempts if each.state == "done"]
        return sorted(ended, key=lambda each: sign * (each.score or 0.0))

    @property
    def best(self) -> Attempt:
        """The best trial.

        Raises:
            FedmetaError: None came to its end; says why the first one failed.
        """
        if not self.done:
            problem = next((each.problem for each in self.attempts if each.problem), "no trial came to its end")
            raise FedmetaError(problem)
        return self.done[0]

    @property
    def own(self) -> Attempt | None:
        """The trial of the experiment's own settings, where they lie in the space."""
        own = self.plan.own_settings()
        return next((each for each in self.done if each.settings == own), None)

    @property
    def experiment(self) -> Experiment:
        """The experiment with the best settings."""
        return with_settings(self.plan.experiment, self.best.settings)

    def best_so_far(self) -> list[float]:
        """Returns the best score up to each trial, from the first that came to its end; trials are in their order."""
        sign = -self.score.sign
        scores = [
            sign * each.score if each.state == "done" and each.score is not None else math.inf for each in self.attempts
        ]
        return [sign * best for best in itertools.accumulate(scores, min) if math.isfinite(best)]

    def frame(self) -> pd.DataFrame:
        """Returns the trials as a table, the best first, then those that were pruned or failed."""
        order = {"done": 0, "pruned": 1, "failed": 2, "waiting": 3}
        ranked = self.done + sorted(
            (each for each in self.attempts if each.state != "done"), key=lambda each: (order[each.state], each.number)
        )
        rows = [
            {"trial": each.number, "state": each.state, "score": each.score, **each.settings, "rounds": each.rounds}
            | {"seconds": each.seconds, "problem": each.problem, "run_id": each.run_id}
            for each in ranked
        ]
        return pd.DataFrame(rows)


def found(plan: Plan, study: Study) -> Search:
    """Returns what a study holds."""
    name = str(study.user_attrs.get(SCORE_ATTRIBUTE, "score"))
    score = Metric(name, study.direction.name == "MAXIMIZE")
    attempts = [_attempt(trial, plan) for trial in study.get_trials(deepcopy=False) if trial.params]
    seconds = sum((each.duration.total_seconds() for each in study.get_trials(deepcopy=False) if each.duration), 0.0)
    return Search(plan, attempts, score, _importance(study, plan), seconds)


def _attempt(trial: FrozenTrial, plan: Plan) -> Attempt:
    state = STATES.get(trial.state, "waiting")
    last = trial.last_step
    score = trial.value if trial.state == TrialState.COMPLETE else trial.intermediate_values.get(last or 0)
    attrs = trial.user_attrs
    return Attempt(
        number=trial.number,
        settings=settings_of(trial.params, plan.space),
        state=state,
        score=score if state in ("done", "pruned") else None,
        rounds=(last or 0) if state == "pruned" else 0,
        seconds=attrs.get("seconds"),
        run_id=attrs.get("run_id", ""),
        problem=attrs.get("problem", ""),
    )


def _importance(study: Study, plan: Plan) -> dict[str, float]:
    scores = [trial.value for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if len(scores) < ENOUGH or len(set(scores)) == 1:
        return {}
    if len(plan.space) == 1:
        return {plan.space[0].key: 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=plan.seed))
