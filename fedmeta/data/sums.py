"""Standardisation and imputation from sums that sites send: no row leaves its site.

Sums are float64. The variance comes from the difference of two sums, whose error is a few parts in 10^16 of the mean
square for every thousandfold of additions; a column whose standard deviation is below a millionth of its mean
cannot therefore be distinguished from a constant one, and its scale is set so that values stay of the size of 1.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedmeta.data.population import Population
from fedmeta.data.ragged import IntArray
from fedmeta.data.splits import Split
from fedmeta.errors import FedmetaError
from fedmeta.targets import TargetKind, TargetScale

Floats = NDArray[np.float64]

_CHUNK = 1 << 20
"""How many values are summed at once."""

_SITE_ROWS = 1 << 16
"""How many rows sites have that are summed at once."""

_SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class FeatureSums:
    """What standardisation is made of; sums of sites add with `+`.

    The arrays have the shape of a row with 1 wherever one figure serves the whole axis: a row's own shape where each
    feature is standardised on its own, ones (but for the channels) for images, ones where nothing is standardised.

    Attributes:
        count: How many values were observed.
        total: Their sum.
        square: The sum of their squares.
    """

    count: Floats
    total: Floats
    square: Floats

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        """Returns the sums over both parties' rows; raises `FedmetaError` where they count different features."""
        if self.count.shape != other.count.shape:
            raise FedmetaError(f"sites have features of different shapes: {self.count.shape} and {other.count.shape}")
        return FeatureSums(self.count + other.count, self.total + other.total, self.square + other.square)


@dataclass(frozen=True, eq=False)
class Standardisation:
    """What features are standardised by: (x - mean) / scale, and a missing feature is 0 thereafter, which is its mean.

    Attributes:
        mean: float32, to be broadcast over a row.
        scale: The same; the standard deviation, or 1 for constant and never observed features.
        target: What regression targets are standardized by.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    target: TargetScale = field(default_factory=TargetScale)

    @property
    def identity(self) -> bool:
        """Whether features stay as they are."""
        return self.mean.size == 1 and not self.mean.any() and bool((self.scale == 1).all())


def statistic_shape(shape: tuple[int, ...], standardise: str, *, tokens: bool) -> tuple[int, ...]:
    """Returns the shape of the sums: the row's, with 1 wherever one figure serves the whole axis.

    Args:
        shape: That of a row.
        standardise: "features" = each feature by itself; "image" = one figure for all pixels, or one per channel
            where a row has three axes and the first, or else the last, has 1, 3 or 4 entries; "none"; "auto" =
            "none" for tokens, "features" for vectors, "image" for the rest.
        tokens: Whether features are codes of symbols.
    """
    if standardise == "auto":
        standardise = "none" if tokens else "features" if len(shape) == 1 else "image"
    if standardise == "features":
        return shape
    ones = [1] * len(shape)
    if standardise == "image" and len(shape) == 3:
        channels = next((axis for axis in (0, 2) if shape[axis] in (1, 3, 4)), None)
        if channels is not None:
            ones[channels] = shape[channels]
    return tuple(ones)


def feature_sums(population: Population, rows: IntArray, standardise: str) -> FeatureSums:
    """Returns the sums of the features over some rows, missing values left out; all 0 where nothing is standardised.

    Args:
        population: Whose rows.
        rows: Row numbers [n]: the train rows of training sites.
        standardise: As for `statistic_shape`.
    """
    if population.tokens and standardise in ("features", "image"):
        raise FedmetaError(f'data.standardise = "{standardise}": codes of symbols have no mean; set it to "none"')
    shape = statistic_shape(population.shape, standardise, tokens=population.tokens)
    sums = FeatureSums(np.zeros(shape), np.zeros(shape), np.zeros(shape))
    if standardise == "none" or population.tokens:
        return sums
    axes = (0, *(axis + 1 for axis, size in enumerate(shape) if size == 1))
    step = max(1, _CHUNK // int(np.prod(population.shape)))
    for start in range(0, len(rows), step):
        sums = sums + _chunk_sums(population, rows[start : start + step], axes)
    return sums


def train_sums(split: Split, sites: IntArray, standardise: str) -> FeatureSums:
    """Returns the sums of the features over the train rows of some sites.

    Sites are taken a few at a time, so that memory does not grow with their number.

    Args:
        split: The population and which of its rows train.
        sites: Site numbers; training sites.
        standardise: As for `statistic_shape`.
    """
    rows = np.cumsum(split.train_sizes(sites))
    parts = np.split(sites, np.searchsorted(rows, np.arange(_SITE_ROWS, rows[-1] if len(rows) else 0, _SITE_ROWS)))
    sums = feature_sums(split.population, np.empty(0, dtype=np.int64), standardise)
    for part in parts:
        sums = sums + feature_sums(split.population, split.train_rows(part).rows, standardise)
    return sums


def _chunk_sums(population: Population, rows: IntArray, axes: tuple[int, ...]) -> FeatureSums:
    x = population.features(rows).to(torch.float64)
    missing = x.isnan().sum(axes, keepdim=True)[0].double().numpy() if population.missing else 0.0
    x = x.nan_to_num_(nan=0.0) if population.missing else x
    total = x.sum(axes, keepdim=True)[0].numpy()
    square = x.square_().sum(axes, keepdim=True)[0].numpy()
    return FeatureSums(np.full(total.shape, x.numel() / total.size) - missing, total, square)


def target_sums(split: Split, sites: IntArray, kind: TargetKind) -> FeatureSums:
    """Returns the sums of the targets, or of their logarithms, over the train rows of some sites [targets].

    Args:
        split: The population and which of its rows train.
        sites: Site numbers; training sites.
        kind: How targets are standardized; the sums are 0 with "none", and of no target for classes.

    Raises:
        FedmetaError: A target whose logarithm is wanted is not above 0.
    """
    population = split.population
    nothing = np.zeros(population.targets)
    if kind == "none" or not population.regression:
        return FeatureSums(nothing, nothing, nothing)
    y = population.labels(split.train_rows(sites).rows).reshape(-1, population.targets).astype(np.float64)
    if kind == "log":
        if (y <= 0).any():
            raise FedmetaError(
                f'[data] target = "log": a target is {y[y <= 0][0]:g}, and only numbers above 0 have a logarithm: '
                'correct it, or set it to "standardise"'
            )
        y = np.log(y)
    return FeatureSums(nothing + len(y), y.sum(0), np.square(y).sum(0))


def target_scale(sums: FeatureSums, kind: TargetKind) -> TargetScale:
    """Returns mean and scale of targets from the sums over all training sites, as `standardisation` of features."""
    if not sums.count.any():
        return TargetScale(np.zeros(sums.count.shape), np.ones(sums.count.shape))
    return TargetScale(*_mean_and_scale(sums), log=kind == "log")


def standardisation(sums: FeatureSums) -> Standardisation:
    """Returns mean and scale of features from the sums over all training sites."""
    mean, scale = _mean_and_scale(sums)
    return Standardisation(mean.astype(np.float32), scale.astype(np.float32))


def _mean_and_scale(sums: FeatureSums) -> tuple[Floats, Floats]:
    """Returns mean and scale from sums.

    The scale is the population's standard deviation. Where that is below a millionth of the mean it is lost in the
    rounding of the sums: the column counts as constant, and its scale is 1, or a millionth of its mean if that is more.
    """
    observed = np.maximum(sums.count, 1.0)
    mean = sums.total / observed
    deviation = np.sqrt(np.maximum(sums.square / observed - mean**2, 0.0))
    smallest = _SMALLEST_SPREAD * np.abs(mean)
    told_apart = deviation > np.maximum(smallest, np.finfo(np.float32).tiny)
    return mean, np.where(told_apart, deviation, np.maximum(1.0, smallest))


def median_sums(sites: FeatureSums) -> FeatureSums:
    """Returns sums of one value with medians over sites as mean and variance, which a few false sites cannot move far.

    The mean is the median of the sites' means. The variance is the median of the variances within sites plus that
    between sites, by the median distance of their means from it (which is 1 / 1.4826 standard deviations of a normal
    distribution). A site counts the same whatever its size; one that has no value of a feature does not count for it.

    Args:
        sites: The sites' own sums, each array [sites, *shape].
    """
    seen = sites.count > 0
    unseen = ~seen.any(axis=0)
    observed = np.where(seen, sites.count, 1.0)
    means = np.where(seen, sites.total / observed, np.nan)
    means[:, unseen] = 0.0
    within = np.where(seen, np.maximum(sites.square / observed - (sites.total / observed) ** 2, 0.0), np.nan)
    within[:, unseen] = 0.0
    middle: Floats = np.nanmedian(means, axis=0)
    between = 1.4826 * np.nanmedian(np.abs(means - middle), axis=0)
    variance = np.nanmedian(within, axis=0) + between**2
    counted: Floats = np.asarray(seen.any(axis=0), dtype=np.float64)
    square: Floats = np.asarray(middle**2 + variance, dtype=np.float64)
    return FeatureSums(counted, middle, square)
