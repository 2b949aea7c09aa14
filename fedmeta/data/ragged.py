"""Lists of rows of unequal length, one per site, held in two arrays."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """Lists of row numbers, one per site, end to end.

    Attributes:
        rows: The row numbers of all sites [N].
        offsets: Where each site's list begins, and where the last ends [sites + 1].
    """

    rows: IntArray
    offsets: IntArray

    def __len__(self) -> int:
        """The number of sites."""
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> IntArray:
        """The length of each list [sites]."""
        return np.diff(self.offsets)

    @cached_property
    def owners(self) -> IntArray:
        """The list that each row number is in [N], counted from 0."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @cached_property
    def positions(self) -> IntArray:
        """The place of each row number within its list [N], counted from 0."""
        return np.arange(len(self.rows)) - np.repeat(self.offsets[:-1], self.sizes)

    def of(self, site: int) -> IntArray:
        """Returns the row numbers of one site, as a view."""
        return self.rows[self.offsets[site] : self.offsets[site + 1]]

    def take(self, sites: IntArray) -> "Ragged":
        """Returns the lists of some sites, in the order of `sites`."""
        starts = self.offsets[sites]
        return self.cut(starts, self.offsets[sites + 1] - starts)

    def cut(self, starts: IntArray, counts: IntArray) -> "Ragged":
        """Returns the stretches of `rows` that begin at `starts` and are `counts` long, as lists."""
        offsets = ends(counts)
        spans = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return Ragged(self.rows[spans], offsets)


def ends(counts: IntArray) -> IntArray:
    """Returns where lists of these lengths begin and end when laid end to end [sites + 1]."""
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def group_rows(owners: IntArray, sites: int, order: NDArray[np.generic] | None = None) -> Ragged:
    """Returns the rows of each site as lists.

    Args:
        owners: The site of each row [rows].
        sites: How many sites there are.
        order: What rows are ordered by within a site [rows]; without it, and among equals, as they come.
    """
    by = (owners,) if order is None else (order, owners)
    return Ragged(np.lexsort(by), ends(np.bincount(owners, minlength=sites)))
