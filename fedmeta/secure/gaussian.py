"""The discrete Gaussian: noise that is whole numbers, so that sums of it in the ring are exact.

Source: Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", Algorithms 1 to 3: a
discrete Laplace number is drawn, and kept with the chance that makes the outcome Gaussian. Chances are compared with 53
random bits.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.int64]


def discrete_gaussian(deviation: float, count: int) -> Whole:
    """Returns so many whole numbers with chances in proportion to exp(-x^2 / (2 deviation^2)).

    They come from the system's entropy: noise that can be computed can be subtracted.

    Args:
        deviation: The standard deviation, in steps of the ring; above 0 and below 2^50.
        count: How many.
    """
    scale = math.floor(deviation) + 1
    parts: list[Whole] = []
    missing = count
    while missing > 0:
        drawn = _discrete_laplace(scale, int(1.6 * missing) + 64)
        far = (np.abs(drawn).astype(np.float64) - deviation**2 / scale) ** 2 / (2 * deviation**2)
        kept = drawn[_uniform(len(drawn)) < np.exp(-far)]
        parts.append(kept[:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _discrete_laplace(scale: int, count: int) -> Whole:
    """Returns whole numbers with chances in proportion to exp(-|x| / scale); fewer than asked for."""
    low = (_uniform(count) * scale).astype(np.int64)  # uniform in 0 ... scale - 1
    kept = low[_uniform(count) < np.exp(-low / scale)]
    high = np.floor(np.log(np.maximum(_uniform(len(kept)), 2.0**-53)) / -1.0).astype(np.int64)  # geometric, 1 - 1/e
    size = kept + scale * high
    negative = _uniform(len(kept)) < 0.5
    fine = ~(negative & (size == 0))
    found: Whole = np.where(negative, -size, size)[fine]
    return found


def _uniform(count: int) -> NDArray[np.float64]:
    """Returns uniform numbers in [0, 1), with 53 bits each, from the system's entropy."""
    bits = np.frombuffer(os.urandom(8 * count), dtype=np.uint64) >> np.uint64(11)
    found: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return found
