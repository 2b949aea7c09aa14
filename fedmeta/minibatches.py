"""Mini-batches: which of its rows a site takes in each step of a round (McMahan et al. 2017, algorithm 1, "B").

A site goes through all its train rows in a drawn order, `size` rows a step, and in another order in each epoch. What is
left at the end of an epoch is a short batch and is taken as it is. An order is an array of whole numbers
[sites, epochs, batches, size]: the places of rows, -1 where there is none. A batch without a row is no step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.randomness import Keys, row_draws

IntArray = NDArray[np.int64]

Draw = Callable[[str, IntArray, IntArray], Keys]
"""Draws a number [rows] for each row, given the purpose, its position at its site and its site, as a place."""


class Minibatches(NamedTuple):
    """How a site goes through its rows in a round.

    Attributes:
        size: Rows of a step; 0 for all of them.
        epochs: Passes over all rows; 0 where `steps` are counted.
        steps: Steps, in as many passes as they take; 0 where `epochs` are counted.
        halved: Whether a step adapts on the first half of its rows and is scored by the second.
    """

    size: int
    epochs: int = 0
    steps: int = 0
    halved: bool = False


def draw_order(minibatches: Minibatches, mask: NDArray[np.bool_], draw: Draw | None = None) -> IntArray:
    """Returns the order of many sites [sites, epochs, batches, size]: the places of rows in `mask`, -1 for none.

    Args:
        minibatches: How a site goes through its rows.
        mask: Where each site's rows are [sites, n].
        draw: Draws a number for each row of an epoch; None for draws that depend on a site's number of rows alone.
    """
    counts = mask.sum(1)
    owners = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    places = np.nonzero(mask)[1]
    size = minibatches.size or max(1, int(counts.max(initial=0)))
    batches = -(-counts // size)
    epochs = minibatches.epochs
    if not epochs:
        epochs = -(-minibatches.steps // max(1, int(batches[counts > 0].min(initial=minibatches.steps))))
    most, width = max(1, int(batches.max(initial=0))), max(1, min(size, int(counts.max(initial=0))))
    order = np.full((len(counts), epochs, most, width), -1, dtype=np.int64)
    for epoch in range(epochs):
        drawn = draw(purpose_of(epoch), positions, owners) if draw else draws_of(epoch, positions)
        shuffled = places[np.lexsort((drawn, owners))]
        step, slot = positions // size, positions % size
        taken = epoch * batches[owners] + step < minibatches.steps if minibatches.steps else slice(None)
        order[owners[taken], epoch, step[taken], slot[taken]] = shuffled[taken]
    return order


def purpose_of(epoch: int) -> str:
    """Returns the purpose of an epoch's draws."""
    return f"local epoch {epoch}"


def draws_of(epoch: int, positions: IntArray) -> Keys:
    """Returns the draws of an epoch of a site that has no name, no round and no seed [rows]."""
    return row_draws(0, purpose_of(epoch), 0, np.zeros(len(positions), dtype=np.uint64), positions)
