"""Which sites of a cohort are computed together: as many as memory holds, and not short ones padded to long ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedmeta.engines import lowrank
from fedmeta.learners import Learner
from fedmeta.task import Batch, TreeBatch, row_ends

BUDGET = 1 << 29
"""How much memory the sites that are computed together may take, by prediction (512 MiB)."""

CACHE = 1 << 20
"""How much a convolution's outputs may take on a processor: it loops over sites, and many gain only in the cache.

That is not so before a low-rank layer whose weight is larger than this: each chunk reads it from memory again.
"""

MIN_FILL = 0.6
"""The share of the longest site's rows that a shorter one must have to be padded to it, where many are shorter."""


def chunk_sites(learner: Learner, meta_state: Mapping[str, Tensor], batch: Batch, engine: str, budget: int) -> int:
    """Returns how many sites can be computed together in `budget` bytes, by prediction; at least 1.

    A site keeps its rows and, for every step and in each of about four passes (forward, derivative, and backward
    through both), its activations, and its weights where it has its own.
    """
    if engine in ("loop", "program"):  # one site after the other
        return max(1, batch.sites)
    if not learner.problem.on_rows:
        own = sum(value.numel() * value.element_size() for value in learner.theta(meta_state).values())
        data = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves((batch.support, batch.query)))
        together = budget // max(1, 4 * (learner.inner_steps + 1) * (own + data // max(1, batch.sites)))
        return max(1, int(together))
    theta = learner.theta(meta_state)
    item = next(iter(theta.values())).element_size()
    steps = learner.inner_steps + 1
    support, query = (part[0].shape[1] for part in batch)
    own, activations, largest, read = sum(value.numel() for value in theta.values()), 0, 0, 0
    if engine == "lowrank":
        forms = lowrank.plan_of(learner, batch, meta_state)
        own = sum(theta[name].numel() for name in forms.dense)
        activations = sum(call.rows * call.width + call.size for call in forms.calls)
        largest = max((call.size for call in forms.calls if call.adapts and call.kind == "convolution"), default=0)
        read = max((theta[name].numel() for name in forms.lowrank), default=0)
    numbers = 4 * steps * (own + (support + query) * activations)
    numbers += 4 * (support + query) * batch.support[0][0, 0].numel()
    fits_budget, fits_cache = budget // (numbers * item), CACHE // max(1, largest * max(support, query) * item)
    looped = largest and read * item <= CACHE and batch.support[0].device.type == "cpu"
    return max(1, min(fits_budget, fits_cache) if looped else fits_budget)


def chunks(batch: Batch, size: int) -> Iterator[tuple[Tensor, Batch]]:
    """Yields the sites [k] that are computed together, and their tasks, at most `size` sites at a time.

    Sites stay in order where they have about as many rows. Where padding would take much of the work, they are grouped
    by their rows, and each group is cut to its longest site.
    """
    if isinstance(batch, TreeBatch):
        for start in range(0, batch.sites, size):
            yield (
                torch.arange(start, min(start + size, batch.sites), device=batch.device),
                batch.chunk(start, start + size),
            )
        return
    lengths = row_ends(batch.support) + row_ends(batch.query)
    longest = batch.support[0].shape[1] + batch.query[0].shape[1]
    if batch.sites == 0 or float(lengths.double().mean()) >= MIN_FILL * longest:
        everyone = torch.arange(batch.sites, device=lengths.device)
        for start in range(0, batch.sites, size):
            yield everyone[start : start + size], batch.chunk(start, start + size)
        return
    order = lengths.argsort(descending=True, stable=True)
    ranked = lengths[order].tolist()
    start = 0
    while start < batch.sites:
        stop = next((i for i in range(start, batch.sites) if ranked[i] < MIN_FILL * ranked[start]), batch.sites)
        for sites in torch.split(order[start:stop].sort().values, size):
            yield sites, batch.take(sites).cut()
        start = stop
