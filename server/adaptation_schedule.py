"""How far sites adapt: inner steps and a multiplier of the inner rate, chosen once for the whole population.

The choice is made on validation sites, which are split off the training sites and take no part in training, from the
same small grid for every learner. Test rows of the sites that are reported select nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""What the inner rates may be multiplied by."""


class Schedule(NamedTuple):
    """How far sites adapt.

    Attributes:
        steps: The number of inner steps.
        rate: What the inner rates are multiplied by.
        losses: The validation sites' mean loss by rate and step.
    """

    steps: int
    rate: float
    losses: dict[str, list[float]]


def tune_adaptation(losses_at: Callable[[float, int], NDArray[np.float64] | None], inner_steps: int) -> Schedule | None:
    """Returns the steps and the rate with the smallest mean loss over validation sites; None where nobody answered.

    Args:
        losses_at: Returns the validation sites' losses [sites, steps + 1] at a rate, for a number of steps.
        inner_steps: K; from 0 to 2 K steps are tried. Of equals, the fewest steps and the smallest rate are taken.
    """
    grid: dict[str, list[float]] = {}
    best: tuple[float, int, float] | None = None
    for rate in RATES:
        losses = losses_at(rate, 2 * inner_steps)
        if losses is None:
            continue
        means = np.nanmean(np.where(np.isfinite(losses), losses, np.inf), axis=0)
        grid[f"{rate:g}"] = means.tolist()
        for step, mean in enumerate(means.tolist()):
            if np.isfinite(mean) and (best is None or (mean, step, rate) < best):
                best = (mean, step, rate)
    return Schedule(best[1], best[2], grid) if best else None
