"""Figures over all test rows of a group of sites, from sums and histograms that sites add up.

Where sites are tiny or outcomes rare, per-site figures are noise. Counts and sums give accuracy, F1, Brier score and
the
like exactly. AUROC and AUPRC come from histograms of the log odds over bins that the server fixes: rows in one bin
count
as ties, so that AUROC is off by at most half the sum over bins of the product of the two classes' shares there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmeta.problems.metric import Metric
from fedmeta.problems.row_metrics import Predictions
from fedmeta.problems.rows import BINS as CALIBRATION_BINS

Floats = NDArray[np.float64]
Sums = dict[str, Floats]

SMALLEST = 1e-300
"""What a probability counts as at least in a sum of losses."""

CURVES = ("auroc", "auprc")


@dataclass(frozen=True)
class Bins:
    """Bins of log odds; the first and the last also hold what lies beyond.

    Attributes:
        low: The lower edge of the first.
        high: The upper edge of the last.
        count: How many.
    """

    low: float = -16.0
    high: float = 16.0
    count: int = 8192

    def for_classes(self, classes: int) -> Bins:
        """Returns bins of a size that histograms of many classes can be sent in."""
        return Bins(self.low, self.high, self.count if classes <= 2 else max(128, self.count // classes))

    def places(self, values: Floats) -> NDArray[np.int64]:
        """Returns the bin of each value."""
        scaled = (values - self.low) / (self.high - self.low) * self.count
        whole = np.nan_to_num(np.floor(scaled), nan=0.0, posinf=self.count, neginf=0)
        places: NDArray[np.int64] = np.clip(whole, 0, self.count - 1).astype(np.int64)
        return places


def sums_of(found: Predictions, rows: int, metrics: Sequence[Metric], bins: Bins) -> Sums:
    """Returns what one site adds to the pooled figures.

    Args:
        found: Its predictions on rows of known classes.
        rows: Its test rows, those of unknown classes included.
        metrics: What is to be pooled.
        bins: The bins of log odds.
    """
    if not found.classes:
        y = found.y.reshape(len(found.y), -1)
        error = found.outputs.reshape(y.shape) - y
        count = np.full(y.shape[1], float(len(y)))
        values = (count, y.sum(0), (y**2).sum(0), (error**2).sum(0), np.abs(error).sum(0))
        return {"regression": np.stack(values, axis=-1).astype(np.float64)}
    n, classes, predicted = len(found.y), found.classes, found.predicted
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (found.y, predicted), 1.0)
    own = found.probabilities[np.arange(n), found.y]
    squares = ((found.probabilities - np.eye(classes)[found.y]) ** 2).sum() / (2 if classes == 2 else 1)
    # As a site's own calibration error: a row of an unknown class has no confidence here, and is wrong.
    confidence = found.probabilities.max(1) if n else np.empty(0)
    place = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    calibration = np.zeros((CALIBRATION_BINS, 2))
    np.add.at(calibration, (place, 0), confidence)
    np.add.at(calibration, (place, 1), (predicted == found.y).astype(float))
    sums: Sums = {
        "rows": np.array([rows, n], dtype=np.float64),
        "confusion": confusion,
        "losses": np.array([-np.log(np.maximum(own, SMALLEST)).sum(), squares]),
        "calibration": calibration,
    }
    if {metric.name for metric in metrics} & set(CURVES):
        bins = bins.for_classes(classes)
        codes = [found.positive] if classes == 2 else list(range(classes))
        histogram = np.zeros((len(codes), 2, bins.count))
        with np.errstate(divide="ignore"):
            for k, code in enumerate(codes):
                p = found.probabilities[:, code]
                odds = np.log(p) - np.log1p(-p)
                np.add.at(histogram[k], ((found.y == code).astype(int), bins.places(odds)), 1.0)
        sums["histogram"] = histogram
    return sums


def _regression_impossible(sums: Floats, rows: float) -> str:
    """Returns why no predictions of one target have these sums [5], or "" where some may."""
    n, total, square, squared_error, absolute_error = (float(value) for value in sums)
    slack = 1e-6 * max(1.0, n)
    if not 0 <= n <= rows + slack:
        return "they are of more rows than there are"
    if square * (1 + 1e-6) + slack < total**2 / max(n, 1.0) or min(square, squared_error, absolute_error) < 0:
        return "a sum of squares or of errors is too small"
    most = math.sqrt(squared_error * n)
    return "the errors do not fit their squares" if absolute_error > most * (1 + 1e-6) + slack else ""


def impossible(sums: Mapping[str, Floats], metrics: Sequence[Metric], classes: int, targets: int, rows: float) -> str:
    """Returns why no predictions have these sums, or "" where some may.

    Args:
        sums: What some sites added up, of one group before or after adaptation; finite numbers.
        metrics: What is to be pooled.
        classes: How many classes the run has; 0 for regression.
        targets: How many targets a regression has.
        rows: The most test rows that these sites have; infinite where that is not known.
    """
    shapes: dict[str, tuple[int, ...]] = {"regression": (max(1, targets), 5)}
    if classes:
        shapes = {"rows": (2,), "confusion": (classes, classes), "losses": (2,), "calibration": (CALIBRATION_BINS, 2)}
        if {metric.name for metric in metrics} & set(CURVES):
            shapes["histogram"] = (1 if classes == 2 else classes, 2, Bins().for_classes(classes).count)
    if {name: value.shape for name, value in sums.items()} != shapes:
        return "they have other names or shapes than they should"
    if not classes:
        found = (_regression_impossible(own, rows) for own in sums["regression"])
        return next((problem for problem in found if problem), "")
    every, n = (float(value) for value in sums["rows"])
    slack = 1e-6 * max(1.0, n)
    if not 0 <= n <= every <= rows + slack:
        return "they are of more rows than there are"
    if any((value < 0).any() for value in sums.values()):
        return "a count or a sum is negative"
    counted = [sums["confusion"].sum()]
    counted += [one.sum() for one in sums["histogram"]] if "histogram" in sums else []
    if any(abs(float(count) - n) > slack for count in counted):
        return "their counts do not add up to their rows"
    confidence, right = (float(value) for value in sums["calibration"].sum(0))
    if confidence > n + slack or abs(right - float(np.trace(sums["confusion"]))) > slack:
        return "their calibration does not fit their rows"
    losses = sums["losses"]
    high = losses[0] > n * -math.log(SMALLEST) + slack or losses[1] > 2 * n + slack
    return "their losses are larger than losses can be" if high else ""


def pooled(sums: Mapping[str, Floats], metrics: Sequence[Metric], positive: int) -> dict[str, float]:
    """Returns each metric over all rows; NaN where it is undefined, nothing for one that cannot be pooled."""
    values: dict[str, float] = {}
    for metric in metrics:
        value = _one(metric.name, sums, positive)
        if value is not None:
            values[metric.name] = value
    return values


def auroc_bound(histogram: Floats) -> float:
    """Returns how far a pooled AUROC may be off: half the sum over bins of the product of the classes' shares there."""
    bounds = [0.5 * float((_share(one[0]) * _share(one[1])).sum()) for one in histogram]
    return float(np.mean(bounds)) if bounds else math.nan


def _share(counts: Floats) -> Floats:
    return counts / max(1.0, float(counts.sum()))


def _one(name: str, sums: Mapping[str, Floats], positive: int) -> float | None:
    if "regression" in sums:
        count, total, square, squared_error, absolute_error = sums["regression"].reshape(-1, 5).T
        if not count.all():
            return math.nan
        spread = square - total**2 / count
        # As a site's own figures: an error is averaged over targets, and R2 and nll are.
        with np.errstate(divide="ignore", invalid="ignore"):
            values = {
                "rmse": np.sqrt((squared_error / count).mean()),
                "mae": (absolute_error / count).mean(),
                "r2": np.where(spread > 0, 1 - squared_error / spread, np.nan).mean(),
                "nll": 0.5 * (np.log(2 * np.pi) + np.log(np.maximum(squared_error / count, 1e-300)) + 1).mean(),
            }
        return float(values[name]) if name in values else None
    rows, n = (float(value) for value in sums["rows"])
    if not n:
        return math.nan
    confusion = sums["confusion"]
    right = float(np.trace(confusion))
    if name == "accuracy":
        return right / rows
    if name == "log_loss":
        return float(sums["losses"][0]) / n
    if name == "brier":
        return float(sums["losses"][1]) / n
    if name == "ece":
        return float(np.abs(sums["calibration"][:, 0] - sums["calibration"][:, 1]).sum()) / n
    if name == "balanced_accuracy":
        present = confusion.sum(1) > 0
        return float((np.diag(confusion)[present] / confusion.sum(1)[present]).mean())
    if name in CURVES:
        return _mean([_curve(name, one) for one, count in zip(sums["histogram"], _counts(sums), strict=True) if count])
    if name in ("sensitivity", "specificity", "f1"):
        codes = [positive] if len(confusion) == 2 else np.flatnonzero(confusion.sum(1)).tolist()
        return _mean([_rate(name, confusion, code) for code in codes])
    return None


def _counts(sums: Mapping[str, Floats]) -> Floats:
    counts: Floats = sums["histogram"][:, 1].sum(1)
    return counts


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _rate(name: str, confusion: Floats, code: int) -> float:
    true = float(confusion[code, code])
    actual, predicted, every = float(confusion[code].sum()), float(confusion[:, code].sum()), float(confusion.sum())
    if name == "sensitivity":
        return true / actual if actual else math.nan
    if name == "specificity":
        negative = every - actual
        return (negative - (predicted - true)) / negative if negative else math.nan
    return 2 * true / (actual + predicted) if actual + predicted else math.nan


def _curve(name: str, histogram: Floats) -> float:
    """Returns AUROC or AUPRC of one class from counts [2, bins] of the others and of it."""
    others, own = histogram[0][::-1], histogram[1][::-1]
    if not own.sum() or (name == "auroc" and not others.sum()):
        return math.nan
    if name == "auroc":
        above = np.cumsum(own) - own / 2
        return float((others * above).sum() / (own.sum() * others.sum()))
    precision = np.cumsum(own) / np.maximum(np.cumsum(own) + np.cumsum(others), 1.0)
    return float((own * precision).sum() / own.sum())
