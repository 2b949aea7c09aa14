"""A site's own steps in a round: mini-batch descent over all its rows (McMahan et al. 2017, algorithm 1).

An own problem, whose data have no rows, and a solver that keeps a memory from step to step or takes no gradient steps
have no mini-batches: there each step is on all the data of the task, and `inner_steps` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmeta.learners.inner import Objective
from fedmeta.minibatches import Minibatches, draw_order, draws_of
from fedmeta.models import Parameters
from fedmeta.noise import at_step
from fedmeta.problems.problem import Problem
from fedmeta.problems.solvers import run_solver
from fedmeta.problems.supervised import Supervised, all_rows
from fedmeta.task import Batch, OrderedTask, Rows, Task

if TYPE_CHECKING:
    from fedmeta.learners.learner import Learner

Change = Callable[[Objective], Objective]
"""Changes what is descended, such as by a pull to the start."""


def in_batches(problem: Problem) -> bool:
    """Returns whether a problem's data can be taken in mini-batches: rows whose loss is a mean over any of them."""
    return (
        isinstance(problem, Supervised) and type(problem).all_data is Supervised.all_data and problem.solver.memoryless
    )


def minibatches_of(problem: Problem, size: int, epochs: int) -> Minibatches | None:
    """Returns `epochs` passes over a problem's rows in batches of `size` (0 = all); None where it has no rows."""
    return Minibatches(size, epochs) if in_batches(problem) else None


def with_order(learner: Learner, batch: Batch) -> Batch:
    """Returns a batch with the order in which a learner takes rows, where it takes them in mini-batches.

    Tasks from a node have theirs, drawn by seed, round and site. That of others depends on their number of rows alone.
    """
    minibatches = learner.minibatches
    if minibatches is None or minibatches.halved or batch.order is not None:
        return batch
    mask = torch.cat([batch.support[2], batch.query[2]], 1) > 0
    order = torch.from_numpy(draw_order(minibatches, mask.cpu().numpy())).to(batch.device)
    return replace(batch, order=order)


def order_of(task: Task, minibatches: Minibatches) -> Tensor:
    """Returns a task's order of rows [epochs, batches, size]: its own, or one that its number of rows decides."""
    if isinstance(task, OrderedTask):
        return task.order
    rows = sum(len(part[0]) for part in task)
    device = task.support[0].device
    if len(task.support) == len(task.query) == 2:
        return torch.from_numpy(draw_order(minibatches, np.ones((1, rows), dtype=np.bool_))[0]).to(device)
    # With a mask, which under `vmap` cannot be looked at: the same order, with batches of none.
    present = all_rows(*task)[2] > 0
    ranks, count = present.cumsum(0) - 1, present.sum()
    size = minibatches.size or max(1, rows)
    batches, epochs = -(-count // size), minibatches.epochs or minibatches.steps
    places = torch.arange(max(1, -(-rows // size)) * size, device=device)
    order = []
    for epoch in range(epochs):
        drawn = torch.from_numpy((draws_of(epoch, np.arange(rows)) >> np.uint64(1)).astype(np.int64)).to(device)
        sortable = torch.where(present, drawn[ranks.clamp(min=0)], torch.iinfo(torch.int64).max)
        shuffled = torch.nn.functional.pad(sortable.argsort(), (0, len(places) - rows))
        taken = places < count
        if minibatches.steps:
            taken = taken & (epoch * batches + places // size < minibatches.steps)
        order.append(torch.where(taken, shuffled, -1).view(-1, size))
    return torch.stack(order)


def row_batches(task: Task, order: Tensor) -> Iterator[tuple[Rows, Tensor]]:
    """Yields the rows (x, y, mask) of each mini-batch of an order [epochs, batches, size], and if there are any."""
    x, y, mask = all_rows(*task)
    if not len(x):
        return  # a site without a row takes no step
    for epoch, batches in enumerate(order):
        for number, places in enumerate(batches):
            own = places.clamp(min=0)
            here = mask[own] * (places >= 0)
            with at_step(epoch), at_step(number):  # until the next one is asked for
                yield (x[own], y[own], here), here.sum() > 0


def count_steps(learner: Learner, task: Task) -> Tensor:
    """Returns how many steps `descend` takes: a scalar that counts mini-batches with a row, or `inner_steps`."""
    if learner.minibatches is None:
        return torch.tensor(learner.inner_steps)
    mask, order = all_rows(*task)[2] > 0, order_of(task, learner.minibatches)
    if not len(mask):
        return torch.tensor(0)
    return ((order >= 0) & mask[order.clamp(min=0)]).any(-1).sum()


def where(condition: Tensor, new: Parameters, old: Parameters) -> Parameters:
    """Returns the new parameters where a condition holds, else the old ones."""
    return {name: torch.where(condition, value, old[name]) for name, value in new.items()}


def descend(
    learner: Learner,
    start: Parameters,
    task: Task,
    rates: Mapping[str, Tensor | float],
    change: Change = lambda objective: objective,
    epochs: slice = slice(None),
    steps: int | None = None,
) -> Parameters:
    """Returns a site's parameters after its local steps.

    Args:
        learner: The learner; its `minibatches` define how the rows are taken.
        start: The parameters to start from.
        task: The site's task.
        rates: The rate of each parameter that moves; the others stay.
        change: What is done to the objective of each step.
        epochs: Which of the order's epochs are taken.
        steps: Where there are no mini-batches, the number of full-batch steps; None for `inner_steps`.
    """
    problem, minibatches = learner.problem, learner.minibatches
    if minibatches is None:
        whole = change(lambda own: learner.all_data(own, task))
        count = learner.inner_steps if steps is None else steps
        return run_solver(problem, lambda own, _: whole(own), start, task.support, lambda _: rates, count)[-1]
    own = start
    for rows, there in row_batches(task, order_of(task, minibatches)[epochs]):
        own = where(there, _step(learner, own, rows, rates, change), own)
    return own


def _step(
    learner: Learner, own: Parameters, rows: Rows, rates: Mapping[str, Tensor | float], change: Change
) -> Parameters:
    objective = change(lambda parameters: learner.inner(parameters, rows))
    path: Sequence[Parameters] = run_solver(
        learner.problem, lambda parameters, _: objective(parameters), own, rows, lambda _: rates, 1
    )
    return path[-1]
