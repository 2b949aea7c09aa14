"""The reference: one site after the other, each by the learner's own equations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmeta.engines.weighted_sum import Figures, WeightedSum, stack_path, summed
from fedmeta.learners import Learner
from fedmeta.learners.local_steps import with_order
from fedmeta.learners.message import asked, message
from fedmeta.noise import at_site
from fedmeta.problems.supervised import OUTPUTS
from fedmeta.task import Batch


def add_sites(
    total: WeightedSum, learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, weights: Tensor
) -> None:
    """Adds each site's gradient to what `total` makes of them."""
    batch = with_order(learner, batch)
    keys = batch.noise_keys()
    for site in range(batch.sites):
        with at_site(keys[site]):
            gradient, metrics = message(learner, meta_state, batch.task(site))
        stacked = {name: value.unsqueeze(0) for name, value in gradient.items()}
        figures = {name: value.unsqueeze(0) for name, value in metrics.items()}
        total.add(stacked, weights[site : site + 1], figures)


meta_gradients = summed(add_sites)


def evaluate(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int) -> Figures:
    """Returns the figures on the query data after 0 ... `steps` inner steps on support, [sites, steps + 1]."""
    sites, keys = [], batch.noise_keys()
    for site in range(batch.sites):
        task = batch.task(site)
        with at_site(keys[site]):
            path = asked(learner, "adaptation_path", learner.adaptation_path, meta_state, task.support, steps)
        with torch.no_grad():
            found = stack_path(
                asked(learner, "evaluate", learner.evaluate, parameters, task.query) for parameters in path
            )
        if OUTPUTS in found:
            found[OUTPUTS] = in_place(found[OUTPUTS], batch.query[2][site])
        sites.append(found)
    return stack_path(sites)


def in_place(outputs: Tensor, mask: Tensor) -> Tensor:
    """Returns outputs [steps, rows, k] of a site without padding where its rows are in the batch [steps, n, k]."""
    whole = outputs.new_zeros(outputs.shape[0], len(mask), *outputs.shape[2:])
    whole[:, mask > 0] = outputs
    return whole
