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

CUT = 0.2
"""The share of validation sites whose losses are left out at either end: rounded down, but at least one."""

FEWEST_TO_CUT = 3
"""Of fewer sites none is left out."""


class AdaptationSchedule(NamedTuple):
    """How far sites adapt.

    Attributes:
        steps: The number of inner steps.
        rate: What the inner rates are multiplied by.
        losses: The middle mean of the validation sites' losses by rate and step.
    """

    steps: int
    rate: float
    losses: dict[str, list[float]]


def tune_adaptation(
    losses_at: Callable[[float, int], NDArray[np.float64] | None], inner_steps: int
) -> AdaptationSchedule | None:
    """Returns the steps and the rate with the smallest middle mean of validation sites' losses; None without an answer.

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
        means = middle_mean(np.where(np.isfinite(losses), losses, np.inf))
        grid[f"{rate:g}"] = means.tolist()
        for step, mean in enumerate(means.tolist()):
            if np.isfinite(mean) and (best is None or (mean, step, rate) < best):
                best = (mean, step, rate)
    return AdaptationSchedule(best[1], best[2], grid) if best else None


def middle_mean(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the mean over sites [columns] of losses [sites, columns], without the `CUT` at either end.

    So one false site cannot choose for all, where there are three or more; of three and four it is the median. Where
    more than a fifth of the sites diverge, as at too large a rate, the mean is infinite all the same.
    """
    sites = len(losses)
    cut = max(1, int(CUT * sites)) if sites >= FEWEST_TO_CUT else 0
    ordered = np.sort(losses, axis=0)
    means: NDArray[np.float64] = ordered[cut : sites - cut].mean(axis=0)
    return means
