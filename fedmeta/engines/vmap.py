"""All sites of a chunk at once under `torch.func.vmap`, with padding masked out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from fedmeta.engines.weighted_sum import Scores, WeightedSum
from fedmeta.learners import Learner
from fedmeta.task import Batch, Rows, Task


def meta_gradients(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> WeightedSum:
    """Returns the cohort's contribution, every site in one batched call; see `fedmeta.engines.meta_gradients`."""
    total = WeightedSum.empty(meta_state)
    add_sites(total, learner, meta_state, batch, weights)
    return total


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient to what `total` makes of them."""

    def site(support: Rows, query: Rows) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return learner.meta_gradient(meta_state, Task(support, query))

    gradients, metrics = vmap(site)(batch.support, batch.query)
    total.add(gradients, weights, metrics)


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Scores:
    """Returns the scores on the query rows after 0 ... `steps` inner steps on support, [sites, steps + 1]."""

    def site(support: Rows, query: Rows) -> Scores:
        path = learner.adaptation_path(meta_state, support, steps)
        return Scores.of(learner.score(parameters, query) for parameters in path)

    with torch.no_grad():
        return Scores(*vmap(site)(batch.support, batch.query))
