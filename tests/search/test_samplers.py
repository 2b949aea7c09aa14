"""Points that samplers draw, without any run: grids, and quasi-random points that all learners share."""

import optuna
import pytest

from fedmeta.errors import FedmetaError
from fedmeta.experiment import LEARNERS, Experiment
from fedmeta.search.samplers import build_sampler, grid_levels
from fedmeta.search.space import Settings, default_space, parse

EXPERIMENT = Experiment()


def drawn(sampler: str, count: int, experiment: Experiment = EXPERIMENT, parts: int = 1) -> list[Settings]:
    """Returns the points after the experiment's own, drawn by one process or, in parts, by several."""
    space = default_space(experiment)
    study = optuna.create_study(storage=optuna.storages.InMemoryStorage())
    study.enqueue_trial({each.key: each.at(0.5) for each in space})
    points: list[Settings] = []

    def objective(trial: optuna.Trial) -> float:
        points.append({each.key: each.suggest(trial) for each in space})
        return 0.0

    for part in range(parts):
        known = {trial.number: trial.number for trial in study.trials}
        study.sampler = build_sampler(sampler, 0, 1, {}, known)
        study.optimize(objective, n_trials=(count + 1 - len(points)) // (parts - part))
    return points[1:]


@pytest.mark.parametrize("learner", LEARNERS)
def test_all_learners_share_quasi_random_points(learner: str) -> None:
    points = drawn("qmc", 4, Experiment().with_overrides([f"learner.name={learner}"]))
    reference = drawn("qmc", 4)
    assert [each["learner.inner_lr"] for each in points] == [each["learner.inner_lr"] for each in reference]


def test_quasi_random_points_cover_the_space() -> None:
    space = default_space(EXPERIMENT)
    points = drawn("qmc", 16)
    high = [tuple(point[each.key] > each.at(0.5) for each in space) for point in points]
    assert len(set(high)) == 2 ** len(space)
    for each in space:
        edges = [each.at(place / 8) for place in range(1, 8)]
        assert len({sum(point[each.key] > edge for edge in edges) for point in points}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp", "cmaes"])
def test_a_resumed_search_draws_the_points_of_an_unbroken_one(sampler: str) -> None:
    unbroken = drawn(sampler, 6)
    assert drawn(sampler, 6, parts=3) == unbroken
    assert len({tuple(point.values()) for point in unbroken}) == 6


def test_a_grid_takes_every_choice_and_no_more_than_the_budget() -> None:
    space = parse(["learner.name=maml,anil,fomaml", "learner.inner_lr=0.01:1:log", "learner.mu=0:1"], EXPERIMENT)
    levels = grid_levels(space, 20)
    assert levels["learner.name"] == ["maml", "anil", "fomaml"]
    assert sorted(len(set(values)) for values in levels.values()) == [2, 3, 3]
    with pytest.raises(FedmetaError, match="the choices alone make 3 points"):
        grid_levels(space, 2)


def test_a_grid_has_no_integer_twice() -> None:
    assert grid_levels(parse(["learner.inner_steps=1:3"], EXPERIMENT), 50) == {"learner.inner_steps": [1, 2, 3]}
