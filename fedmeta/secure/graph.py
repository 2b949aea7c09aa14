"""Who is whose neighbor in a round: all, of few sites; of many, those near each other in a ring of the round's order.

A site's seed and mask key are shared among its neighbors and itself, and it masks towards its neighbors alone, so that
its work grows with log n and not with n (Bell et al. 2020). The server draws the order of each round; a server that
chooses it could surround a site with sites that it has made up (docs/secure_aggregation.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FULL = 25
"""Up to so many sites everybody is everybody's neighbor."""

FEWEST = 3
"""So many sites a round must have: in a sum over two each knows the other's part."""

SLACK = 0.7
"""In a sparse graph so much of `survivors` of a neighborhood is enough: few neighborhoods of many are all but lucky."""


@dataclass(frozen=True)
class Graph:
    """The neighborhoods of one round.

    Attributes:
        sites: How many sites are in the ring.
        degree: How many neighbors each has.
        needed: How many shares of a secret give it back.
    """

    sites: int
    degree: int
    needed: int

    def neighbors(self, place: int) -> list[int]:
        """Returns the places of a place's neighbors, ascending, without itself."""
        if self.degree >= self.sites - 1:
            return [other for other in range(self.sites) if other != place]
        half = self.degree // 2
        return sorted({(place + step) % self.sites for step in range(-half, half + 1)} - {place})

    def masked(self, place: int) -> list[int]:
        """Returns the places that a place agrees on masks with: the nearest two thirds of its neighbors."""
        return [other for other in self.neighbors(place) if self.near(place, other)]

    def near(self, place: int, other: int) -> bool:
        """Returns whether two neighbors agree on a mask.

        Masks hide a site as long as sites that are left and honest hang together by them, for which fewer are enough
        than for a secret to survive many drop-outs; and they cost the most.
        """
        apart = abs(place - other)
        return self.degree >= self.sites - 1 or min(apart, self.sites - apart) <= max(1, self.degree // 3)


def graph_of(sites: int, survivors: float) -> Graph:
    """Returns the graph of a round.

    Args:
        sites: How many sites take part.
        survivors: The share of them that must be left at the end.
    """
    if sites <= FULL:
        return Graph(sites, sites - 1, least(sites, survivors))
    degree = 2 * math.ceil(1.8 * math.log2(sites))
    return Graph(sites, degree, max(2, math.ceil(SLACK * survivors * (degree + 1))))


def least(sites: int, survivors: float) -> int:
    """Returns how many of a round's sites must be left for it to count."""
    return max(2, math.ceil(survivors * sites - 1e-9))
