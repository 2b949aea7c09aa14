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
        high: Its upper end; infinite where there is one row.
        rows: From how many rows.
    """

    metric: str
    score: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Gain:
    """How much better the personalized model's score is than the global one's on the same rows, in the score's unit.

    Attributes:
        score: The estimate; positive where personalization helps.
        low: The lower end of the interval that covers the true gain with probability `LEVEL`.
        high: Its upper end.
    """

    score: float
    low: float
    high: float


def accuracy(scores: NDArray[np.float64], rows: NDArray[np.int64], excess: float = 1.0) -> Estimate:
    """Returns the accuracy over parts [parts] of so many rows each, with the interval of Clopper and Pearson (1934).

    Args:
        scores: Each part's accuracy.
        rows: Each part's rows.
        excess: How many times the variance is that of rows scored independently (`shared_excess`); the interval is that
            of so many times fewer rows.
    """
    n, share = int(rows.sum()), float(scores @ rows / rows.sum())
    tail, k = (1 - LEVEL) / 2, round(share * n)
    right, wrong = k / excess, (n - k) / excess
    low = float(betaincinv(right, wrong + 1, tail)) if k else 0.0
    high = float(betaincinv(right + 1, wrong, 1 - tail)) if k < n else 1.0
    return Estimate("accuracy", k / n, low, high, n)


def rmse(scores: NDArray[np.float64], rows: NDArray[np.int64], excess: float = 1.0) -> Estimate:
    """Returns the RMSE over parts [parts] of so many rows each, with Student's interval on the logarithm of its square.

    Squared errors are skewed; the logarithm of their mean is far less so. Its standard error is that of the mean over
    parts, divided by the mean (delta method). Where inner steps are so long that models of nearly the same rows differ
    wildly, the parts are far from the final model, and the interval covers its error less often than it should.

    Args:
        scores: Each part's RMSE.
        rows: Each part's rows.
        excess: How many times the variance is that of rows scored independently.
    """
    n, parts, squares = int(rows.sum()), len(rows), np.nan_to_num(scores**2, nan=np.inf, posinf=np.inf)
    mean = float(squares @ rows / n)
    if not np.isfinite(mean):
        return Estimate("rmse", float("inf"), 0.0, float("inf"), n)
    if parts < 2 or not mean > 0:
        return Estimate("rmse", mean**0.5, 0.0, float("inf") if parts < 2 else 0.0, n)
    variance = excess * float(np.sum((rows / n) ** 2 * (squares - mean) ** 2)) * parts / (parts - 1)
    reach = float(stdtrit(parts - 1, (1 + LEVEL) / 2)) * variance**0.5 / mean
    low, high = (float(np.exp((np.log(mean) + side) / 2)) for side in (-reach, reach))
    return Estimate("rmse", mean**0.5, low, high, n)


def paired_gain(
    metric: str, before: NDArray[np.float64], after: NDArray[np.float64], rows: NDArray[np.int64], excess: float
) -> Gain:
    """Returns the paired difference of two models over the same parts, with Student's interval over parts.

    Of RMSEs it is that of the mean squared errors, divided by the sum of both RMSEs (delta method). Of accuracies the
    variance is at least what the rows on which the models differ, and one more, have (Agresti and Min, Statistics in
    Medicine 24:729, 2005): parts that all agree by chance prove nothing.

    Args:
        metric: "accuracy" or "rmse".
        before: Each part's score with the global model [parts].
        after: The same after adapting to all other parts.
        rows: Each part's rows.
        excess: How many times the variance is that of independent rows (`shared_excess`).
    """
    n, parts, shares = int(rows.sum()), len(rows), rows / rows.sum()
    if metric == "rmse":
        squares = [np.nan_to_num(each**2, nan=np.inf, posinf=np.inf) for each in (before, after)]
        first, second = (float(each @ shares) ** 0.5 for each in squares)
        if not np.isfinite(first + second):
            worse = float("-inf") if np.isfinite(first) else float("nan")
            return Gain(worse, float("-inf"), worse if worse == worse else float("inf"))
        unit = max(first + second, float(np.finfo(float).tiny))
        differences = (squares[0] - squares[1]) / unit
    else:
        differences = after - before
    gain = float(differences @ shares)
    if parts < 2:
        return Gain(gain, float("-inf"), float("inf"))
    variance = float(np.sum(shares**2 * (differences - gain) ** 2)) * parts / (parts - 1)
    if metric == "accuracy":
        variance = max(variance, (float(np.abs(differences) @ rows) + 1) / (n + 2) ** 2)
    reach = float(stdtrit(parts - 1, (1 + LEVEL) / 2)) * (excess * variance) ** 0.5
    return Gain(gain, gain - reach, gain + reach)


def shared_excess(rows: NDArray[np.int64]) -> float:
    """Returns how many times the variance of a cross-validated score is that of as many independent rows.

    The parts [parts] score models that were trained on nearly the same rows: 1 + parts * test rows / training rows, the
    correction of Nadeau and Bengio (Machine Learning 52:239, 2003). 1 where nothing was trained.
    """
    total, own = int(rows.sum()), float(rows.mean())
    return 1 + len(rows) * own / (total - own) if len(rows) > 1 else 1.0
