"""Solvers by formula, by optimality criteria and by sampling; statistics in place of gradients."""

import importlib
import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch

import fedmeta
from fedmeta.errors import FedmetaError
from fedmeta.learners import build
from fedmeta.learners.check import check
from fedmeta.problems import ClosedForm, CrossEntropy, GaussianProcessSearch, OptimalityCriteria
from tests.problems.test_problem import directional


class Ridge(fedmeta.Problem):
    """Ridge regression towards a learned center: the solution is a formula."""

    solver = ClosedForm()

    def init(self, seed):
        return {"weights": torch.linspace(-0.5, 0.5, 3)}

    def solution(self, parameters, data):
        x, y = data[:, :3], data[:, 3]
        matrix = x.T @ x + torch.eye(3, dtype=x.dtype)
        return {"weights": torch.linalg.solve(matrix, x.T @ y + parameters["weights"])}

    def inner(self, parameters, data):
        return (data[:, :3] @ parameters["weights"] - data[:, 3]).square().mean()


def rows(seed, count=6, width=4):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_closed_form_is_reached_in_one_step_and_stays():
    problem = Ridge()
    start = {name: value.double() for name, value in problem.init(0).items()}
    path = problem.solver.solve(problem, start, rows(0), 3, {"weights": 1.0})
    assert len(path) == 4
    assert torch.equal(path[0]["weights"], start["weights"])
    assert torch.equal(path[1]["weights"], problem.solution(start, rows(0))["weights"])
    assert torch.equal(path[1]["weights"], path[3]["weights"])
    assert problem.solver.solve(problem, start, rows(0), 0, {"weights": 1.0}) == [start]


def test_meta_gradients_through_a_closed_form_are_exact():
    learner = build("maml", Ridge(), inner_steps=1)
    state = {name: value.double() for name, value in learner.init(0).items()}
    task = fedmeta.Task(rows(1), rows(2))
    gradient, _ = learner.meta_gradient(state, task)
    assert directional(learner, state, task, gradient) < 1e-6
    assert any("agrees with a finite difference" in line for line in check(learner, [task]).passed)


class Budget(fedmeta.Problem):
    """Costs w / x under a fixed sum of x: the optimum is in proportion to sqrt(w)."""

    solver = OptimalityCriteria(lowest=1e-6, highest=10.0)

    def init(self, seed):
        return {"first": torch.full((2,), 0.5), "second": torch.full((3,), 0.5)}

    def sensitivity(self, parameters, data):
        cut = {"first": data[:2], "second": data[2:]}
        return {name: -cut[name] / parameters[name].square() for name in cut}

    def inner(self, parameters, data):
        return (data / torch.cat([parameters["first"], parameters["second"]])).sum()


def test_optimality_criteria_keep_the_sum_and_reach_the_known_optimum():
    problem = Budget()
    costs = torch.tensor([1.0, 4.0, 9.0, 16.0, 0.25], dtype=torch.float64)
    start = {name: value.double() for name, value in problem.init(0).items()}
    path = problem.solver.solve(problem, start, costs, 6, {"first": 0.2, "second": 0.2})
    values = [torch.cat([own["first"], own["second"]]) for own in path]
    assert all(float(x.sum()) == pytest.approx(2.5, abs=1e-12) for x in values)
    assert all(float((b - a).abs().max()) <= 0.2 + 1e-12 for a, b in itertools.pairwise(values))
    assert torch.allclose(values[-1], costs.sqrt() * 2.5 / costs.sqrt().sum(), rtol=1e-9)


@pytest.mark.parametrize("move", [0.05, 5.0], ids=["moves bind", "moves are free"])
def test_optimality_criteria_are_differentiated_with_their_multiplier(move):
    problem = type("Damped", (Budget,), {"solver": OptimalityCriteria(damping=0.3, lowest=1e-6, highest=10.0)})()
    learner = build("maml", problem, inner_steps=2, inner_lr=move)
    random = torch.Generator().manual_seed(4)
    state = {
        name: value.double() + 0.1 * torch.rand(value.shape, generator=random, dtype=torch.float64)
        for name, value in learner.init(0).items()
    }
    costs = [torch.rand(5, generator=random, dtype=torch.float64) + 0.2 for _ in range(2)]
    task = fedmeta.Task(*costs)
    gradient, _ = learner.meta_gradient(state, task)
    assert directional(learner, state, task, gradient) < 1e-6
    batched, _, _ = fedmeta.meta_gradients(learner, state, [task, task], engine="vmap")
    assert all(torch.allclose(value, 2 * gradient[name]) for name, value in batched.items())


def test_optimality_criteria_ask_for_sensitivities():
    problem = type("None", (Ridge,), {"solver": OptimalityCriteria()})()
    with pytest.raises(FedmetaError, match=r"needs the problem's sensitivity"):
        problem.solver.solve(problem, problem.init(0), rows(0), 1, {"weights": 0.1})


class Steps(fedmeta.Problem):
    """A staircase, which has no derivative: the distance to a site's own place, rounded up."""

    solver = CrossEntropy(samples=80, elite=10)

    def init(self, seed):
        return {"place": torch.zeros(2, dtype=torch.float64)}

    def inner(self, parameters, data):
        return ((parameters["place"] - data["place"]).norm() * 20).ceil()


def test_cross_entropy_finds_what_has_no_derivative_and_repeats_itself():
    problem = Steps()
    data = {"place": torch.tensor([0.8, -1.1], dtype=torch.float64), "seed": torch.tensor(3)}
    runs = [problem.solver.solve(problem, problem.init(0), data, 12, {"place": 1.0}) for _ in range(2)]
    assert torch.equal(runs[0][-1]["place"], runs[1][-1]["place"])
    assert float(problem.inner(runs[0][-1], data)) <= 2
    other = problem.solver.solve(problem, problem.init(0), {**data, "seed": torch.tensor(4)}, 1, {"place": 1.0})
    assert not torch.equal(other[-1]["place"], runs[0][1]["place"])


MIXTURE = '''
import torch

import fedmeta


class Mixture(fedmeta.Problem, fedmeta.TaskSource):
    """Three normal distributions that sites' points come from, by expectation and maximization: sites send sums."""

    metrics = (fedmeta.Metric("log_likelihood", higher_is_better=True),)
    solver = fedmeta.problems.ClosedForm()

    def __init__(self, sites: int = 7):
        random = torch.Generator().manual_seed(1)
        centers = torch.tensor([[-2.0, 0.0], [1.0, 2.0], [2.0, -1.5]], dtype=torch.float64)
        which = torch.randint(3, (sites, 2, 12), generator=random)
        self.points = centers[which] + torch.randn(sites, 2, 12, 2, generator=random, dtype=torch.float64)

    def init(self, seed):
        random = torch.Generator().manual_seed(seed)
        means = torch.randn(3, 2, generator=random, dtype=torch.float64)
        return {"means": means, "weights": torch.full((3,), 1 / 3).double(), "variances": torch.ones(3).double()}

    def densities(self, parameters, points):
        distance = (points[:, None] - parameters["means"]).square().sum(-1)
        return parameters["weights"].log() - parameters["variances"].log() - distance / 2 / parameters["variances"]

    def inner(self, parameters, data):
        return -self.densities(parameters, data).logsumexp(1).mean()

    def evaluate(self, parameters, data):
        return {"log_likelihood": -self.inner(parameters, data)}

    def sums(self, parameters, points):
        share = self.densities(parameters, points).softmax(1)
        square = points.square().sum(1)
        return {"count": share.sum(0), "first": share.T @ points, "second": share.T @ square}

    def maximized(self, sums):
        means = sums["first"] / sums["count"][:, None]
        variances = (sums["second"] / sums["count"] - means.square().sum(1)) / 2
        return {"means": means, "weights": sums["count"] / sums["count"].sum(), "variances": variances}

    def solution(self, parameters, data):
        return self.maximized(self.sums(parameters, data))

    def payload(self, path, task):
        return self.sums(path[0], torch.cat([task.support, task.query]))

    def payload_shapes(self, state):
        return {"count": (3,), "first": (3, 2), "second": (3,)}

    def outer_step(self, state, total, weight):
        return self.maximized(total)

    def sites(self):
        return [f"site-{number}" for number in range(len(self.points))]

    def task(self, site, purpose, round, seed):
        return fedmeta.Task(*self.points[int(site[-1])])
'''


@pytest.fixture
def mixture(tmp_path, monkeypatch):
    (tmp_path / "own_mixture.py").write_text(MIXTURE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    settings = [
        'problem.name="own_mixture:Mixture"', "data.new_sites=2", "model.dtype=float64", "learner.name=maml",
        "learner.inner_steps=1", "server.rounds=5", "server.sites_per_round=0", "evaluation.every=0",
        "tracking.uri=none", "evaluation.local_baseline=none", "runtime.nodes=2",
    ]  # fmt: skip
    (tmp_path / "own.toml").write_text("[problem]\n", encoding="utf-8")
    return fedmeta.load_experiment(tmp_path / "own.toml", settings)


@pytest.mark.parametrize("runtime", ["local", pytest.param("ray", marks=pytest.mark.slow)])
def test_sums_of_sites_are_the_pooled_expectation_and_maximization(mixture, runtime):
    result = fedmeta.run(mixture, runtime=runtime)
    problem = importlib.import_module("own_mixture").Mixture()
    training = result.sites.loc[result.sites["kind"] == "training", "site"]
    assert len(training) == 5
    points = torch.cat([problem.points[int(name[-1])].reshape(-1, 2) for name in sorted(training)])
    own = problem.init(0)
    for _ in range(5):
        own = problem.maximized(problem.sums(own, points))
    for name, value in own.items():
        assert torch.allclose(result.meta_state[f"theta.{name}"], value, rtol=0, atol=1e-10), name
    assert result.summary["new_sites"]["n"] == 2
    assert np.isfinite(result.summary["new_sites"]["global"]["mean"])


class Counting(Steps, fedmeta.TaskSource):
    """A payload without a step of the server's own: its keys are the gradient's, and the optimizer steps."""

    held_out: ClassVar[bool] = True

    def payload(self, path, task):
        return {"theta.place": path[0]["place"] - task.query["place"]}

    def payload_shapes(self, state):
        return {"theta.place": (2,)}

    def sites(self):
        return [f"site-{number}" for number in range(6)]

    def task(self, site, purpose, round, seed):  # noqa: A002
        random = torch.Generator().manual_seed(int(site[-1]))
        place = torch.randn(2, generator=random, dtype=torch.float64)
        return fedmeta.Task({"place": place, "seed": torch.tensor(0)}, {"place": place, "seed": torch.tensor(1)})


def test_a_payload_without_a_step_of_its_own_is_what_the_optimizer_steps_along(tmp_path):
    settings = [
        f'problem.name="{__name__}:Counting"', "data.new_sites=2", "model.dtype=float64", "learner.name=fedavg-ft",
        "learner.inner_steps=1", "server.rounds=1", "server.sites_per_round=0", "server.optimizer=sgd", "server.lr=1",
        "evaluation.every=0", "tracking.uri=none", "evaluation.local_baseline=none", f"tracking.folder={tmp_path}",
    ]  # fmt: skip
    (tmp_path / "own.toml").write_text("[problem]\n", encoding="utf-8")
    result = fedmeta.run(fedmeta.load_experiment(tmp_path / "own.toml", settings))
    problem = Counting()
    training = result.sites.loc[result.sites["kind"] == "training", "site"]
    center = torch.stack([problem.task(name, "test", 0, 0).query["place"] for name in training]).mean(0)
    assert torch.allclose(result.meta_state["theta.place"], center, atol=1e-12)


class Stimulation(fedmeta.Problem):
    """A response over six settings, linear in two features."""

    shared = ("factor",)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6], [-1.0, 0.2], [0.3, -0.9], [0.8, 0.4]]).double()

    def init(self, seed):
        return {"mean": torch.tensor([0.1, -0.2]).double(), "factor": torch.tensor([[0.7, 0.0], [0.2, 0.5]]).double()}

    def observe(self, data, setting, trial):
        return self.features[setting] @ data + 0.01 * trial

    def inner(self, parameters, data):
        return (parameters["mean"] - data).square().sum()


def test_the_search_conditions_as_gaussian_process_regression_does():
    problem, truth = Stimulation(), torch.tensor([0.5, 0.8]).double()
    solver = GaussianProcessSearch(noise=0.2)
    start = problem.init(0)
    path = solver.solve(problem, start, truth, 4, {"mean": 1.0})
    tried = path[-1]["tried"]
    assert [len(own.get("tried", ())) for own in path] == [0, 1, 2, 3, 4]
    rows, prior = problem.features[tried], start["factor"] @ start["factor"].T
    outcomes = torch.stack([problem.observe(truth, int(k), trial) for trial, k in enumerate(tried)])
    kernel = rows @ prior @ rows.T + 0.04 * torch.eye(4).double()
    mean = start["mean"] + prior @ rows.T @ torch.linalg.solve(kernel, outcomes - rows @ start["mean"])
    assert torch.allclose(path[-1]["mean"], mean, atol=1e-12)
    spread = (problem.features @ prior * problem.features).sum(1).sqrt()
    assert int(tried[0]) == int((problem.features @ start["mean"] + spread).argmax())


def test_a_search_that_forgets_weighs_trials_by_their_age():
    problem, truth = Stimulation(), torch.tensor([0.5, 0.8]).double()
    start, memory = problem.init(0), 5.0
    own = GaussianProcessSearch(noise=0.2, memory=memory).solve(problem, start, truth, 4, {"mean": 1.0})[-1]
    rows, prior = problem.features[own["tried"]], start["factor"] @ start["factor"].T
    outcomes = torch.stack([problem.observe(truth, int(k), trial) for trial, k in enumerate(own["tried"])])
    age = torch.arange(4.0).double()
    kernel = rows @ prior @ rows.T * torch.exp(-(age[:, None] - age).abs() / memory) + 0.04 * torch.eye(4).double()
    cross = prior @ rows.T * torch.exp(-(4 - age) / memory)
    mean = start["mean"] + cross @ torch.linalg.solve(kernel, outcomes - rows @ start["mean"])
    assert torch.allclose(own["mean"], mean, atol=1e-12)


def test_a_search_with_a_limit_tries_what_is_safe_and_else_the_safest():
    problem, truth = Stimulation(), torch.tensor([0.5, 0.8]).double()
    start = problem.init(0)
    spread = (problem.features @ (start["factor"] @ start["factor"].T) * problem.features).sum(1).sqrt()
    expected = problem.features @ start["mean"]
    limit = float((expected - 2 * spread).sort().values[-3])
    own = GaussianProcessSearch(limit=limit, confidence=2.0).solve(problem, start, truth, 1, {"mean": 1.0})[-1]
    assert int(own["tried"][0]) in (expected - 2 * spread).topk(3).indices.tolist()
    none = GaussianProcessSearch(limit=100.0, confidence=2.0).solve(problem, start, truth, 1, {"mean": 1.0})[-1]
    assert int(none["tried"][0]) == int((expected - 3 * spread).argmax())
