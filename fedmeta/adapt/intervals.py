"""Scores of a model with their 90 % intervals, from one figure per row that the model has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtrit

LEVEL = 0.90


@dataclass(frozen=True)
class Estimate:
    """A score and the interval that covers the true one with probability `LEVEL`.

    Attributes:
        metric: "accuracy", or "rmse", of which less is better.
        score: The estimate.
        low: The interval's lower end.
        high: Its upper end; infinite where one row says nothing.
        rows: From how many rows.
    """

    metric: str
    score: float
    low: float
    high: float
    rows: int

    def better_or_equal(self, other: Estimate) -> bool:
        """Whether this score is at least as good as another."""
        return self.score <= other.score if self.metric == "rmse" else self.score >= other.score


def accuracy(scores: NDArray[np.float64], rows: NDArray[np.int64]) -> Estimate:
    """Returns the accuracy over parts [parts] of so many rows each, with the interval of Clopper and Pearson (1934).

    For rows that are judged independently it covers the truth more often than its level says. The rows of a
    cross-validation share models, and the model that they judge is not quite the final one, which uses that reserve.
    """
    n, k = int(rows.sum()), round(float(scores @ rows))
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return Estimate("accuracy", k / n, low, high, n)


def rmse(scores: NDArray[np.float64], rows: NDArray[np.int64]) -> Estimate:
    """Returns the RMSE over parts [parts] of so many rows each, with Student's interval on the logarithm of its square.

    Squared errors are skewed; the logarithm of their mean is far less so. Its standard error is that of the mean over
    parts, divided by the mean (delta method).
    """
    n, parts, squares = int(rows.sum()), len(rows), scores**2
    mean = float(squares @ rows / n)
    if parts < 2 or not mean > 0:
        return Estimate("rmse", mean**0.5, 0.0, float("inf") if parts < 2 else 0.0, n)
    error = float(np.sqrt(np.sum((rows / n) ** 2 * (squares - mean) ** 2) * parts / (parts - 1))) / mean
    reach = float(stdtrit(parts - 1, (1 + LEVEL) / 2)) * error
    low, high = (float(np.exp((np.log(mean) + side) / 2)) for side in (-reach, reach))
    return Estimate("rmse", mean**0.5, low, high, n)
