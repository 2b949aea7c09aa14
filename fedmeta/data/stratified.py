"""Rows put in an order that spreads each class evenly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.ragged import IntArray
from fedmeta.randomness import Keys, draws, uniform


def stratified(
    labels: NDArray[Any],
    owners: IntArray,
    drawn: Keys,
    seed: int,
    purpose: str,
    round_number: int = 0,
    within: IntArray | None = None,
) -> NDArray[np.float64]:
    """Returns each row's place in (0, 1) within its class at its site: (rank + the class's phase) / count.

    Sorted by it, a site's rows have each class evenly spread (systematic sampling). The phase is one uniform draw per
    site and class, keyed by the draw of the class's first row, so that it does not hang on how a node numbers classes.

    Args:
        labels: The class of each row [rows].
        owners: Its site [rows].
        drawn: Its random draw [rows].
        seed: The run's seed.
        purpose: What the order is for.
        round_number: The round.
        within: What a class's rows are ranked by [rows]; None = by draw.
    """
    order = _by_class(drawn if within is None else within, labels, owners)
    labels, owners = labels[order], owners[order]
    starts = first_rows(labels, owners)
    counts = np.diff(np.append(starts, len(order)))
    phases = uniform(draws(seed, f"{purpose} phase", round_number, drawn[order[starts]]))
    ranks = np.arange(len(order)) - np.repeat(starts, counts)
    fractions = np.empty(len(order))
    fractions[order] = (ranks + np.repeat(phases, counts)) / np.repeat(counts, counts)
    return fractions


def _by_class(within: NDArray[Any], labels: NDArray[Any], owners: IntArray) -> IntArray:
    """Returns `np.lexsort((within, labels, owners))`, of draws as one sort by one key where site and class are small.

    The key holds a draw's first 48 bits: two of a class's rows that share them, one pair in 10^14, stay as they come.
    """
    classes = int(labels.max(initial=0)) + 1
    small = (int(owners.max(initial=0)) + 1) * classes <= 1 << 16
    if not small or within.dtype != np.uint64 or labels.dtype.kind != "i" or labels.min(initial=0) < 0:
        return np.lexsort((within, labels, owners))
    groups = (owners * classes + labels).astype(np.uint64)
    order: IntArray = ((groups << np.uint64(48)) + (within >> np.uint64(16))).argsort(kind="stable")
    return order


def first_rows(labels: NDArray[Any], owners: IntArray) -> IntArray:
    """Returns where each class of each site begins among rows that are sorted by site and class."""
    first = np.ones(len(owners), dtype=np.bool_)
    first[1:] = (labels[1:] != labels[:-1]) | (owners[1:] != owners[:-1])
    return np.flatnonzero(first)
