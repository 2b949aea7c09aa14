"""Which sites take part in a round, and which are evaluated: draws that depend on names and seeds, not on nodes.

`server.sampling = "package.module:function"` names an own draw of the cohort: a function of the training sites' names
and train rows, the cohort's size, the round and a seeded generator, to the names of the round's sites.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedmeta.build import load_code
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Server
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


def draw_cohort(federation: Federation, settings: Server, seed: int, round_number: int) -> NDArray[np.int64]:
    """Returns the sites of a round, ascending: uniformly drawn, or by the function that `server.sampling` names.

    Draws by norms and from clusters need more than names (`server.cohorts`); here they count as uniform ones.

    Raises:
        FedmetaError: That function fails, or does not return names of training sites, each once.
    """
    training, size = federation.training, settings.sites_per_round
    if ":" not in settings.sampling:
        return sample_cohort(training, size, seed, round_number)
    names = [federation.names[site] for site in training]
    rows = federation.train_rows[training].tolist()
    what = f'[server] sampling = "{settings.sampling}"'
    random = generator(seed, "own sampling", round_number)
    most = min(size or len(training), len(training))
    try:
        found = list(load_code(settings.sampling, "[server] sampling")(names, rows, most, round_number, random))
    except FedmetaError:
        raise
    except Exception as error:  # whatever a user's own code raises
        raise FedmetaError(f"{what} failed in round {round_number}: {error}") from error
    known = set(names)
    for name in found:
        if name not in known:
            raise FedmetaError(f"{what} returned {name!r:.80}, which is no training site{nearest(str(name), names)}")
    if not found or len(set(found)) < len(found):
        raise FedmetaError(
            f"{what} must return at least one site and none twice; in round {round_number}: {found!r:.80}"
        )
    return federation.indices(found)


def sites_to_evaluate(federation: Federation, most: int, seed: int) -> NDArray[np.int64]:
    """Returns the sites that every evaluation of a run visits, ascending; at most `most` (0 = all), new sites first."""
    if most == 0 or most >= len(federation.names):
        return np.arange(len(federation.names))
    random = generator(seed, "evaluated sites")
    new, training = np.flatnonzero(federation.new), np.flatnonzero(~federation.new)
    chosen = new if len(new) <= most else random.choice(new, most, replace=False, shuffle=False)
    rest = random.choice(training, most - len(chosen), replace=False, shuffle=False)
    return np.sort(np.concatenate([chosen, rest]))
