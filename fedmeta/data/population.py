"""Who holds which rows.

A population is sites, and rows that are addressed by number. What a round asks of it (sizes, labels and features of
the cohort's rows) touches the cohort's sites alone, so that a round costs the same whether a thousand sites exist or
a million, and whether their rows are stored (`ArrayPopulation`) or made from their numbers (`SyntheticPopulation`).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.data.ragged import IntArray, Ragged
from fedmeta.errors import FedmetaError, nearest
from fedmeta.randomness import Keys, site_keys


class Population(ABC):
    """Sites and their rows. Sites are numbered in the order of their names; a row has one number in the population.

    Attributes:
        names: The sites' names, sorted. For a population that is not stored, made on demand.
        class_names: The label that each code stands for; empty for regression.
        target_names: What each target of a regression is called; empty for classes.
        feature_names: The features' names where a row is a vector; empty for images.
        missing: Whether a feature may be missing (NaN).
        tokens: Whether features are codes of symbols, to be embedded: never standardised, int64 in batches.
        exchangeable: Whether a site's rows have no order, so that its first can train and its last test without a draw.
        in_time: Whether a site's own order is known to be that of time.
    """

    names: Sequence[str]
    class_names: tuple[str, ...]
    target_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...]
    missing: bool
    tokens: bool
    exchangeable: bool
    in_time: bool = False

    def __len__(self) -> int:
        """The number of sites."""
        return len(self.names)

    @property
    def regression(self) -> bool:
        """Whether labels are numbers to be approached rather than classes."""
        return not self.class_names

    @property
    def targets(self) -> int:
        """How many numbers are predicted for each row; 0 for classes."""
        return max(1, len(self.target_names)) if self.regression else 0

    @property
    def all_sites(self) -> IntArray:
        """The numbers of all sites."""
        return np.arange(len(self.names))

    def names_of(self, sites: IntArray) -> tuple[str, ...]:
        """Returns the names of some sites."""
        return tuple(self.names[site] for site in sites.tolist())

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of a row of features."""

    @abstractmethod
    def find(self, names: Sequence[str]) -> IntArray:
        """Returns the numbers of the named sites; raises `FedmetaError` where there is no such site."""

    @abstractmethod
    def keys(self, sites: IntArray) -> Keys:
        """Returns the random key of each site [sites], a hash of its name."""

    @abstractmethod
    def sizes(self, sites: IntArray) -> IntArray:
        """Returns how many rows each site has [sites]."""

    @abstractmethod
    def rows(self, sites: IntArray) -> Ragged:
        """Returns the rows of each site in the site's own order."""

    @abstractmethod
    def labels(self, rows: IntArray) -> NDArray[Any]:
        """Returns the labels of rows, in the shape of `rows`: int64 codes into `class_names`, or float64 targets.

        Of several targets each row has them along a last axis.

        Of rows that few-shot tasks are drawn from: codes that distinguish a site's own classes.
        """

    @abstractmethod
    def features(self, rows: IntArray) -> Tensor:
        """Returns the features of rows [n] as a new tensor [n, *shape], in the type that they are stored in."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """A hash of the population's content, 32 characters."""


@dataclass(frozen=True, eq=False)
class ArrayPopulation(Population):
    """A population whose rows lie in one array, in memory or mapped from a file; sites are lists of row numbers.

    Attributes:
        x: Features [rows, *shape] in the file's own type; NaN = missing.
        y: Labels [rows]: int64 codes into `class_names`, or float64; of several targets [rows, targets].
        names: The sites' names, sorted.
        sites: The rows of each site in the site's own order: by time where known, else as in the file.
        class_names: The label of each code; empty for regression.
        feature_names: The features' names where a row is a vector.
        missing: Whether any feature is NaN.
        tokens: Whether features are codes of symbols.
        target_names: What each target is called; empty for classes.
        categories: The columns of x that hold codes, by name, and the names that the codes stand for.
        notes: What reading the data left out or decided, a sentence each.
        in_time: Whether a site's own order is known to be that of time.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    names: tuple[str, ...]
    sites: Ragged
    class_names: tuple[str, ...] = ()
    feature_names: tuple[str, ...] = ()
    missing: bool = False
    tokens: bool = False
    exchangeable: bool = False
    target_names: tuple[str, ...] = ()
    categories: tuple[tuple[str, tuple[str, ...]], ...] = ()
    notes: tuple[str, ...] = ()
    in_time: bool = False

    @property
    def targets(self) -> int:
        """How many numbers are predicted for each row; 0 for classes."""
        return (self.y.shape[1] if self.y.ndim > 1 else 1) if self.regression else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row of features."""
        return tuple(self.x.shape[1:])

    def find(self, names: Sequence[str]) -> IntArray:
        """Returns the numbers of the named sites; raises `FedmetaError` where there is no such site."""
        try:
            return np.array([self._numbers[name] for name in names], dtype=np.int64)
        except KeyError as error:
            raise unknown_site(error.args[0], self.names) from None

    def keys(self, sites: IntArray) -> Keys:
        """Returns the random key of each site."""
        return self._keys[sites]

    def sizes(self, sites: IntArray) -> IntArray:
        """Returns how many rows each site has."""
        return self.sites.offsets[sites + 1] - self.sites.offsets[sites]

    def rows(self, sites: IntArray) -> Ragged:
        """Returns the rows of each site in the site's own order."""
        return self.sites.take(sites)

    def labels(self, rows: IntArray) -> NDArray[Any]:
        """Returns the labels of rows."""
        return self.y[rows]

    def features(self, rows: IntArray) -> Tensor:
        """Returns the features of rows [n] as a new tensor."""
        return torch.from_numpy(self.x).index_select(0, torch.from_numpy(rows))

    @cached_property
    def digest(self) -> str:
        """A hash of features, labels, names and who holds what; reads all of x on first use."""
        content = blake2b(digest_size=16)
        header = (self.names, self.class_names, self.feature_names, self.x.shape, self.x.dtype.str, self.y.dtype.str)
        content.update(repr((*header, self.categories) if self.categories else header).encode())
        for array in (self.y, self.sites.rows, self.sites.offsets):
            content.update(np.ascontiguousarray(array).data)
        for chunk in chunks(self.x):
            content.update(np.ascontiguousarray(chunk).data)
        return content.hexdigest()

    @cached_property
    def _keys(self) -> Keys:
        return site_keys(self.names)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def unknown_site(name: str, names: Sequence[str]) -> FedmetaError:
    """Returns the error for a name that no site has."""
    return FedmetaError(f'no site "{name}" among {len(names)} sites{nearest(name, names[:10_000])}')


def left_out(there: Sequence[str], without: Sequence[str]) -> tuple[frozenset[str], list[str]]:
    """Returns those of the names in `data.without` that are there, and a note on each of the others.

    Raises:
        FedmetaError: No site would be left.
    """
    known, given = set(there), dict.fromkeys(without)
    names = frozenset(name for name in given if name in known)
    if there and len(names) == len(known):
        raise FedmetaError("data.without names every site")
    return names, [f'data.without: there is no site "{name}" to leave out' for name in given if name not in known]


def without_sites(population: Population, without: Sequence[str]) -> Population:
    """Returns a population as if it did not hold some sites.

    Raises:
        FedmetaError: No site would be left, or the population makes its sites from their numbers.
    """
    if not without:
        return population
    if not isinstance(population, ArrayPopulation):
        raise FedmetaError(
            "data.without: sites can be left out of stored rows alone, and this source makes rows from their numbers"
        )
    names, notes = left_out(population.names, without)
    kept = np.array([place for place, name in enumerate(population.names) if name not in names], dtype=np.int64)
    left = tuple(population.names[place] for place in kept.tolist())
    return replace(population, names=left, sites=population.sites.take(kept), notes=(*population.notes, *notes))


def chunks(x: NDArray[Any], size: int = 1 << 24) -> Iterable[NDArray[Any]]:
    """Yields an array in views of consecutive rows of at most `size` bytes (one row at the least)."""
    step = max(1, size // max(1, x.nbytes // max(1, len(x))))
    for start in range(0, len(x), step):
        yield x[start : start + step]


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the distinct class names in the order of a run: numerically where all are numbers, else as text."""
    distinct = sorted(set(names))
    try:
        numbers = [float(name) for name in distinct]
    except ValueError:
        return tuple(distinct)
    if not np.isfinite(numbers).all():
        return tuple(distinct)
    return tuple(name for _, name in sorted(zip(numbers, distinct, strict=True)))


def class_codes(local: Sequence[str], run: Sequence[str]) -> IntArray:
    """Returns the code in the run's class list of each code of a population's own list [local]; -1 = not in the run's.

    Args:
        local: The class names of a population.
        run: The class list fixed at the start of a run.
    """
    codes = {name: code for code, name in enumerate(run)}
    return np.array([codes.get(name, -1) for name in local], dtype=np.int64)
