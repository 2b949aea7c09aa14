"""Bridges: the published compliance, derivatives of the solver's map, closed optima, and the learned start."""

import numpy as np
import pytest
import torch

from experiments.gallery import measure
from experiments.gallery.bridges import bridges
from fedmeta.learners import build
from tests.problems.test_problem import directional


@pytest.mark.slow
def test_the_mbb_beam_has_the_published_compliance():
    """Andreassen et al. 2011: 60 x 20 elements, volume .5, sensitivity filter of radius 2.4: c = 216.81."""
    problem = bridges.Topology(1, wide=60, high=20, volume=0.5, radius=2.4)
    grid = problem.grid
    symmetry, support = [2 * row for row in range(grid.high + 1)], [grid.freedom(grid.wide, grid.high) + 1]
    problem.grid = bridges.Grid(grid.wide, grid.high, 2.4, symmetry + support)
    force = torch.zeros(grid.freedoms, dtype=torch.float64)
    force[1] = 1
    own, data, change, steps = problem.init(0), {"force": force}, 1.0, 0
    while change > 0.01:
        before, steps = own["density"], steps + 1
        own = problem.solver.solve(problem, own, data, 1, {"density": 0.2})[-1]
        change = float((own["density"] - before).abs().max())
    assert steps < 150
    assert float(own["density"].mean()) == pytest.approx(0.5, abs=1e-9)
    assert float(problem.inner(own, data)) == pytest.approx(216.8, abs=0.3)


def test_displacements_have_the_derivatives_of_a_solve():
    grid = bridges.Topology(1, wide=3, high=2).grid
    random = torch.Generator().manual_seed(0)
    stiffness = torch.rand(6, generator=random, dtype=torch.float64) + 0.5
    force = torch.rand(grid.freedoms, generator=random, dtype=torch.float64)
    inputs = [value.requires_grad_() for value in (stiffness, force)]

    def solve(stiffness, force):
        return bridges.Displacements.apply(stiffness, force, grid, [])

    assert torch.autograd.gradcheck(solve, inputs)
    assert torch.autograd.gradgradcheck(solve, inputs)


@pytest.mark.parametrize(
    ("problem", "rate"),
    [(bridges.Topology(4), 0.2), (bridges.Sizing(4), 0.003), (bridges.Shape(4), 0.05)],
    ids=["topology", "sizing", "shape"],
)
def test_three_steps_have_an_exact_meta_gradient(problem, rate):
    learner = build("maml", problem, inner_steps=3, inner_lr=rate)
    random = torch.Generator().manual_seed(1)
    state = {
        name: value * (1 + 0.1 * torch.randn(value.shape, generator=random, dtype=torch.float64))
        for name, value in learner.init(0).items()
    }
    task = problem.task("bridge-02", "train", 1, 0)
    gradient, _ = learner.meta_gradient(state, task)
    assert directional(learner, state, task, gradient) < 1e-6


def test_filtered_sensitivities_are_no_gradient_and_unfiltered_ones_are():
    for radius, same in ((1.8, False), (1.0, True)):
        problem = bridges.Topology(1, radius=radius)
        data, own = problem.task("bridge-00", "train", 1, 0).support, problem.init(0)
        own = {"density": own["density"] + 0.01 * torch.arange(648, dtype=torch.float64).sin()}
        gradient = torch.func.grad(lambda x, p=problem, d=data: p.inner({"density": x}, d))(own["density"])
        assert torch.allclose(gradient, problem.sensitivity(own, data)["density"], rtol=1e-8) is same


def test_sizing_reaches_the_closed_optimum_in_one_step_from_any_start():
    problem = bridges.Sizing(8)
    random = torch.Generator().manual_seed(0)
    for site in problem.sites():
        data = problem.task(site, "test", 0, 0).support
        work = problem.work(torch.ones(problem.panels, dtype=torch.float64), data)
        start = {"shares": torch.rand(23, generator=random, dtype=torch.float64) / 10 + 0.01}
        path = problem.solver.solve(problem, start, data, 1, {"shares": 1.0})
        assert torch.allclose(path[-1]["shares"], work / work.sum(), rtol=0.01, atol=2e-6)
        assert float(problem.inner(path[-1], data)) == pytest.approx(float(work.sum() ** 2), rel=1e-4)


def test_forces_of_a_truss_are_those_of_statics():
    """Two panels, one load of 1 at midspan, height 1: the lower chord bears 1/4, diagonals sqrt(5)/4, the upper 1/2."""
    problem = bridges.Truss.__new__(type("Two", (bridges.Shape,), {}))
    problem.__init__(1, panels=2)
    force = torch.zeros(10, dtype=torch.float64)
    force[3] = -1
    found = problem.work(torch.ones(2, dtype=torch.float64), {"force": force})
    diagonal = np.sqrt(5) / 4 * np.sqrt(1.25)
    assert found.tolist() == pytest.approx([0.25, 0.25, 0.5, *[diagonal] * 4], rel=1e-6)


def test_projection_is_the_nearest_allowed_density():
    random = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=random, dtype=torch.float64)
    found = bridges.project(values, 0.35, 1e-3)
    assert float(found.mean()) == pytest.approx(0.35)
    assert torch.allclose(bridges.project(found, 0.35, 1e-3), found, atol=1e-12)
    for _ in range(20):
        other = bridges.project(torch.randn(50, generator=random, dtype=torch.float64), 0.35, 1e-3)
        assert float((values - found) @ (other - found)) <= 1e-9


@pytest.mark.slow
def test_a_learned_start_beats_the_average_of_designs_after_two_steps():
    result, problem = measure.run("bridges"), bridges.Topology()
    learner, new = build("maml", problem, inner_steps=2, inner_lr=0.2), measure.new_sites(result)
    designs = measure.solutions(learner, learner.init(0), problem, measure.training_sites(result), 40)
    average = measure.started(learner, measure.average(designs))
    gains = [measure.scores(learner, s, problem, new, 2)["log_compliance"] for s in (average, result.meta_state)]
    low, _ = measure.bootstrap_interval(gains[0][:, -1] - gains[1][:, -1])
    assert low > 0
