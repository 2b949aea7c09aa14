"""All sites of a chunk at once under `torch.func.vmap`, with padding masked out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedmeta.engines.weighted_sum import Figures, WeightedSum, stack_path
from fedmeta.learners import Learner
from fedmeta.learners.local_steps import with_order
from fedmeta.task import Batch, orders, task_of


def meta_gradients(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> WeightedSum:
    """Returns the cohort's contribution, every site in one batched call; see `fedmeta.engines.meta_gradients`."""
    total = WeightedSum.empty(learner.message_template(meta_state))
    add_sites(total, learner, meta_state, batch, weights)
    return total


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient to what `total` makes of them."""
    batch = with_order(learner, batch)

    def site(support: Any, query: Any, *order: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return learner.message(meta_state, task_of(support, query, *order))

    gradients, metrics = vmap(site)(batch.support, batch.query, *orders(batch))
    total.add(gradients, weights, metrics)


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Figures:
    """Returns the figures on the query data after 0 ... `steps` inner steps on support, [sites, steps + 1]."""

    def site(support: Any, query: Any) -> Figures:
        path = learner.adaptation_path(meta_state, support, steps)
        return stack_path(learner.evaluate(parameters, query) for parameters in path)

    with torch.no_grad():
        figures: Figures = vmap(site)(batch.support, batch.query)
        return figures
