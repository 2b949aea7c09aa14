"""When a run ends before its last round: no better score of validation sites for a while, or a target reached.

Validation sites are split off the training sites; neither new sites nor test rows of sites that are reported stop
anything. Scores and losses are middle means over the sites (`server.adaptation_schedule.middle_mean`), so that one
false site cannot decide. Of equal scores the one with the smaller loss is better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.problems import Metric
from server.adaptation_schedule import middle_mean


@dataclass(frozen=True)
class ValidationScore:
    """How good a meta-state is at the validation sites, after adaptation.

    Attributes:
        round_number: The round after which they were scored.
        score: The middle mean of the headline metric.
        loss: The middle mean of the outer objective.
    """

    round_number: int
    score: float
    loss: float

    def better_than(self, other: ValidationScore, metric: Metric) -> bool:
        """Returns whether this one is better: by the score, of equal ones by the loss."""
        mine, theirs = metric.sign * self.score, metric.sign * other.score
        return mine > theirs or (mine == theirs and self.loss < other.loss)

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON holds it; `ValidationScore(**...)` reads it."""
        return {"round_number": self.round_number, "score": self.score, "loss": self.loss}


@dataclass(frozen=True)
class Progressed:
    """What patience has seen.

    Attributes:
        best: The best score so far.
        waited: Scores since then.
    """

    best: ValidationScore
    waited: int = 0


def score_of_sites(
    scores: NDArray[np.float64], losses: NDArray[np.float64], round_number: int
) -> ValidationScore | None:
    """Returns the middle means over sites; None where no site has a score.

    Args:
        scores: The headline metric of each site [sites]; NaN where it is undefined.
        losses: The outer objective of each site [sites]; one that is not finite counts as infinite.
        round_number: The round after which they were scored.
    """
    known = scores[np.isfinite(scores)]
    if not len(known):
        return None
    loss = middle_mean(np.where(np.isfinite(losses), losses, np.inf)[:, None])
    largest = float(np.finfo(np.float32).max)
    return ValidationScore(round_number, float(middle_mean(known[:, None])[0]), min(float(loss[0]), largest))


def progressed(before: Progressed | None, found: ValidationScore, metric: Metric) -> Progressed:
    """Returns what patience has seen after one more score."""
    if before is None or found.better_than(before.best, metric):
        return Progressed(found)
    return replace(before, waited=before.waited + 1)


def reached(target: float, found: ValidationScore, metric: Metric) -> bool:
    """Returns whether a score is at least as good as a target."""
    return metric.sign * found.score >= metric.sign * target
