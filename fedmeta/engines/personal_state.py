"""Learners that keep a personal part at the site, for many sites at once.

A personal part is a dictionary of tensors by the module's own names; here each is stacked along a leading site axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from fedmeta.engines.frozen_layers import after_frozen_layers
from fedmeta.engines.rows import check_labels, check_rows
from fedmeta.engines.vmap import fits
from fedmeta.engines.weighted_sum import Figures, WeightedSum, by_site, join_figures, stack_path
from fedmeta.errors import FedmetaError
from fedmeta.learners import Learner
from fedmeta.learners.local_steps import with_order
from fedmeta.learners.message import asked, checked
from fedmeta.models import Parameters
from fedmeta.models.attention import exact_attention
from fedmeta.noise import at_site
from fedmeta.task import Batch, orders, task_of

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
    learner, meta_state, batch = after_frozen_layers(learner, meta_state, with_order(learner, batch))
    template = learner.message_template(meta_state)

    def site(
        support: Any, query: Any, own: Parameters, key: Tensor, *order: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Parameters]:
        task = task_of(support, query, *order)
        with at_site(key):
            sent = asked(learner, "train", learner.train, meta_state, task, own)
        if not isinstance(sent, tuple) or len(sent) != 3 or not isinstance(sent[2], Mapping):
            raise FedmetaError(
                f"learner {type(learner).__name__}: train must return (gradient, figures, personal part)"
            )
        return (*checked(learner, sent[:2], template), dict(sent[2]))

    total = WeightedSum.empty(meta_state, clip_norm, per_site)
    kept: list[Parameters] = []
    size, over_sites = _ready(learner, meta_state, batch)
    for start in range(0, batch.sites, size):
        part, stop = batch.chunk(start, start + size), start + size
        old = {name: value[start:stop] for name, value in personal.items()}
        gradients, metrics, new = over_sites(site, part, old)
        finite = torch.stack([by_site(value).isfinite().all(1) for value in new.values()]).all(0)
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
    learner, meta_state, batch = after_frozen_layers(learner, meta_state, batch)

    def site(support: Any, query: Any, own: Parameters, key: Tensor) -> Figures:
        with at_site(key):
            path = asked(learner, "adaptation_path", learner.adaptation_path, meta_state, support, steps, own)
        return stack_path(asked(learner, "evaluate", learner.evaluate, parameters, query) for parameters in path)

    parts = []
    size, over_sites = _ready(learner, meta_state, batch)
    for start in range(0, batch.sites, size):
        part = batch.chunk(start, start + size)
        own = {name: value[start : start + size] for name, value in personal.items()}
        parts.append({name: value.detach() for name, value in over_sites(site, part, own).items()})
    return join_figures(parts)


def stack_personal(learner: Learner, meta_state: Mapping[str, Tensor], kept: list[Parameters | None]) -> Parameters:
    """Returns the sites' personal parts stacked; a site that kept none begins with the learner's own."""
    start = learner.personal(meta_state)
    return {name: torch.stack([(own or start)[name].to(first) for own in kept]) for name, first in start.items()}


def _ready(
    learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch
) -> tuple[int, Callable[[Callable[..., Any], Batch, Parameters], Any]]:
    """Returns how many sites to compute together, and how, once model and labels have been checked."""
    check_rows(learner, meta_state, batch)
    check_labels(learner, batch)
    batched = fits(learner, batch, meta_state) is None
    return _together(learner, batch), _batched if batched else _one_by_one


def _batched(site: Callable[..., Any], batch: Batch, own: Parameters) -> Any:
    with exact_attention():
        return vmap(site)(batch.support, batch.query, own, batch.noise_keys(), *orders(batch))


def _one_by_one(site: Callable[..., Any], batch: Batch, own: Parameters) -> Any:
    """Returns what `vmap` would, for models and learners that it does not take; padding stays, masked."""
    keys, every = batch.noise_keys(), []
    for k in range(batch.sites):
        parts = (tree_map(itemgetter(k), part) for part in (batch.support, batch.query))
        with exact_attention():
            kept = {name: value[k] for name, value in own.items()}
            every.append(site(*parts, kept, keys[k], *(order[k] for order in orders(batch))))
    return tree_map(lambda *leaves: torch.stack(leaves), *every)


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
