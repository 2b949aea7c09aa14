"""A cohort of one's own: sites take turns, so that none waits longer than it must."""

from collections.abc import Sequence

import numpy as np


def in_turn(
    sites: Sequence[str], rows: Sequence[int], size: int, round: int, random: np.random.Generator
) -> Sequence[str]:
    """Returns the next `size` sites of a fixed order, which starts again at its end."""
    first = (round - 1) * size
    return [sites[place % len(sites)] for place in range(first, first + size)]
