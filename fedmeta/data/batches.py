"""Rows by number to a batch of tensors: the path that every row of every round takes."""

import numpy as np
import torch
from torch import Tensor

from fedmeta.data.episodes import Episodes, Padded
from fedmeta.data.population import Population
from fedmeta.data.ragged import IntArray
from fedmeta.data.sums import Standardisation
from fedmeta.task import Batch, Rows

_WIDE = (torch.int32, torch.uint32, torch.int64, torch.uint64, torch.float64)


def gather(
    population: Population,
    episodes: Episodes,
    standardisation: Standardisation,
    codes: IntArray,
    dtype: torch.dtype = torch.float32,
) -> Batch:
    """Returns a cohort's episodes as one batch of tensors on the processor.

    Features are standardised and missing ones imputed (tokens stay as they are, int64). Labels are int64 codes into
    the run's class list, or of type `dtype` for regression. A row whose label is not in that list has mask 0 and
    label 0 where it would be learned from, and mask 1 and label -1 where it is scored. Padding is 0 throughout.

    Args:
        population: Whose rows.
        episodes: Which rows.
        standardisation: The run's.
        codes: The run's code of each of the population's classes, -1 = none (`class_codes`); empty for regression.
        dtype: The type of features, of regression targets and of the mask.
    """
    support = gather_rows(population, episodes.support, standardisation, codes, dtype, scored=False)
    return Batch(support, gather_rows(population, episodes.query, standardisation, codes, dtype, episodes.scored))


def gather_rows(
    population: Population,
    padded: Padded,
    standardisation: Standardisation,
    codes: IntArray,
    dtype: torch.dtype = torch.float32,
    scored: bool = False,
) -> Rows:
    """Returns x [sites, n, *shape], y [sites, n] and mask [sites, n] of padded lists of rows, as `gather` does.

    Args:
        population: Whose rows.
        padded: Which rows.
        standardisation: The run's.
        codes: The run's code of each of the population's classes; empty for regression.
        dtype: The type of features, of regression targets and of the mask.
        scored: Whether rows of classes not in the run's list keep mask 1, with label -1.
    """
    sites, length = padded.rows.shape
    flat = _prepared(population, padded.rows.reshape(-1), standardisation, dtype)
    padding = np.flatnonzero(~padded.mask)
    if len(padding):
        flat.index_fill_(0, torch.from_numpy(padding), 0)
    x = flat.view(sites, length, *population.shape)
    labels = population.labels(padded.rows)
    if population.regression:
        y = torch.from_numpy(np.where(padded.mask, labels, 0.0)).to(dtype)
        return x, y, torch.from_numpy(padded.mask).to(dtype)
    known = codes[labels]
    mask = padded.mask if scored else padded.mask & (known >= 0)
    y = torch.from_numpy(np.where(mask, known, 0))
    return x, y, torch.from_numpy(mask).to(dtype)


def _prepared(population: Population, rows: IntArray, standardisation: Standardisation, dtype: torch.dtype) -> Tensor:
    """Returns the features of rows, standardised and imputed [n, *shape]."""
    raw = population.features(rows)
    if population.tokens:
        return raw.to(torch.int64)
    # Large numbers (times, identifiers) lose their differences in float32 before the mean is off.
    x = raw.to(torch.float64 if raw.dtype in _WIDE else dtype)
    if not standardisation.identity:
        x.sub_(torch.from_numpy(standardisation.mean)).div_(torch.from_numpy(standardisation.scale))
    if population.missing:
        x.nan_to_num_(nan=0.0)
    return x.to(dtype)
