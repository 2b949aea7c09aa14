"""What a run decided about itself: each decision with its reason, its figures, and what it saved or cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """One decision.

    Attributes:
        round: The round after which it was made.
        what: The decision, such as "stop" or "climb".
        why: The reason, with its figures.
        before: The score of validation sites before it; None where there is none.
        after: The score that came of it; None where it is not known yet.
        saved_rounds: Rounds that it saved; below 0 where it cost some.
        saved_s: The same in seconds, by the mean of this run's rounds.
        saved_bytes: The same in bytes, up and down.
    """

    round: int
    what: str
    why: str
    before: float | None = None
    after: float | None = None
    saved_rounds: float = 0.0
    saved_s: float = 0.0
    saved_bytes: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON holds it; `Decision(**...)` reads it."""
        return asdict(self)


def per_round(totals: Mapping[str, float], rounds: int) -> tuple[float, float]:
    """Returns the seconds and the bytes of one round, by the mean of those so far."""
    done = max(1, rounds)
    bytes_moved = totals.get("bytes_down", 0.0) + totals.get("bytes_up", 0.0)
    return totals.get("wall_s", 0.0) / done, bytes_moved / done
