"""Optimal client sampling: who has much to add is asked more often, and counts for less in return.

Every training site reports the norm of what it would send, u_i = w_i |U_i|. Among draws of m sites on average that
are unbiased, those with these inclusion probabilities have the least variance (Chen, Horváth and Richtárik, TMLR
2022, arXiv 2010.13723, equation 7): with the norms in ascending order and the largest l for which 0 < m + l - n <=
sum_{i<=l} u_i / u_l,

    p_i = (m + l - n) u_i / sum_{j<=l} u_j   of the l smallest,   p_i = 1   of the others

The paper draws each site by itself, and may draw none. Here the draw is systematic in a random order (Madow 1949):
the same inclusion probabilities, so that the estimate stays unbiased, and m sites every time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SMALLEST = 1e-12
"""A norm below so much of the largest one counts as 0: quotients of smaller numbers overflow."""

APPROXIMATIONS = 4
"""How often `approximate_probabilities` corrects its shares, as in the paper's experiments."""


def significant(norms: Floats) -> Floats:
    """Returns norms [sites] over the largest one, at most 1; those below `SMALLEST` are 0."""
    largest = float(norms.max(initial=0.0))
    shares = norms / largest if largest else norms
    return np.where(shares < SMALLEST, 0.0, shares)


def probabilities(norms: Floats, size: int) -> Floats:
    """Returns the inclusion probability of each site [sites], which add up to `size` where so many norms are above 0.

    Args:
        norms: The norm of each site's weighted update [sites], at least 0; where all are 0, all sites are alike.
        size: m, the expected size of the cohort, at least 1.
    """
    norms, sites = significant(norms), len(norms)
    if size >= sites:
        return np.ones(sites)
    if not norms.any():
        return np.full(sites, size / sites)
    if np.count_nonzero(norms) <= size:
        return (norms > 0).astype(np.float64)
    order = np.argsort(norms, kind="stable")
    ascending = norms[order] / norms.max()
    sums = np.cumsum(ascending)
    small = np.arange(1, sites + 1)
    room = size + small - sites
    fits = (room > 0) & (room * ascending <= sums * (1 + 1e-12))
    largest = int(np.flatnonzero(fits).max()) + 1
    found = np.ones(sites)
    found[order[:largest]] = (size + largest - sites) * ascending[:largest] / sums[largest - 1]
    return np.clip(found, 0.0, 1.0)


def approximate_probabilities(norms: Floats, size: int, times: int = APPROXIMATIONS) -> Floats:
    """Returns nearly the same from sums over sites alone, which a server may know where single norms stay hidden.

    The paper's algorithm 2: each site has p_i = min(m u_i / sum u, 1), and then `times` times those below 1 are
    multiplied by (m - n + number below 1) / (their sum), at most to 1.

    Args:
        norms: As for `probabilities`; only their sum, and sums and counts of shares, are used.
        size: As for `probabilities`.
        times: How often the shares are corrected.
    """
    norms, sites = significant(norms), len(norms)
    total = float(norms.sum())
    if size >= sites:
        return np.ones(sites)
    if not total:
        return np.full(sites, size / sites)
    found = np.minimum(size * norms / total, 1.0)
    for _ in range(times):
        below = found < 1
        left = float(found[below].sum())
        if not left:
            break
        factor = (size - sites + int(below.sum())) / left
        if factor <= 1:
            break
        found[below] = np.minimum(found[below] * factor, 1.0)
    return found


def systematic(chances: Floats, random: np.random.Generator) -> NDArray[np.int64]:
    """Returns the places of drawn sites, ascending: each is drawn with its chance; their number is the chances' sum.

    Source: Madow 1949. Where the sum is no whole number, the number of sites is one of the two beside it.

    Args:
        chances: The inclusion probability of each site [sites], at most 1.
        random: A seeded generator.
    """
    order = random.permutation(len(chances))
    ends = np.cumsum(chances[order])
    # Rounding must not decide whether the last site is drawn.
    ends *= round(ends[-1], 9) / ends[-1] if ends[-1] else 1.0
    points = np.arange(random.uniform(), ends[-1], 1.0)
    return np.sort(order[np.unique(np.searchsorted(ends, points, side="right").clip(max=len(chances) - 1))])
