"""What learners share whose sites train by epochs over all their rows (McMahan et al. 2017, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedmeta.learners.learner import DEFAULTS, Learner, check_counts
from fedmeta.learners.local_steps import minibatches_of
from fedmeta.minibatches import Minibatches


@dataclass(frozen=True)
class LocalEpochs(Learner):
    """A learner whose sites send the delta of E epochs over all their train rows, in mini-batches of B.

    Attributes:
        local_epochs: E, how often a site goes through all its train rows in a round.
        batch_size: B, the rows of a local step; 0 for all.
    """

    local_epochs: int = DEFAULTS.local_epochs
    batch_size: int = DEFAULTS.batch_size

    update: ClassVar[str] = "delta"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, local_epochs=1, batch_size=0)

    @property
    def pull(self) -> float:
        """The weight of 1 / 2 * |theta_i - theta|^2 in what a local step descends."""
        return 0.0

    @property
    def minibatches(self) -> Minibatches | None:
        """E epochs over all the site's rows, B a step; None on an own problem."""
        return minibatches_of(self.problem, self.batch_size, self.local_epochs)
