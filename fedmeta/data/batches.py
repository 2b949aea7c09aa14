"""Rows by number to a batch of tensors: the path that every row of every round takes."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.data.episodes import Episodes, Padded, beside
from fedmeta.data.gram import GramCache
from fedmeta.data.population import ArrayPopulation, Population
from fedmeta.data.ragged import IntArray
from fedmeta.data.sums import Standardisation
from fedmeta.errors import FedmetaError
from fedmeta.task import Batch, Rows

AT_ONCE = 1 << 28
"""Bytes of features up to which a population's are standardised all at once, and then no more in any round."""

AS_IS = Standardisation(np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.float32))
"""Features stay as they are."""

_WIDE = (torch.int32, torch.uint32, torch.int64, torch.uint64, torch.float64)


def gather(
    population: Population,
    episodes: Episodes,
    standardisation: Standardisation,
    codes: IntArray,
    dtype: torch.dtype = torch.float32,
    pairs: GramCache | None = None,
) -> Batch:
    """Returns a cohort's episodes as one batch of tensors on the processor.

    Features are standardised and missing ones imputed (tokens stay as they are, int64). Labels are int64 codes into
    the run's class list, or for regression targets in standard units, of type `dtype`. A row whose label is not in that
    list has mask 0 and label 0 where it would be learned from, and mask 1 and label -1 where it is scored. Padding is 0
    throughout. In training a site's support and query rows lie one after the other in one array.

    Args:
        population: Whose rows.
        episodes: Which rows.
        standardisation: The run's.
        codes: The run's code of each of the population's classes, -1 = none (`class_codes`); empty for regression.
        dtype: The type of features, of regression targets and of the mask.
        pairs: The inner products of the population's rows, where they are known; a batch of training has its own.
    """
    if not episodes.scored:
        together = beside(*episodes[:2])
        rows = gather_rows(population, together, standardisation, codes, dtype)
        first = episodes.support.rows.shape[1]
        parts = (tuple(tensor[:, :first] for tensor in rows), tuple(tensor[:, first:] for tensor in rows))
        return Batch(*parts, None if pairs is None else pairs.of(together.rows, together.mask))
    support = gather_rows(population, episodes.support, standardisation, codes, dtype, scored=False)
    return Batch(support, gather_rows(population, episodes.query, standardisation, codes, dtype, episodes.scored))


@lru_cache(maxsize=2)
def standardised(
    population: Population, standardisation: Standardisation, dtype: torch.dtype
) -> tuple[Population, Standardisation]:
    """Returns a population whose features need no more than to be gathered, where it is in memory and small.

    Else the two as they are: of a file that is mapped no rows are read but a cohort's. Pixels are standardised after a
    task has turned them: not for tasks that do.

    Args:
        population: The population.
        standardisation: The run's.
        dtype: The type of features.
    """
    if not isinstance(population, ArrayPopulation) or population.tokens or standardisation.identity:
        return population, standardisation
    if isinstance(population.x, np.memmap) or population.x.size * dtype.itemsize > AT_ONCE:
        return population, standardisation
    x = _prepared(population, torch.from_numpy(population.x.copy()), standardisation, dtype)
    return replace(population, x=x.numpy(), missing=False), replace(AS_IS, target=standardisation.target)


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
    raw = population.features(padded.rows.reshape(-1))
    if padded.turns is not None:
        raw = turn(raw, padded.turns.reshape(-1))
    flat = _prepared(population, raw, standardisation, dtype)
    padding = np.flatnonzero(~padded.mask)
    if len(padding):
        flat.index_fill_(0, torch.from_numpy(padding), 0)
    x = flat.view(sites, length, *population.shape)
    labels = population.labels(padded.rows) if padded.labels is None else padded.labels
    if population.regression:
        own: NDArray[np.float64] = standardisation.target.standardize(np.asarray(labels, dtype=np.float64))
        there = padded.mask if own.ndim == 2 else padded.mask[..., None]
        y = torch.from_numpy(np.where(there, own, 0.0)).to(dtype)
        return x, y, torch.from_numpy(padded.mask).to(dtype)
    known = codes[labels]
    mask = padded.mask if scored else padded.mask & (known >= 0)
    y = torch.from_numpy(np.where(mask, known, 0))
    return x, y, torch.from_numpy(mask).to(dtype)


def turn(images: Tensor, quarters: IntArray) -> Tensor:
    """Returns images [n, *shape], each turned in place by its number [n] of quarter turns."""
    axes = [axis + 1 for axis in square_sides(tuple(images.shape[1:]))]
    for number in (1, 2, 3):
        places = torch.from_numpy(np.flatnonzero(quarters == number))
        images[places] = torch.rot90(images[places], number, axes)
    return images


def square_sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the two axes of a square image's sides; raises `FedmetaError` where rows of this shape are none."""
    first = 1 if len(shape) == 3 and shape[0] in (1, 3, 4) else 0
    planes = shape[:first] + shape[first + 2 :]
    if len(shape) not in (2, 3) or shape[first] != shape[first + 1] or planes not in ((), (1,), (3,), (4,)):
        raise FedmetaError(f"data.rotations needs square images, not rows of shape {shape}: set it to false")
    return first, first + 1


def _prepared(population: Population, raw: Tensor, standardisation: Standardisation, dtype: torch.dtype) -> Tensor:
    """Returns the features of rows, standardised and imputed [n, *shape]."""
    if population.tokens:
        return raw.to(torch.int64)
    # Large numbers (times, identifiers) lose their differences in float32 before the mean is off.
    x = raw.to(torch.float64 if raw.dtype in _WIDE else dtype)
    if not standardisation.identity:
        x.sub_(torch.from_numpy(standardisation.mean)).div_(torch.from_numpy(standardisation.scale))
    if population.missing:
        x.nan_to_num_(nan=0.0)
    return x.to(dtype)
