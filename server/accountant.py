"""What a private run has spent: epsilon after some rounds, by Flower's accountant.

A round is one Poisson-sampled Gaussian mechanism: each training site takes part with the probability
`sites_per_round / sites`, independently; its clipped gradient adds at most `clip_norm` to the sum; the sum gets normal
noise of standard deviation `noise_multiplier * clip_norm`. Two federations are neighbours where one has one site more
than the other. Rounds compose by their Renyi divergences (Mironov, Talwar and Zhang 2019), which Flower's
`RdpAccountant` takes from Google's dp-accounting.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod

from fedmeta.errors import FedmetaError

ORDERS = (*map(float, range(2, 33)), 40.0, 48.0, 64.0, 96.0, 128.0, 256.0)
"""The Renyi orders among which the accountant takes the best: its own ones, fractions among them, take thirty times
longer, and every round asks. Fewer orders can only make epsilon larger: by less than 0.01 up to an epsilon of 10."""


@dataclass(frozen=True)
class Accountant:
    """The terms of a run's rounds, which do not change.

    Attributes:
        sites: The number of training sites.
        expected: The expected number of them in a round.
        noise_multiplier: The noise's standard deviation, in multiples of the longest contribution of one site.
        delta: The probability with which epsilon may not hold.
    """

    sites: int
    expected: int
    noise_multiplier: float
    delta: float

    def epsilon(self, rounds: int) -> float:
        """Returns epsilon after a number of rounds.

        Raises:
            FedmetaError: The package that computes it is not there.
        """
        return _epsilon(self, rounds) if rounds else 0.0

    def rounds_within(self, epsilon: float, most: int) -> int:
        """Returns how many rounds an epsilon allows, at most `most`."""
        fewest = 0
        while fewest < most:
            middle = (fewest + most + 1) // 2
            if self.epsilon(middle) <= epsilon:
                fewest = middle
            else:
                most = middle - 1
        return fewest


@lru_cache(maxsize=1024)
def _epsilon(terms: Accountant, rounds: int) -> float:
    # It says of orders that do not converge that it leaves them out, which can make epsilon larger and not smaller.
    logging.getLogger("absl").setLevel(logging.ERROR)
    relation, sampling = NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.POISSON
    try:
        accountant = RdpAccountant(PrivacyConfig(terms.delta, terms.sites, relation, sampling), ORDERS)
    except ImportError as error:
        raise FedmetaError(
            f'[privacy] noise_multiplier: the accountant needs a package ({error}): pip install "fedmeta[dp]"'
        ) from None
    accountant.compose(GaussianPrivacyEvent(terms.noise_multiplier, terms.expected, terms.sites), rounds)
    return accountant.get_epsilon(terms.delta)
