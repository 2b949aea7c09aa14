"""Which sites take part in a round, and which are evaluated: draws that depend on names and seeds, not on nodes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmeta.randomness import generator
from server.federation import Federation


def sample_cohort(training: NDArray[np.int64], size: int, seed: int, round_number: int) -> NDArray[np.int64]:
    """Returns the training sites [size] that take part in a round, ascending: a draw without replacement.

    The draw depends on the seed, the round and the sorted list of training sites, not on nodes; its cost depends on
    the cohort's size and not on the population's. A size of 0, or above the number of sites, means all.
    """
    if size == 0 or size >= len(training):
        return training
    drawn = generator(seed, "cohort", round_number).choice(len(training), size, replace=False, shuffle=False)
    return training[np.sort(drawn)]


def sites_to_evaluate(federation: Federation, most: int, seed: int) -> NDArray[np.int64]:
    """Returns the sites that every evaluation of a run visits, ascending; at most `most` (0 = all), new sites first."""
    if most == 0 or most >= len(federation.names):
        return np.arange(len(federation.names))
    random = generator(seed, "evaluated sites")
    new, training = np.flatnonzero(federation.new), np.flatnonzero(~federation.new)
    chosen = new if len(new) <= most else random.choice(new, most, replace=False, shuffle=False)
    rest = random.choice(training, most - len(chosen), replace=False, shuffle=False)
    return np.sort(np.concatenate([chosen, rest]))
