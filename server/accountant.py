"""What a private run has spent: epsilon after some rounds, by privacy loss distributions.

A round is one Poisson-sampled Gaussian mechanism: each training site takes part with the probability
`sites_per_round / sites`, independently; its clipped gradient adds at most `clip_norm` to the sum; the sum gets normal
noise of standard deviation `noise_multiplier * clip_norm`. Two federations are neighbors where one has one site more
than the other. Rounds compose by the distribution of their privacy loss (Koskela, Jälkö and Honkela 2020; Doroshenko et
al. 2022), which Google's dp-accounting computes. Its error is one-sided: epsilon is never too small, and on the grid of
`INTERVAL` at most 0.002 too large up to an epsilon of 20 (tests/server/test_privacy.py compares with a grid 20 times as
fine, and without sampling with the exact value of Balle and Wang 2018). For 20 of 100 sites a round, noise 2.0, delta
1e-5 and 100 rounds epsilon is 5.02; by Renyi divergences it was 5.56.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedmeta.errors import FedmetaError

INTERVAL = 2e-3
"""The grid of privacy losses; a finer one takes longer, and every round asks."""


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
    loss = _loss_of_a_round(terms.expected / terms.sites, terms.noise_multiplier, INTERVAL)
    return float(loss.self_compose(rounds).get_epsilon_for_delta(terms.delta))


@lru_cache(maxsize=8)
def _loss_of_a_round(share: float, noise_multiplier: float, interval: float) -> Any:
    """Returns the distribution of one round's privacy loss, for sites added and sites removed."""
    # Its log reports tails that it cuts, which it counts in delta.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        from dp_accounting.pld import privacy_loss_distribution
    except ImportError as error:
        raise FedmetaError(
            f'[privacy] noise_multiplier: the accountant needs a package ({error}): pip install "fedmeta[dp]"'
        ) from None
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, value_discretization_interval=interval, sampling_prob=share
    )
