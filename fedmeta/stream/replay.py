"""Replays a site's rows in time: before each block the site adapts on what it has, and the block scores it.

Each step is prequential (Dawid 1984): the site adapts from the meta-state on the rows that it remembers, is scored on
the next block, and only then has that block's rows. Three ways to remember:

| memory | rows to adapt on |
|---|---|
| `all` | every row so far: best while nothing changes |
| `window` | the last `window` rows: forgets all the time |
| `alarm` | every row since the last change that the alarm of `fedmeta.stream.alarm` found |

Regret is the loss beyond a comparator in hindsight, which knows the changes and adapts on all rows of each stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmeta.stream.alarm import watch

Floats = NDArray[np.float64]
Memory = Literal["all", "window", "alarm"]

Rows = NDArray[np.int64]
"""Places of rows, in time."""

Losses = Callable[[Rows, Rows], Floats]
"""Adapts on some rows and returns the loss of each of some others; both are places of rows."""


@dataclass(frozen=True)
class Replay:
    """What a replay came to.

    Attributes:
        losses: The loss of each row after the first block, by a model that had not seen it.
        alarms: The rows at which the alarm went off.
        adapted_on: How many rows each step adapted on [blocks].
    """

    losses: Floats
    alarms: tuple[int, ...]
    adapted_on: tuple[int, ...]


def replay(
    losses: Losses, rows: int, block: int, memory: Memory, *, window: int = 0, rate: float = 0.01, seed: int = 0
) -> Replay:
    """Replays rows in blocks.

    Args:
        losses: Adapts on some rows and returns the losses of others.
        rows: The number of rows.
        block: Rows per block; the first block is there before the first step.
        memory: What the site remembers.
        window: Rows of the window.
        rate: The alarm's rate of false alarms on each stretch between alarms.
        seed: Key of the alarm's draws.
    """
    since, alarms, sizes, found = 0, list[int](), list[int](), list[Floats]()
    heard = block  # rows whose losses the alarm has had
    watched: list[Floats] = []
    for first in range(block, rows, block):
        start = max(0, first - window) if memory == "window" else since
        here = np.arange(start, first)
        following = np.arange(first, min(first + block, rows))
        sizes.append(len(here))
        found.append(losses(here, following))
        if memory != "alarm":
            continue
        watched.append(found[-1])
        seen = watch(np.concatenate(watched), rate, seed + len(alarms))
        if seen.alarm is not None and seen.change is not None:
            alarms.append(heard + seen.alarm)
            since, heard, watched = heard + seen.change, int(following[-1]) + 1, []
    return Replay(np.concatenate(found), tuple(alarms), tuple(sizes))


def in_hindsight(losses: Losses, rows: int, changes: Sequence[int], first: int) -> Floats:
    """Returns the losses [rows - first] of a site that knows the changes and has all rows of each stretch at once.

    Args:
        losses: As for `replay`.
        rows: The number of rows.
        changes: The rows at which something changes.
        first: The first row that is scored.
    """
    ends = [0, *changes, rows]
    parts = [losses(np.arange(low, high), np.arange(low, high)) for low, high in pairwise(ends)]
    return np.concatenate(parts)[first:]


def regret(found: Replay, hindsight: Floats) -> Floats:
    """Returns the regret after each scored row [rows]: the sum of losses beyond those in hindsight."""
    total: Floats = np.cumsum(found.losses - hindsight)
    return total
