"""All sites of a chunk at once under `torch.func.vmap`, with padding masked out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves

from fedmeta.engines.gradcheck import UnprovenError, check
from fedmeta.engines.misfit import UnsupportedModelError
from fedmeta.engines.weighted_sum import Figures, WeightedSum, stack_path, summed
from fedmeta.learners import Learner
from fedmeta.learners.local_steps import with_order
from fedmeta.learners.message import message
from fedmeta.noise import at_site
from fedmeta.problems.solvers import DIFFERENTIABLE
from fedmeta.task import Batch, orders, task_of


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient to what `total` makes of them."""
    batch = with_order(learner, batch)

    def site(support: Any, query: Any, key: Tensor, *order: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with at_site(key):
            return message(learner, meta_state, task_of(support, query, *order))

    gradients, metrics = vmap(site)(batch.support, batch.query, batch.noise_keys(), *orders(batch))
    total.add(gradients, weights, metrics)


meta_gradients = summed(add_sites)


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Figures:
    """Returns the figures on the query data after 0 ... `steps` inner steps on support, [sites, steps + 1]."""

    def site(support: Any, query: Any, key: Tensor) -> Figures:
        with at_site(key):
            path = learner.adaptation_path(meta_state, support, steps)
        return stack_path(learner.evaluate(parameters, query) for parameters in path)

    with torch.no_grad():
        figures: Figures = vmap(site)(batch.support, batch.query, batch.noise_keys())
        return figures


def fits(learner: Learner, batch: Batch, meta_state: Mapping[str, Tensor] | None = None) -> str | None:
    """Returns why sites cannot be computed so, or None if they can.

    Two sites are compared with the reference loop, once per problem, learner and form of the data. Operations without
    a batched form, paths that depend on values, and numbers that leave torch do not fit.

    Args:
        learner: The learner.
        batch: Tasks like those to come.
        meta_state: The meta-state; None for a new one.

    Raises:
        FedmetaError: The learner or the model fails by itself too.
    """
    if learner.problem.solver.kind != DIFFERENTIABLE:
        return f"its solver is {learner.problem.solver.kind}"
    leaves = tree_leaves((batch.support, batch.query))
    key = ("vmap", type(learner), *((leaf.shape[2:], leaf.dtype) for leaf in leaves))
    known = learner.problem.known
    if key not in known:
        state = learner.init(0) if meta_state is None else meta_state
        try:
            check(learner, state, batch, meta_gradients, evaluate)
        except UnprovenError as unproven:
            return str(unproven)
        except UnsupportedModelError as misfit:
            known[key] = str(misfit)
        else:
            known[key] = None
    reason: str | None = known[key]
    return reason
