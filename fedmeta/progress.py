"""What a run says of itself while it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
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
        note: Something to tell the user once; empty most of the time.
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


Report = Callable[[Progress], None]
"""Takes a run's progress as it comes."""


def silent(progress: Progress) -> None:
    """Takes progress and says nothing."""


class Pruned(KeyboardInterrupt):
    """Raised by what takes progress to end a run before its time: it stops as cleanly as at Ctrl-C."""
