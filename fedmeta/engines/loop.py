"""The reference: one site after the other, each by the learner's own equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmeta.engines.weighted_sum import Scores, WeightedSum
from fedmeta.learners import Learner
from fedmeta.task import Batch


def meta_gradients(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor) -> WeightedSum:
    """Returns the cohort's contribution, site by site; see `fedmeta.engines.meta_gradients`."""
    total = WeightedSum.empty(meta_state)
    add_sites(total, learner, meta_state, batch, weights)
    return total


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient to what `total` makes of them."""
    for site in range(batch.sites):
        gradient, metrics = learner.meta_gradient(meta_state, batch.task(site))
        stacked = {name: value.unsqueeze(0) for name, value in gradient.items()}
        figures = {name: value.unsqueeze(0) for name, value in metrics.items()}
        total.add(stacked, weights[site : site + 1], figures)


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Scores:
    """Returns the scores on the query rows after 0 ... `steps` inner steps on support, [sites, steps + 1]."""
    sites = []
    for site in range(batch.sites):
        task = batch.task(site)
        path = learner.adaptation_path(meta_state, task.support, steps)
        with torch.no_grad():
            sites.append(Scores.of(learner.score(parameters, task.query) for parameters in path))
    return Scores.of(sites)
