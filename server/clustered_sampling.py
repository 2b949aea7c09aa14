"""Clustered sampling: one site from each of m groups of sites that send alike.

Source: Fraboni, Vidal, Kameni and Lorenzi, "Clustered Sampling", ICML 2021, arXiv 2105.05883, algorithm 2. m
distributions over sites are made so that each site's share of all of them together is m times its weight: one site is
drawn from each, and the mean of what they send is an unbiased estimate of the weighted mean over all sites. Sites are
put together by Ward's method on the directions of what they last sent, so that a distribution holds sites that
resemble each other.

The server remembers a sketch of each site's last update, a random projection onto a few numbers that keeps angles, and
not the update. A site that has sent nothing yet has a sketch of zeros.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage

from fedmeta.randomness import generator

Floats = NDArray[np.float64]

SKETCH = 64
"""How many numbers a sketch has."""

MOST_SITES = 5000
"""Ward's method keeps a distance for each pair of sites: 100 MB for so many."""


def sketch(update: Floats, seed: int) -> Floats:
    """Returns a sketch [SKETCH] of an update [values]: each value is added to one, under a sign (Charikar 2002)."""
    random = generator(seed, "sketch")
    places, signs = random.integers(SKETCH, size=len(update)), random.integers(2, size=len(update)) * 2.0 - 1.0
    found: Floats = np.bincount(places, weights=signs * update, minlength=SKETCH).astype(np.float64)
    return found


def distributions(sketches: Floats, weights: Floats, size: int) -> Floats:
    """Returns m distributions over sites [size, sites]: rows add up to 1, and a site's column to m times its share.

    Args:
        sketches: What sites last sent [sites, SKETCH]; zeros for nothing.
        weights: What each site weighs in the mean [sites], above 0.
        size: m.
    """
    norms = np.linalg.norm(sketches, axis=1, keepdims=True)
    units = np.divide(sketches, norms, out=np.zeros_like(sketches), where=norms > 0)
    order = leaves_list(linkage(units, "ward")) if len(units) > 1 else np.zeros(1, dtype=np.int64)
    ends = np.cumsum(size * weights[order] / weights.sum())
    starts = np.concatenate([[0.0], ends[:-1]])
    rows = np.arange(size)[:, None]
    found = np.zeros((size, len(weights)))
    found[:, order] = np.clip(np.minimum(ends, rows + 1) - np.maximum(starts, rows), 0.0, None)
    shares: Floats = found / found.sum(axis=1, keepdims=True)
    return shares


def draw(chances: Floats, random: np.random.Generator) -> NDArray[np.int64]:
    """Returns how often each site is drawn [sites], once from each distribution [size, sites]."""
    ends = np.cumsum(chances, axis=1)
    points = random.uniform(size=len(chances)) * ends[:, -1]
    drawn = [int(np.searchsorted(row, point, side="right")) for row, point in zip(ends, points, strict=True)]
    return np.bincount(drawn, minlength=chances.shape[1]).astype(np.int64)
