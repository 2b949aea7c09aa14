"""Learners that keep a personal part at the site, for many sites at once.

A personal part is a dictionary of tensors by the module's own names; here each is stacked along a leading site axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from fedmeta.engines.weighted_sum import Figures, WeightedSum, join_figures, stack_path
from fedmeta.learners import Learner
from fedmeta.models import Parameters
from fedmeta.task import Batch, Task

CHUNK_BYTES = 1 << 29
"""How much memory the sites that are computed together may take, by prediction (512 MiB)."""


def train_personal(
    learner: Learner,
    meta_state: Mapping[str, Tensor],
    batch: Batch,
    weights: Tensor,
    personal: Parameters,
    *,
    clip_norm: float = 0.0,
    per_site: bool = False,
) -> tuple[dict[str, Tensor], float, dict[str, Tensor], Parameters]:
    """Computes what the sites of a cohort send, and the personal parts that they keep.

    Args:
        learner: The learner.
        meta_state: The meta-state.
        batch: The sites' tasks.
        weights: The weight of each site [sites].
        personal: What each site kept from its last round, or `learner.personal(meta_state)`, stacked [sites, ...].
        clip_norm: As for `fedmeta.engines.meta_gradients`.
        per_site: As for `fedmeta.engines.meta_gradients`.

    Returns:
        The weighted sum in float64, or with `per_site` the sites' gradients as they are; total weight and figures as
        `fedmeta.engines.meta_gradients` does; and the new personal parts stacked; that of a site whose share was not
        finite is the old one.
    """

    def site(support: Any, query: Any, own: Parameters) -> tuple[dict[str, Tensor], dict[str, Tensor], Parameters]:
        return learner.train(meta_state, Task(support, query), own)

    total = WeightedSum.empty(meta_state, clip_norm, per_site)
    kept: list[Parameters] = []
    size = _together(learner, batch)
    for start in range(0, batch.sites, size):
        part, stop = batch.chunk(start, start + size), start + size
        old = {name: value[start:stop] for name, value in personal.items()}
        gradients, metrics, new = vmap(site)(part.support, part.query, old)
        finite = torch.stack([value.flatten(1).isfinite().all(1) for value in new.values()]).all(0)
        # A personal part that ran away counts like a gradient that did: the site has no share in this round.
        first = next(iter(gradients))
        gradients[first] = torch.where(_like(finite, gradients[first]), gradients[first], torch.nan)
        total.add(gradients, weights[start:stop].to(part.device), metrics)
        kept.append({name: torch.where(_like(finite, value), value, old[name]) for name, value in new.items()})
    figures = {name: torch.cat(values) for name, values in total.metrics.items()}
    new_parts = {name: torch.cat([part[name] for part in kept]) for name in personal}
    return total.stacked() if per_site else total.total, total.weight, figures, new_parts


def evaluate_personal(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, steps: int, personal: Parameters
) -> Figures:
    """Returns the scores of sites that continue from their personal parts [sites, ...]."""

    def site(support: Any, query: Any, own: Parameters) -> Figures:
        path = learner.adaptation_path(meta_state, support, steps, own)
        return stack_path(learner.evaluate(parameters, query) for parameters in path)

    parts = []
    size = _together(learner, batch)
    for start in range(0, batch.sites, size):
        part = batch.chunk(start, start + size)
        own = {name: value[start : start + size] for name, value in personal.items()}
        parts.append({name: value.detach() for name, value in vmap(site)(part.support, part.query, own).items()})
    return join_figures(parts)


def stack_personal(learner: Learner, meta_state: Mapping[str, Tensor], kept: list[Parameters | None]) -> Parameters:
    """Returns the sites' personal parts stacked; a site that kept none begins with the learner's own."""
    start = learner.personal(meta_state)
    return {name: torch.stack([(own or start)[name].to(first) for own in kept]) for name, first in start.items()}


def _together(learner: Learner, batch: Batch) -> int:
    """Returns how many sites to compute together: one for convolutions, whose batched form is slower."""
    if not learner.problem.on_rows:
        return batch.sites
    if any(isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) for layer in learner.network.module.modules()):
        return 1
    parameters = sum(value.numel() for value in learner.network.module.parameters())
    rows = batch.support[0][0].numel() + batch.query[0][0].numel()
    return max(1, CHUNK_BYTES // (8 * (parameters * (2 + 3 * learner.inner_steps) + 4 * rows)))


def _like(sites: Tensor, values: Tensor) -> Tensor:
    return sites.reshape(-1, *[1] * (values.dim() - 1))
