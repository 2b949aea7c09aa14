"""An evaluation of which the server learns sums over groups of sites alone: counts, means, spreads, helped, harmed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmeta.checkpoint import Evaluation
from fedmeta.evaluation import GROUPS
from fedmeta.messages import LOSS
from fedmeta.messages.secure import COUNTS
from fedmeta.problems import Metric

SECURE_STATE = "secure"
"""The state under which a group's sums lie among an evaluation's pooled ones."""


def evaluation_of(round_number: int, sums: NDArray[np.float64], metrics: Sequence[Metric]) -> Evaluation:
    """Returns an evaluation of no single site, with its groups' sums [groups, numbers] among the pooled ones."""
    nothing = np.zeros((0, 1))
    figures = dict.fromkeys((LOSS, *(metric.name for metric in metrics)), nothing)
    pooled = {f"{group}/{SECURE_STATE}/scores": own for group, own in enumerate(sums)}
    empty = np.zeros(0, dtype=np.int64)
    return Evaluation(round_number, empty, figures, empty, pooled=pooled)


def summaries(
    groups: dict[str, dict[str, Any]], pooled: Mapping[str, NDArray[np.float64]], metrics: Sequence[Metric]
) -> dict[str, dict[str, Any]]:
    """Returns the summaries of an evaluation of no single site, filled with what its groups' sums hold.

    What sums do not hold stays None: worst sites, intervals over sites, what sites do alone.
    """
    for number, name in enumerate(GROUPS.values()):
        sums = pooled.get(f"{number}/{SECURE_STATE}/scores")
        if sums is None:
            continue
        counts = dict(zip(COUNTS, np.rint(sums[: len(COUNTS)]).astype(int).tolist(), strict=True))
        everyone = counts["n"] + counts["diverged"]
        own = groups[name]
        own |= {"n": counts["n"], "diverged": counts["diverged"]}
        own |= {key: counts[key] / everyone if everyone else None for key in ("helped", "harmed")}
        parts = sums[len(COUNTS) :].reshape(2, 1 + len(metrics), 3)
        for place, state in enumerate(("global", "personalized")):
            own[state]["loss"] = _moments(parts[place, 0])["mean"]
            for figure, metric in enumerate(metrics, 1):
                found = _moments(parts[place, figure])
                own[state]["metrics"][metric.name] |= found
                if figure == 1:
                    own[state] |= found
        if own["personalized"]["mean"] is not None and own["global"]["mean"] is not None:
            own["gain"] = (own["personalized"]["mean"] - own["global"]["mean"]) * metrics[0].sign
    return groups


def _moments(sums: NDArray[np.float64]) -> dict[str, Any]:
    count = round(float(sums[0]))
    if not count:
        return {"mean": None, "std": None, "n": 0}
    mean = float(sums[1]) / count
    return {"mean": mean, "std": math.sqrt(max(float(sums[2]) / count - mean**2, 0.0)), "n": count}
