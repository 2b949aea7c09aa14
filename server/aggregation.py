"""How the sites' replies become one gradient: their mean, or what a few false ones among them cannot drag far.

The robust ones are Flower's own strategies, called with each site's own gradient where they expect its weights; they
are indifferent to which. `f` is the assumed number of false replies, `n` that of all:

| name | what | source |
|---|---|---|
| `median` | the median of each coordinate | Yin 2018 |
| `trimmed-mean` | each coordinate's mean without the f largest and f smallest values | Yin 2018 |
| `krum` | the one gradient nearest to its n - f - 2 nearest ones | Blanchard 2017 |
| `multi-krum` | the mean of the n - f - 2 best by that measure | Blanchard 2017 |
| `bulyan` | of the n - 2f best so, each coordinate's mean of the n - 4f values nearest its median | El Mhamdi 2018 |
| `norm-bound` | the mean, with gradients longer than a multiple of the median norm shortened to it | Sun 2019 |

They all assume that honest sites resemble each other. Where sites differ, `mixing` (Allouah 2023) first replaces each
gradient by the mean of the n - f nearest to it: what honest sites have in common stays, what divides them shrinks.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import Bulyan, FedAvg, FedMedian, FedTrimmedAvg, Krum, MultiKrum
from torch import Tensor

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Server
from fedmeta.messages import TRAIN, TrainReply

Gradient = dict[str, Tensor]

MIN_REPLIES: Mapping[str, tuple[str, Callable[[int], int]]] = {
    "mean": ("1", lambda f: 1),
    "median": ("2f + 1", lambda f: 2 * f + 1),
    "trimmed-mean": ("2f + 1", lambda f: 2 * f + 1),
    "krum": ("2f + 3", lambda f: 2 * f + 3),
    "multi-krum": ("2f + 3", lambda f: 2 * f + 3),
    "bulyan": ("4f + 3", lambda f: 4 * f + 3),
    "norm-bound": ("2f + 1", lambda f: 2 * f + 1),
}
"""How many replies an aggregator needs to withstand f false ones, in words and as a function."""

STRATEGIES: Mapping[str, Callable[[int, int], FedAvg]] = {
    "median": lambda n, f: FedMedian(),
    # It cuts int(beta * n) values at either end, and beta * n = f may come out a hair below f.
    "trimmed-mean": lambda n, f: FedTrimmedAvg(beta=(f + 0.25) / n),
    "krum": lambda n, f: Krum(num_malicious_nodes=f),
    "multi-krum": lambda n, f: MultiKrum(num_malicious_nodes=f, num_nodes_to_select=n - f - 2),
    "bulyan": lambda n, f: Bulyan(num_malicious_nodes=f),
}
"""Flower's strategy for n replies of which f may be false."""

_MESSAGE: Any = Message


def aggregate_replies(replies: Sequence[TrainReply], settings: Server) -> Gradient | None:
    """Returns the gradient that the server steps along, in float64.

    Args:
        replies: The nodes' replies, in the order of their first site: sums for the mean, else gradients per site.
        settings: The aggregator and its keys.

    Returns:
        The gradient; None where too few sites gave a finite one for the aggregator to mean anything.
    """
    if settings.aggregator == "mean":
        return weighted_mean(replies)
    sites = gradients_by_site(replies)
    false = num_byzantine(settings.byzantine, len(sites))
    if len(sites) < MIN_REPLIES[settings.aggregator][1](false):
        return None
    if settings.mixing:
        sites = nearest_neighbor_mixing(sites, false)
    if settings.aggregator == "norm-bound":
        return norm_bounded_mean(sites, settings.norm_bound)
    return aggregate(STRATEGIES[settings.aggregator](len(sites), false), sites)


def check(settings: Server, sites: int) -> None:
    """Checks that a round has enough sites for the aggregator.

    Args:
        settings: The experiment's section.
        sites: The number of training sites.

    Raises:
        FedmetaError: It has not.
    """
    asked = min(settings.sites_per_round or sites, sites)
    false = num_byzantine(settings.byzantine, asked)
    words, fewest = MIN_REPLIES[settings.aggregator]
    if asked < fewest(false):
        raise FedmetaError(
            f'[server] aggregator = "{settings.aggregator}": needs {words} = {fewest(false)} sites in a round to '
            f"withstand f = {false} (byzantine = {settings.byzantine}), and a round has {asked}: "
            "raise sites_per_round or lower byzantine"
        )


def num_byzantine(byzantine: float | int, sites: int) -> int:
    """Returns how many replies of a round are assumed to be false: a count, or a share of its sites, rounded up."""
    return byzantine if isinstance(byzantine, int) else math.ceil(byzantine * sites - 1e-9)


def weighted_mean(replies: Sequence[TrainReply]) -> Gradient | None:
    """Returns the weighted mean of meta-gradients, added up in float64 in site order; None where nothing has weight."""
    weight = sum(reply.weight for reply in replies)
    return {name: value.div_(weight) for name, value in total(replies).items()} if weight > 0 else None


def total(replies: Sequence[TrainReply]) -> Gradient:
    """Returns the sum of the replies' sums, in float64."""
    first, *others = replies
    sums = {name: value.to(torch.float64, copy=True) for name, value in first.gradient.items()}
    for reply in others:
        for name, value in reply.gradient.items():
            sums[name] += value
    return sums


def gradients_by_site(replies: Sequence[TrainReply]) -> list[Gradient]:
    """Returns the finite gradients of all sites, in site order, in float64."""
    found = {
        name: {key: value[place].double() for key, value in reply.gradient.items()}
        for reply in replies
        for place, (name, finite) in enumerate(zip(reply.names, reply.finite, strict=True))
        if finite
    }
    return [found[name] for name in sorted(found)]


def nearest_neighbor_mixing(sites: Sequence[Gradient], false: int) -> list[Gradient]:
    """Returns each gradient's mean with the n - f - 1 others that are nearest to it (nearest-neighbour mixing).

    Source: Allouah et al. 2023, "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", Algorithm 2.

    Args:
        sites: The n gradients.
        false: f, how many of them may be false.
    """
    stacked = {key: torch.stack([site[key] for site in sites]) for key in sites[0]}
    flat = torch.cat([value.reshape(len(sites), -1) for value in stacked.values()], 1)
    nearest = torch.cdist(flat, flat).topk(len(sites) - false, largest=False).indices
    shares = torch.zeros(len(sites), len(sites), dtype=flat.dtype).scatter_(1, nearest, 1.0)
    shares /= len(sites) - false
    means = {key: torch.tensordot(shares, value, dims=1) for key, value in stacked.items()}
    return [{key: value[place] for key, value in means.items()} for place in range(len(sites))]


def norm_bounded_mean(sites: Sequence[Gradient], bound: float) -> Gradient:
    """Returns the mean of gradients, of which those longer than `bound` times the median norm are shortened to it."""
    norms = np.array([float(torch.stack([value.norm() for value in site.values()]).norm()) for site in sites])
    longest = bound * float(np.median(norms))
    factors = longest / np.maximum(norms, longest) if longest > 0 else np.zeros(len(sites))
    bounded = {key: torch.zeros_like(value) for key, value in sites[0].items()}
    for site, factor in zip(sites, factors.tolist(), strict=True):
        for key, value in site.items():
            bounded[key] += factor * value
    return {key: value / len(sites) for key, value in bounded.items()}


def aggregate(strategy: FedAvg, sites: Sequence[Gradient]) -> Gradient | None:
    """Returns what one of Flower's strategies makes of the sites' gradients; None where it declines."""
    with _quietly(), _few_objects():
        arrays, _ = strategy.aggregate_train(0, [_message(site) for site in sites])
    return dict(arrays.to_torch_state_dict()) if arrays is not None else None


def _message(site: Gradient) -> Message:
    """Returns a gradient as the reply that Flower's strategies expect: one record of arrays, and a weight of 1."""
    arrays = ArrayRecord({name: Array(value.numpy()) for name, value in site.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1.0})})
    # Flower's signature for users leaves out `metadata`; without it a message asks for the identity of a SuperLink.
    message: Message = _MESSAGE(content, metadata=Metadata(0, "", 0, 0, "", "", time.time(), 1.0, TRAIN))
    return message


@contextmanager
def _few_objects() -> Iterator[None]:
    """Hides what is in memory from the garbage collector: Flower calls it for every layer, a tenth of a second each."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps Flower from logging each round how many results it was given: the round's own log says that."""
    log = logging.getLogger("flwr")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
