"""What a run reports while it runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        round_number: The last finished round.
        rounds: How many there will be.
        global_score: The global score of new sites at the last evaluation (of training sites where none is new).
        personalized_score: Their personalized score.
        failures: How many sites or nodes have failed so far, counted once per round.
        note: A message to the user; empty most of the time.
        run_id: The run's id, once there is one.
    """

    round_number: int
    rounds: int
    global_score: float | None = None
    personalized_score: float | None = None
    failures: int = 0
    note: str = ""
    run_id: str = ""

    def to_json(self) -> str:
        """Returns one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Progress:
        """Reads a line that `to_json` wrote."""
        return cls(**json.loads(line))


ProgressCallback = Callable[[Progress], None]
"""Takes a run's progress as it comes."""


def ignore_progress(progress: Progress) -> None:
    """Ignores progress."""


class FailureThrottle:
    """Keeps what fails again and again from scrolling everything else away.

    Args:
        see: Where all failures are on record.
        times: After how many rounds with failures only new ones are reported.
    """

    def __init__(self, see: str, times: int = 10) -> None:
        self.see = see
        self.times = times
        self.rounds = 0
        self.known: set[tuple[str, str]] = set()

    def filter(self, note: str, failed: Mapping[str, str]) -> str:
        """Returns the note of a round in which something failed, or "" where that has been reported often enough.

        Args:
            note: What to report.
            failed: Sites, and why each failed.
        """
        news = set(failed.items()) - self.known
        self.known |= news
        self.rounds += 1
        if news or self.rounds <= self.times:
            return note
        last = self.rounds == self.times + 1
        return f"{note}; rounds that fail in the same way are not reported any more, see {self.see}" if last else ""


class Pruned(KeyboardInterrupt):
    """Raised by what takes progress to end a run before its time: it stops as cleanly as at Ctrl-C."""
