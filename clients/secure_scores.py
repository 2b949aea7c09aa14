"""A site's scores as numbers that add up: what an evaluation with secure sums sends in place of each site's own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedmeta.messages import LOSS, EvaluateReply
from fedmeta.messages.secure import COUNTS, SCORE_GROUPS, scores_size
from fedmeta.problems import Metric
from fedmeta.problems.metric import DIVERGED

Floats = NDArray[np.float64]

LARGEST_SCORE = 2.0**40
"""A larger figure counts as undefined: its square would not fit the ring."""


def score_numbers(reply: EvaluateReply, groups: Sequence[int], metrics: Sequence[Metric]) -> Floats:
    """Returns what each site adds to the sums of an evaluation [sites, numbers]; zeros for sites of no group.

    By group: `COUNTS`, and then by state (before and after adaptation) and figure (the loss, then each metric) 1 where
    it is defined, the figure, and its square. A site that diverged counts as such and as harmed, and adds no figure.
    """
    found = np.zeros((len(reply.names), scores_size(len(metrics))))
    by_group = found.reshape(len(reply.names), SCORE_GROUPS, -1)
    last = np.arange(len(reply.names)), reply.chosen
    names = [LOSS, *(metric.name for metric in metrics)]
    before = {name: reply.figures[name][:, 0] for name in names}
    after = {name: reply.figures[name][last] for name in names}
    score = metrics[0]
    usual = np.maximum(np.abs(np.nan_to_num(before[LOSS], nan=0.0, posinf=0.0, neginf=0.0)), 1.0)
    tested = ~np.isnan(before[score.name]) | ~np.isnan(before[LOSS])
    lost = tested & (~np.isfinite(after[LOSS]) | np.isinf(after[score.name]) | (after[LOSS] > DIVERGED * usual))
    gain = (after[score.name] - before[score.name]) * score.sign
    scored = ~lost & np.isfinite(before[score.name]) & np.isfinite(after[score.name])
    counts = {
        "n": scored,
        "diverged": lost,
        "helped": scored & (gain > 0),
        "harmed": lost | (scored & (gain < 0)),
    }
    columns = [counts[name].astype(np.float64) for name in COUNTS]
    for state in (before, after):
        for name in names:
            fine = ~lost & (np.abs(np.nan_to_num(state[name], nan=np.inf)) <= LARGEST_SCORE)
            value = np.where(fine, state[name], 0.0)
            columns += [fine.astype(np.float64), value, value**2]
    for row, group in enumerate(groups):
        if group >= 0:
            by_group[row, group] = [column[row] for column in columns]
    return found
