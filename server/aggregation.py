"""How the sites' replies become one gradient: their mean, or what a few false ones among them cannot drag far.

A robust rule maps the sites' gradients, a matrix [sites, values], to one gradient [values]. `f` is the assumed number
of false replies, `n` that of all:

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

`server.aggregator = "package.module:function"` names an own rule, such as `median` below: a function from that matrix,
in float64 and in site order, to a gradient [values].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fedmeta.build import load_code
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Server
from fedmeta.messages import TrainReply

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
"""How many replies an aggregator needs to withstand f false ones, as text and as a function; an own one needs 1."""


# The rules


def median(gradients: Tensor) -> Tensor:
    """Returns the median of each coordinate [values] of gradients [sites, values]; of two middle ones the mean."""
    ordered = gradients.sort(dim=0).values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def trimmed_mean(gradients: Tensor, false: int) -> Tensor:
    """Returns each coordinate's mean without its `false` largest and smallest values."""
    return gradients.sort(dim=0).values[false : len(gradients) - false].mean(0)


def krum_scores(gradients: Tensor, false: int) -> Tensor:
    """Returns each gradient's sum of squared distances to the n - f - 2 others nearest to it [sites]."""
    # Distances by differences: those by inner products lose what lies close together far from 0.
    distances = torch.cdist(gradients, gradients, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances.fill_diagonal_(math.inf)
    return distances.sort(dim=1).values[:, : len(gradients) - false - 2].sum(1)


def multi_krum(gradients: Tensor, false: int, chosen: int) -> Tensor:
    """Returns the mean of the `chosen` gradients with the lowest scores; with one of them, Krum."""
    return gradients[krum_scores(gradients, false).argsort(stable=True)[:chosen]].mean(0)


def bulyan(gradients: Tensor, false: int) -> Tensor:
    """Returns each coordinate's mean of the n - 4f values nearest its median, of the n - 2f best gradients by Krum."""
    best = gradients[krum_scores(gradients, false).argsort(stable=True)[: len(gradients) - 2 * false]]
    order = (best - median(best)).abs().argsort(dim=0, stable=True)[: len(best) - 2 * false]
    return best.gather(0, order).mean(0)


def norm_bounded_mean(gradients: Tensor, bound: float) -> Tensor:
    """Returns the mean of gradients, of which those longer than `bound` times the median norm are shortened to it."""
    norms = gradients.norm(dim=1)
    longest = bound * median(norms[:, None])
    factors = torch.where(norms > longest, longest / norms.clamp(min=torch.finfo(norms.dtype).tiny), 1.0)
    return (factors[:, None] * gradients).mean(0)


def nearest_neighbor_mixing(gradients: Tensor, false: int) -> Tensor:
    """Returns each gradient's mean with the n - f - 1 others that are nearest to it [sites, values].

    Source: Allouah et al. 2023, "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", Algorithm 2.
    """
    sites = len(gradients)
    distances = torch.cdist(gradients, gradients, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(sites - false, largest=False).indices
    shares = torch.zeros(sites, sites, dtype=gradients.dtype).scatter_(1, nearest, 1.0) / (sites - false)
    return shares @ gradients


# A round


def aggregate_replies(replies: Sequence[TrainReply], settings: Server) -> Gradient | None:
    """Returns the gradient that the server steps along, in float64.

    Args:
        replies: The nodes' replies, in the order of their first site: sums for the mean, else gradients per site.
        settings: The aggregator and its keys.

    Returns:
        The gradient; None where too few sites gave a finite one for the aggregator to mean anything.

    Raises:
        FedmetaError: An own aggregator fails, or returns something else than one gradient.
    """
    if settings.aggregator == "mean":
        return weighted_mean(replies)
    sites = gradients_by_site(replies)
    false = num_byzantine(settings.byzantine, len(sites))
    if len(sites) < max(1, _fewest(settings, false)):
        return None
    matrix = torch.stack([torch.cat([value.reshape(-1) for value in site.values()]) for site in sites])
    if settings.mixing:
        matrix = nearest_neighbor_mixing(matrix, false)
    return _unflattened(_apply(settings, matrix, false), sites[0])


def check(settings: Server, sites: int) -> None:
    """Checks that a round has enough sites for the aggregator.

    Args:
        settings: The experiment's section.
        sites: The number of training sites.

    Raises:
        FedmetaError: It has not.
    """
    if ":" in settings.aggregator:
        load_code(settings.aggregator, "[server] aggregator")
    asked = min(settings.sites_per_round or sites, sites)
    false = num_byzantine(settings.byzantine, asked)
    fewest = _fewest(settings, false)
    if asked < fewest:
        raise FedmetaError(
            f'[server] aggregator = "{settings.aggregator}": needs {MIN_REPLIES[settings.aggregator][0]} = {fewest} '
            f"sites in a round to withstand f = {false} (byzantine = {settings.byzantine}), and a round has {asked}: "
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


def _fewest(settings: Server, false: int) -> int:
    return MIN_REPLIES.get(settings.aggregator, MIN_REPLIES["mean"])[1](false)


def _apply(settings: Server, gradients: Tensor, false: int) -> Tensor:
    name, sites = settings.aggregator, len(gradients)
    if ":" in name:
        return _own(name, gradients)
    rules: Mapping[str, Callable[[], Tensor]] = {
        "median": lambda: median(gradients),
        "trimmed-mean": lambda: trimmed_mean(gradients, false),
        "krum": lambda: multi_krum(gradients, false, 1),
        "multi-krum": lambda: multi_krum(gradients, false, sites - false - 2),
        "bulyan": lambda: bulyan(gradients, false),
        "norm-bound": lambda: norm_bounded_mean(gradients, settings.norm_bound),
    }
    return rules[name]()


def _own(name: str, gradients: Tensor) -> Tensor:
    what = f'[server] aggregator = "{name}"'
    try:
        found = load_code(name, "[server] aggregator")(gradients)
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise FedmetaError(f"{what} failed on gradients of shape {tuple(gradients.shape)}: {error}") from error
    if not isinstance(found, Tensor) or found.shape != gradients.shape[1:]:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise FedmetaError(f"{what} returned {shape} for gradients [sites, values] of shape {tuple(gradients.shape)}")
    return found.detach().double()


def _unflattened(flat: Tensor, like: Gradient) -> Gradient:
    parts = torch.split(flat, [value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for part, (name, value) in zip(parts, like.items(), strict=True)}
