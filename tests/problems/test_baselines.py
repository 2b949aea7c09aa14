"""What an own problem's scores are compared with: local-only, the classical method, the optimum, averaged solutions."""

import json

import numpy as np
import pytest
import torch

import fedmeta
from fedmeta import Metric, Problem, Task, TaskSource
from fedmeta.cli.tables import results
from fedmeta.experiment import Experiment
from fedmeta.learners import build


class Bowl(Problem, TaskSource):
    """Quadratic bowls with known bottoms; every objective and optimum has a closed form."""

    metrics = (Metric("gap", higher_is_better=False),)

    def init(self, seed):
        return {"place": torch.zeros(3)}

    def inner(self, parameters, data):
        return (parameters["place"] - data["bottom"].mean(0)).square().sum()

    def classical(self, parameters, data):
        """Grid search over the diagonal."""
        grid = torch.linspace(-2, 2, 21)
        found = min(grid.tolist(), key=lambda value: float(self.inner({"place": torch.full((3,), value)}, data)))
        return {"place": torch.full((3,), found)}, len(grid)

    def optimum(self, parameters, data):
        return {"place": data["bottom"].mean(0)}

    def sites(self):
        return [f"bowl-{number}" for number in range(6)]

    def task(self, site, purpose, round, seed):  # noqa: A002
        random = torch.Generator().manual_seed(100 * int(site[-1]) + (purpose == "train"))
        bottom = torch.tensor([1.0, 1.0, 1.0]) + 0.1 * int(site[-1]) + 0.01 * torch.randn(8, 3, generator=random)
        return Task({"bottom": bottom[:4]}, {"bottom": bottom[4:]})


def experiment_of(folder, *settings):
    usual = [
        "problem.name=tests.problems.test_baselines:Bowl",
        "learner.inner_lr=0.1",
        "learner.inner_steps=2",
        "server.rounds=3",
        "evaluation.every=0",
        "tracking.uri=none",
        f"tracking.folder={folder}",
    ]
    return Experiment.from_toml("", overrides=[*usual, *settings])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return fedmeta.run(experiment_of(tmp_path_factory.mktemp("runs")))


def test_the_optimum_and_the_classical_method_stand_beside_the_scores(result):
    sites = result.sites
    assert sites["optimum_gap"].to_numpy() == pytest.approx(0, abs=1e-10)
    assert (sites["classical_evaluations"] == 21).all()
    assert (sites["classical_gap"] >= sites["optimum_gap"]).all()
    for group in ("new_sites", "training_sites"):
        own = result.summary[group]
        assert own["optimum"]["mean"] == pytest.approx(0, abs=1e-10)
        assert own["classical"]["evaluations"] == 21
        kind = sites[sites["kind"] == group.removesuffix("_sites")]
        assert own["classical"]["mean"] == pytest.approx(kind["classical_gap"].mean())
    json.dumps(result.summary, allow_nan=False)


def test_local_only_is_the_settled_solution_on_support(result):
    bowl = Bowl()
    for _, row in result.sites.iterrows():
        task = bowl.task(row["site"], "test", 0, 0)
        gap = (task.support["bottom"].mean(0) - task.query["bottom"].mean(0)).square().sum()
        assert row["local_gap"] == pytest.approx(float(gap), abs=1e-4)


def test_the_terminal_names_them(result, tmp_path, capsys):
    results(result.summary, experiment_of(tmp_path))
    shown = capsys.readouterr().err
    assert "classical method" in shown
    assert "by 21 evaluations" in shown
    assert "optimum" in shown


def test_an_evaluation_with_baselines_survives_its_checkpoint(result, tmp_path):
    again = fedmeta.run(experiment_of(result.folder.parent), resume=result.folder.name)
    assert np.array_equal(again.sites["classical_gap"], result.sites["classical_gap"])


@pytest.mark.slow
def test_one_round_of_average_is_the_mean_of_the_sites_solutions(tmp_path):
    settings = ["learner.name=average", "server.rounds=1", "server.sites_per_round=0"]
    result = fedmeta.run(experiment_of(tmp_path, *settings))
    bowl, training = Bowl(), result.sites[result.sites["kind"] == "training"]["site"]
    bottoms = []
    for site in training:
        task = bowl.task(site, "train", 1, 0)
        bottoms.append((task.support["bottom"].mean(0) + task.query["bottom"].mean(0)) / 2)
    assert result.meta_state["theta.place"].tolist() == pytest.approx(torch.stack(bottoms).mean(0).tolist(), abs=1e-5)


def test_engines_agree_on_average():
    learner = build("average", torch.nn.Linear(3, 2), inner_lr=0.1, solve_steps=7)
    random = torch.Generator().manual_seed(0)
    rows = [(torch.randn(5, 3, generator=random), torch.randint(0, 2, (5,), generator=random)) for _ in range(6)]
    tasks = [Task(rows[2 * k], rows[2 * k + 1]) for k in range(3)]
    state = learner.init(0)
    one, other = (fedmeta.meta_gradients(learner, state, tasks, engine)[0] for engine in ("loop", "vmap"))
    assert all(torch.allclose(value, other[name], atol=1e-6) for name, value in one.items())
