"""For whom the server learns: the mean of all sites, the worst one, the worst share of them, or all with a leaning.

Each rule weighs the meta-gradients of a round's sites by their query losses after adaptation; the weights average to 1
over the round's sites under "cvar" and "q", and over all training sites under "worst".

| objective | weight of site i | source |
|---|---|---|
| `mean` | 1 | |
| `worst` | n p_i; p on the simplex ascends sum_i p_i L_i: p_i is multiplied by exp(rate (L_i - mean)) | Collins 2020 |
| `cvar` | 1 / share for the worst share of the round's sites, 0 for the others | Rockafellar 2000 |
| `q` | L_i^q over its mean | Li 2020, q-FFL |

Collins, Mokhtari and Shakkottai, "Task-robust model-agnostic meta-learning", arXiv 2002.04766, ascend by projected
gradients; the multiplicative step here is mirror ascent on the same problem (Sagawa et al. 2020, algorithm 1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedmeta.errors import FedmetaError
from fedmeta.experiment import Server

Floats = NDArray[np.float64]

LARGEST_STEP = 10.0
"""The largest exponent of a multiplicative step: a loss that ran away moves no weight further."""


def worst_weights(shares: Mapping[str, float], losses: Mapping[str, float], rate: float) -> dict[str, float]:
    """Returns the shares of all sites, on the simplex, after one step of ascent by a round's losses.

    Args:
        shares: Each training site's share; they add up to 1.
        losses: The query loss of the round's sites.
        rate: The step's rate.
    """
    mean = float(np.mean(list(losses.values())))
    steps = {name: float(np.clip(rate * (loss - mean), -LARGEST_STEP, LARGEST_STEP)) for name, loss in losses.items()}
    moved = {name: share * float(np.exp(steps.get(name, 0.0))) for name, share in shares.items()}
    total = sum(moved[name] for name in sorted(moved))
    return {name: value / total for name, value in moved.items()}


def cvar_weights(losses: Floats, share: float) -> Floats:
    """Returns the weight of each site [sites] under the mean of the worst share of them; they average to 1.

    The site at the edge of the share counts with the part of it that lies within.
    """
    sites = len(losses)
    order = np.argsort(-losses, kind="stable")
    inside = np.clip(share * sites - np.arange(sites), 0.0, 1.0)
    weights = np.zeros(sites)
    weights[order] = inside / share
    return weights


def q_weights(losses: Floats, q: float) -> Floats:
    """Returns the weight of each site [sites], its loss to the power of q over the mean of these.

    Raises:
        FedmetaError: A loss is below 0, which has no such power.
    """
    if (losses < 0).any():
        raise FedmetaError(
            f'[server] objective = "q": a query loss of {losses.min():.4g} is below 0, and has no power of q: take '
            '"cvar" or "worst"'
        )
    powers = np.maximum(losses, 1e-12) ** q
    weights: Floats = powers / powers.mean()
    return weights


def site_weights(
    settings: Server, losses: Mapping[str, float], shares: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Returns what each site of a round weighs beside its own weight, and the shares of all sites to remember.

    Args:
        settings: The objective and its keys.
        losses: The query loss of the round's sites, in site order.
        shares: The share of each training site, for "worst"; else empty.
    """
    names, values = list(losses), np.array(list(losses.values()), dtype=np.float64)
    if settings.objective == "worst":
        moved = worst_weights(shares, losses, settings.worst_lr)
        return {name: len(moved) * moved[name] for name in names}, moved
    if settings.objective == "cvar":
        weights = cvar_weights(values, settings.cvar_share)
    elif settings.objective == "q":
        weights = q_weights(values, settings.q)
    else:
        weights = np.ones(len(values))
    return dict(zip(names, weights.tolist(), strict=True)), dict(shares)
