"""What a site does alone: a strong method on its own support, without the federation.

Rows: the best of a regularized linear model, the run's model trained to convergence, and boosted trees from 50 rows on,
chosen by cross-validation on the site's support rows alone (`evaluation.local_baseline = "auto"`).
Own problems: the solver from the run's start, with shared parameters where they begin, until the inner objective
changes
by less than a millionth of itself, at most 1 000 steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from clients.local_models import fit_rows
from fedmeta.engines.loop import in_place
from fedmeta.engines.weighted_sum import Figures, stack_path
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.problems import Supervised
from fedmeta.problems.problem import Data, Parameters
from fedmeta.problems.solvers import DIFFERENTIABLE, IMPLICIT, run_solver
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.task import Batch

MOST_STEPS = 1000
TOLERANCE = 1e-6


def solve_alone(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, experiment: Experiment) -> Figures:
    """Returns each site's figures [sites, 1] after solving on its support alone, from the run's start.

    Args:
        learner: The run's learner; what it solves and at which inner rate is used, not how it learns.
        meta_state: The run's initial meta-state.
        batch: The sites' tasks.
        experiment: The run's description.
    """
    problem, start = learner.problem, learner.theta(meta_state)
    if isinstance(problem, Supervised) and problem.plain and experiment.evaluation.local_baseline == "auto":
        return fit_rows(learner, start, batch, experiment)
    found = []
    for site in range(batch.sites):
        task = batch.task(site)
        own = converge(learner, start, task.support)
        with torch.no_grad():
            found.append(stack_path([learner.evaluate(own, task.query)]))
        if OUTPUTS in found[-1]:
            found[-1][OUTPUTS] = in_place(found[-1][OUTPUTS], batch.query[2][site])
    return stack_path(found)


def converge(learner: Learner, start: Parameters, data: Data) -> Parameters:
    """Returns the parameters where the solver's inner objective has settled."""
    problem = learner.problem
    rates = dict.fromkeys(problem.moved, learner.inner_lr)
    own, best = start, start
    with torch.no_grad():
        before = float(learner.inner(own, data))
    if problem.solver.kind != DIFFERENTIABLE:
        steps = learner.inner_steps if problem.solver.kind == IMPLICIT else MOST_STEPS // 10
        path = run_solver(problem, learner.inner, own, data, lambda _: rates, steps)
        return {name: value.detach() for name, value in path[-1].items()}
    # A solver with a memory takes all its steps at once.
    size = 1 if problem.solver.memoryless else MOST_STEPS
    for _ in range(0, MOST_STEPS, size):
        for step in run_solver(problem, learner.inner, own, data, lambda _: rates, size)[1:]:
            own = {name: value.detach() for name, value in step.items()}
            with torch.no_grad():
                after = float(learner.inner(own, data))
            if not math.isfinite(after):
                return best
            best = own
            if abs(after - before) <= TOLERANCE * abs(before):
                return best
            before = after
    return best
