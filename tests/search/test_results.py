"""What a search has found, in the direction of its score, and how its page puts it."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedmeta.problems.metric import Metric
from fedmeta.search.final_evaluation import FinalEvaluation
from fedmeta.search.results import StudyResult
from fedmeta.search.search_report import markdown, verdict
from fedmeta.search.trial import Trial
from tests.search.searches import config

ACCURACY, RMSE = Metric("accuracy", True), Metric("rmse", False, "mmHg")


def made(score: Metric, *scores: float | None) -> StudyResult:
    """Returns a search of these scores, the first one the experiment's own; None is a failed trial."""
    trials = [
        Trial(
            number=place,
            settings={"learner.inner_lr": 0.1 + place, "server.lr": 0.003},
            state="failed" if value is None else "done",
            score=value,
            rounds=0,
            seconds=1.0,
            run_id="",
            problem="diverged" if value is None else "",
            untuned=place == 0,
        )
        for place, value in enumerate(scores)
    ]
    return StudyResult(config(Path("nowhere"), len(trials)), trials, score, wall_s=3.0)


@pytest.mark.parametrize(
    ("score", "best", "curve"), [(ACCURACY, 0.8, [0.5, 0.7, 0.7, 0.8]), (RMSE, 0.4, [0.5, 0.5, 0.4, 0.4])]
)
def test_the_best_trial_and_the_best_so_far_follow_the_direction(
    score: Metric, best: float, curve: list[float]
) -> None:
    found = made(score, 0.5, 0.7, 0.4, 0.8)
    assert found.best.score == best
    assert found.best_so_far() == curve


def test_failed_trials_rank_last_and_leave_the_best_so_far_as_it_is() -> None:
    found = made(ACCURACY, 0.5, None, 0.6)
    assert [each.number for each in found.ranked] == [2, 0, 1]
    assert found.best_so_far() == [0.5, 0.5, 0.6]
    assert list(found.frame()["trial"]) == [2, 0, 1]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ((0.1, 0.05, 0.2), "better (95 % interval excludes 0), +0.100 [+0.050, +0.200], 3 seeds."),
        ((0.1, -0.05, 0.2), "no difference shown (95 % interval includes 0), +0.100 [-0.050, +0.200], 3 seeds."),
        ((-0.1, -0.2, -0.05), "worse (95 % interval excludes 0), -0.100 [-0.200, -0.050], 3 seeds."),
    ],
)
def test_the_verdict_rests_on_the_interval(difference: tuple[float, float, float], words: str) -> None:
    final = FinalEvaluation(3, 0.4, 0.5, 0.9, 0.9, difference, difference)
    found = replace(made(RMSE, 0.5, 0.4), final=final)
    assert verdict(found).endswith(f"On new sites 0.400 against 0.500: {words}")
    page = markdown(found)
    assert "| rmse (mmHg) | inner_lr | server.lr | state |" in page
    assert "(lower is better)" in page


def test_a_baseline_that_wins_is_named_so() -> None:
    assert verdict(made(ACCURACY, 0.6, 0.5)).endswith("the experiment's own settings; no trial did better.")
