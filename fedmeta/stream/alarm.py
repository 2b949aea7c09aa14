"""An alarm for drift with a stated rate of false alarms: a conformal test martingale on the losses of single rows.

While nothing changes, the losses of a fixed model on a site's next rows are exchangeable. Then the conformal p-values

    p_t = (number of i < t with s_i > s_t  +  u_t * number of i <= t with s_i = s_t) / t,   u_t uniform

are independent and uniform (Vovk, Nouretdinov and Gammerman 2003), and every bet on them is fair: a gambler who
stakes capital on small p-values, by the factor k p^(k - 1), has a capital that is a martingale. Losses that rise make
small p-values, and the capital grow. By Ville's inequality a capital that starts at 1 ever reaches 1 / rate with a
probability of at most `rate`, however long the stream is: that is the bound on false alarms of a whole stream, and
not of a row.

A gambler who bet from the start would have lost too much when the change comes late. So a share w_j = 1 / (j (j + 1))
of the capital starts to bet at row j, and what has not started yet is kept; each share is spread over several k. The
sum is a martingale like its parts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POWERS = (0.1, 0.3, 0.5, 0.7)
"""The k of the bets: the smaller, the bolder."""

SMALLEST_P = 1e-12
"""A p-value of 0 would win everything at once."""


@dataclass(frozen=True)
class Watched:
    """What an alarm made of a stream.

    Attributes:
        capital: The capital after each row [rows].
        alarm: The row at which it reached 1 / rate, from 0; None where it did not.
        change: The row from which the evidence comes, an estimate; None without an alarm.
    """

    capital: Floats
    alarm: int | None
    change: int | None


def p_values(scores: Floats, random: np.random.Generator) -> Floats:
    """Returns the conformal p-value of each score [rows] among those up to it; small where it is high.

    Args:
        scores: The rows' losses, in time.
        random: Breaks ties; with it the p-values are uniform whatever the scores are.
    """
    ties = random.uniform(size=len(scores))
    found = np.empty(len(scores))
    ordered: list[float] = []
    for row, score in enumerate(scores.tolist()):
        left, right = bisect_left(ordered, score), bisect_right(ordered, score)
        found[row] = (row - right + ties[row] * (right - left + 1)) / (row + 1)
        ordered.insert(left, score)
    return found


def capital_of(values: Floats) -> tuple[Floats, Floats]:
    """Returns the gambler's capital after each p-value [rows], and the logarithm of the boldest fitting bet [rows]."""
    rows = len(values)
    p = np.maximum(values, SMALLEST_P)
    bets = np.array([k * p ** (k - 1) for k in POWERS])
    playing = np.zeros(len(POWERS))
    capital = np.empty(rows)
    for row in range(rows):
        started = 1 / ((row + 1) * (row + 2))
        playing = (playing + started / len(POWERS)) * bets[:, row]
        capital[row] = playing.sum() + 1 / (row + 2)
    return capital, np.log(bets.mean(0))


def watch(scores: Floats, rate: float = 0.01, seed: int = 0) -> Watched:
    """Watches a stream of losses of one fixed model.

    Args:
        scores: The rows' losses, in time.
        rate: The probability of a false alarm on the whole stream, at most.
        seed: Key of the draws that break ties.
    """
    capital, logs = capital_of(p_values(np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)))
    over = np.flatnonzero(capital >= 1 / rate)
    if not len(over):
        return Watched(capital, None, None)
    alarm = int(over[0])
    # The start from which betting would have won most until then.
    gains = np.cumsum(logs[: alarm + 1][::-1])[::-1]
    return Watched(capital, alarm, int(np.argmax(gains)))
