"""What a site does alone: a strong method on its own support, without the federation.

Rows: the best of a regularized linear model, the run's model trained to convergence, and boosted trees from 50 rows on,
chosen by cross-validation on the site's support rows alone (`evaluation.local_baseline = "auto"`).
Own problems: the solver from the run's start, with shared parameters where they begin, until the inner objective
changes by less than a millionth of itself, at most 1 000 steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from clients.local_models import fit_rows
from fedmeta.engines.loop import in_place
from fedmeta.engines.weighted_sum import Figures, stack_path
from fedmeta.experiment import Experiment
from fedmeta.learners import Learner
from fedmeta.messages import LOCAL_METHODS
from fedmeta.problems import Supervised
from fedmeta.problems.problem import Data, Parameters
from fedmeta.problems.solvers import DIFFERENTIABLE, IMPLICIT, run_solver
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.task import Batch

MOST_STEPS = 1000
TOLERANCE = 1e-6


def solve_alone(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, experiment: Experiment
) -> tuple[Figures, list[int]]:
    """Returns each site's figures [sites, 1] after solving on its support alone, and by which of `LOCAL_METHODS`.

    Args:
        learner: The run's learner; what it solves and at which inner rate is used, not how it learns.
        meta_state: The run's initial meta-state.
        batch: The sites' tasks.
        experiment: The run's description.
    """
    problem, start = learner.problem, learner.theta(meta_state)
    if isinstance(problem, Supervised) and problem.plain and experiment.evaluation.local_baseline == "auto":
        return fit_rows(learner, meta_state, batch, experiment)
    found = []
    for site, own in enumerate(_solutions(learner, start, batch)):
        task = batch.task(site)
        with torch.no_grad():
            found.append(stack_path([learner.evaluate(own, task.query)]))
        if OUTPUTS in found[-1]:
            found[-1][OUTPUTS] = in_place(found[-1][OUTPUTS], batch.query[2][site])
    method = LOCAL_METHODS.index("network" if problem.on_rows else "solver")
    return stack_path(found), [method] * batch.sites


def own_baseline(
    kind: str, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch
) -> tuple[Figures, list[int]]:
    """Returns each site's figures [sites, 1] by the problem's classical method or optimum, and its evaluations [sites].

    Args:
        kind: "classical", which is given the support data, or "optimum", an oracle that is given the query data.
        learner: The run's learner.
        meta_state: The run's initial meta-state.
        batch: The sites' tasks.
    """
    problem = learner.problem
    start = problem.constrain(learner.theta(meta_state))
    figures, evaluations = [], []
    for site in range(batch.sites):
        task = batch.task(site)
        with torch.no_grad():
            if kind == "classical":
                solved = problem.classical(start, task.support)
                own, count = solved if solved is not None else (None, 0)
            else:
                own, count = problem.optimum(start, task.query), 0
            if own is None:
                found = {m.name: torch.tensor(math.nan) for m in problem.metrics}
            else:
                own = {**start, **own}
                found = problem.evaluate(own, task.query)
            if "loss" not in found:
                found = {"loss": problem.outer(own, task.query) if own is not None else torch.tensor(math.nan), **found}
        figures.append(stack_path([found]))
        evaluations.append(int(count))
    return stack_path(figures), evaluations


def _solutions(learner: Learner, start: Parameters, batch: Batch) -> Iterator[Parameters]:
    """Yields each site's solution: many sites at once where the solver and the objective allow it, else one by one."""
    solver = learner.problem.solver
    if solver.kind == DIFFERENTIABLE and solver.memoryless and batch.sites > 1:
        try:
            together = converge_together(learner, start, batch.support, batch.sites)
        except (RuntimeError, ValueError, TypeError):
            pass  # an objective that torch.vmap does not take
        else:
            yield from ({name: value[site] for name, value in together.items()} for site in range(batch.sites))
            return
    for site in range(batch.sites):
        yield converge(learner, start, batch.task(site).support)


def converge_together(learner: Learner, start: Parameters, support: Data, sites: int) -> Parameters:
    """Returns what `converge` returns, for sites [sites, ...] at once; one that has settled stays where it is."""
    problem = learner.problem
    rates = dict.fromkeys(problem.moved, learner.inner_lr)

    def step(moving: Parameters, data: Data) -> Parameters:
        found = run_solver(problem, learner.inner, {**start, **moving}, data, lambda _: rates, 1)[-1]
        return {name: found[name].detach() for name in moving}

    steps, values = vmap(step), vmap(lambda moving, data: learner.inner({**start, **moving}, data))
    own = {name: start[name].expand(sites, *start[name].shape) for name in problem.moved}
    with torch.no_grad():
        before = values(own, support)
    active = torch.ones(sites, dtype=torch.bool, device=before.device)
    for _ in range(MOST_STEPS):
        moved = steps(own, support)
        with torch.no_grad():
            after = values(moved, support)
        # A step that blows up is not taken, and ends its site's descent.
        active = active & after.isfinite()
        own = {name: torch.where(_like(active, value), value, own[name]) for name, value in moved.items()}
        active = active & ((after - before).abs() > TOLERANCE * before.abs())
        before = torch.where(active, after, before)
        if not active.any():
            break
    return {name: own.get(name, value.expand(sites, *value.shape)) for name, value in start.items()}


def _like(sites: Tensor, value: Tensor) -> Tensor:
    return sites.reshape(-1, *[1] * (value.dim() - 1))


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
