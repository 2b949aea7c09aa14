"""Real numbers as whole multiples of a quantum in the ring of 2^64, in which masks hide them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.uint64]
Floats = NDArray[np.float64]

LARGEST = 2.0**62
"""The most quanta that a sum may have: half the ring's positive half, so that noise fits too."""


class RangeError(ValueError):
    """A site's numbers do not fit into the ring beside those of the others."""


def encode(values: Floats, quantum: float, sites: int) -> Ring:
    """Returns numbers as multiples of `quantum`, rounded to the nearest: each is off by half a quantum at most.

    Args:
        values: Finite numbers.
        quantum: What one step in the ring is worth.
        sites: Of how many sites numbers are added up; what is larger than the sum of so many can hold is refused.

    Raises:
        RangeError: A number is too large.
    """
    steps = np.rint(values / quantum)
    if not (np.abs(steps) <= LARGEST / max(1, sites)).all():
        raise RangeError(f"a number is beyond {LARGEST / max(1, sites) * quantum:.3g}, or is none")
    return steps.astype(np.int64).view(np.uint64)


WIDE = 2.0**16
"""What one step of the upper of two numbers is worth."""


def encode_wide(values: Floats, quantum: float, sites: int) -> Ring:
    """Returns numbers up to 1e22 / sites, each as two in the ring [..., 2 * numbers]: steps of 2^16, and the rest.

    Raises:
        RangeError: A number is too large.
    """
    upper = np.rint(values / WIDE) * WIDE
    return np.concatenate([encode(upper, WIDE, sites), encode(values - upper, quantum, sites)], axis=-1)


def decode_wide(ring: Ring, quantum: float) -> Floats:
    """Returns the numbers that a sum of `encode_wide`'s stands for."""
    half = ring.shape[-1] // 2
    return decode(ring[..., :half], WIDE) + decode(ring[..., half:], quantum)


def decode(ring: Ring, quantum: float) -> Floats:
    """Returns the numbers that a sum in the ring stands for."""
    found: Floats = ring.view(np.int64).astype(np.float64) * quantum
    return found
