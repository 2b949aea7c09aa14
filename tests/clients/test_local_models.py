"""What a site reaches alone: the strongest of several methods, chosen on its own rows, and named."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fedmeta
from clients.local_models import RIVALS_FROM, fit_rows, is_better
from fedmeta import Task
from fedmeta.experiment import Experiment
from fedmeta.learners import build
from fedmeta.messages import LOCAL_METHODS
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.task import stack

SHARED = Path(__file__).parents[3] / "shared" / "data"


def task(make, rows, seed, noise=0.0):
    """Returns a site whose labels are a function of two standard normal features."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows + 200, 2))
    y = make(x)
    if y.dtype.kind == "f":
        y = (y + noise * random.normal(size=len(y))).astype(np.float32)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    return Task((x[:rows], y[:rows]), (x[rows:], y[rows:]))


def solved(*tasks, outputs=2, hidden=16):
    """Returns figures and names of methods of the sites' tasks."""
    network = torch.nn.Sequential(torch.nn.Linear(2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, outputs))
    learner = build("maml", lambda: network)
    figures, methods = fit_rows(learner, learner.init(0), stack(tasks), Experiment.from_toml(""))
    return figures, [LOCAL_METHODS[method] for method in methods]


def line(x):
    return (x @ [1.0, -1.3] + np.random.default_rng(9).logistic(scale=1.0, size=len(x)) > 0).astype(np.int64)


def checkers(x):
    return ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(np.int64)


def ring(x):
    return (np.hypot(x[:, 0], x[:, 1]) > 1.2).astype(np.int64)


@pytest.mark.slow
def test_what_no_line_divides_is_solved_by_a_rival_and_what_one_does_by_the_line():
    figures, methods = solved(task(line, 120, 0), task(checkers, 240, 1), task(ring, 240, 2))
    assert methods[0] == "linear"
    assert set(methods[1:]) <= {"network", "trees"}
    assert (figures["accuracy"][1:, 0] > 0.85).all()


def test_a_rival_that_is_better_by_luck_only_is_not_taken():
    """One is better by a hundredth on average, and by one either way on single rows; another is always better."""
    linear = torch.ones(100, dtype=torch.float64)
    noise = torch.where(torch.arange(100) % 2 == 0, 1.0, -1.0)
    assert not is_better(linear - 0.01 + noise, linear)
    assert is_better(linear - 0.2 + noise, linear)
    assert is_better(linear - 0.01, linear)
    assert not is_better(linear, linear)


def test_few_rows_are_solved_by_the_linear_model():
    _, methods = solved(task(checkers, RIVALS_FROM - 1, 0))
    assert methods == ["linear"]


@pytest.mark.slow
def test_numbers_have_rivals_of_their_own():
    sites = [
        task(lambda x: 2 * x[:, 0] - x[:, 1], 80, 0, noise=0.1),
        task(lambda x: np.sign(x[:, 0]) * np.sign(x[:, 1]), 240, 1, noise=0.1),
    ]
    figures, methods = solved(*sites, outputs=1)
    assert methods[0] == "linear"
    assert methods[1] != "linear"
    assert figures["rmse"][0, 0] < 0.15
    assert figures["rmse"][1, 0] < 0.7  # of a constant: 1


@pytest.mark.slow
def test_a_rival_that_trains_to_nothing_is_not_taken():
    """All labels but a few are noise: no method may win by having seen the rows that it is scored on."""
    random = np.random.default_rng(0)
    sites = [task(lambda x: random.integers(0, 2, len(x)), 60, seed) for seed in range(6)]
    figures, _ = solved(*sites)
    assert (figures["loss"][:, 0] < 1.2).all()  # a model that learned the noise by heart has 2 and more


def test_labels_that_the_run_does_not_know_are_not_of_the_first_class():
    found = task(lambda x: np.where(line(x), 1, 2), 40, 0)
    unknown = Task((found.support[0], torch.where(found.support[1] == 2, -1, 1)), found.query)
    figures, _ = solved(unknown, outputs=3)
    assert (figures[OUTPUTS][0, 0].argmax(-1) == 1).all()


def test_one_class_and_one_row_are_solved():
    one = Task((torch.zeros(1, 2), torch.tensor([1])), (torch.zeros(4, 2), torch.tensor([0, 1, 1, 1])))
    figures, methods = solved(task(lambda x: 0 * line(x) + 1, 60, 0), one)
    assert methods == ["linear", "linear"]
    assert figures["accuracy"][:, 0].tolist() == [1.0, 0.75]


@pytest.mark.slow
def test_a_run_names_the_methods_and_pools_what_sites_reach_alone(tmp_path):
    settings = ["server.rounds=1", "evaluation.every=0", "tracking.uri=none", f"tracking.folder={tmp_path}"]
    result = fedmeta.run(Experiment.from_toml("", overrides=settings))
    sites = result.sites
    for kind in ("new", "training"):
        own, rows = result.summary[f"{kind}_sites"], sites[sites["kind"] == kind]
        assert own["local_methods"] == rows["local_method"].value_counts().to_dict() == {"linear": len(rows)}
        weighted = np.average(rows["local_accuracy"], weights=rows["test_rows"])
        assert own["local_only"]["pooled"] == pytest.approx(weighted, abs=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    ("name", "support"), [("heart", 20), ("heart", 100), ("har", 20), ("writers", 20), ("omniglot", 5)]
)
def test_local_only_is_not_below_logistic_regression_on_real_data(name, support):
    from experiments.local_only import compare

    found = compare(name, support, 40, trees=False)
    assert found.passed, found
