"""What happened in one round or one evaluation: who gave no usable answer and why, and the bytes that were moved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

DIVERGED = "its meta-gradient was not finite"
"""Why a site was left out of a round whose adaptation, or whose start, has run away."""

WEIGHTLESS = "its weight is 0"
"""Why a reply that would count for nothing is left out."""

UNDONE = "the step along the round's replies was not finite, and was undone"
"""Why a round changed nothing."""


@dataclass
class RoundLog:
    """What happened in one round.

    Attributes:
        failed: Site (or "node NUMBER") and the reason, for each that gave no usable answer.
        shortened: Site and by how much, for each whose reply was shortened (`server.influence`).
        outlying: Site and why its query loss is not in the round's mean.
        undone: Whether the round's step was undone.
        skipped: Why a round with secure aggregation has no sum.
        late: Sites that the round closed without, and sites whose late replies are not used, with the reason.
        took_part: The sites whose replies are in the round's step.
        bytes_down: Bytes of all messages sent.
        bytes_up: Bytes of all replies received.
    """

    failed: dict[str, str] = field(default_factory=dict)
    shortened: dict[str, str] = field(default_factory=dict)
    outlying: dict[str, str] = field(default_factory=dict)
    undone: bool = False
    skipped: str = ""
    late: dict[str, str] = field(default_factory=dict)
    took_part: tuple[str, ...] = ()
    bytes_down: int = 0
    bytes_up: int = 0

    def fail(self, sites: Iterable[str], reason: str) -> None:
        """Notes that sites gave no usable answer."""
        self.failed.update(dict.fromkeys(sites, reason))

    def reasons(self, advise: bool = False) -> str:
        """Returns the first failure, with who gave it, how many others there are, and what may help."""
        if self.skipped:
            return self.skipped
        if not self.failed:
            return "no site was asked, or too few gave a finite gradient"
        site, reason = next(iter(self.failed.items()))
        others = f" (and {len(self.failed) - 1} more)" if len(self.failed) > 1 else ""
        advice = ". Smaller rates may help: learner.inner_lr, server.lr" if advise and reason == DIVERGED else ""
        return f"{site}{others}: {reason}{advice}"
