"""Gram matrices of the sites' rows, x x^T: all that a wide linear layer's adaptation needs to know of the rows.

They are the same in every round; see `fedmeta.engines.lowrank.engine`, where they are a A^T.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.data.population import ArrayPopulation, Population
from fedmeta.data.ragged import IntArray
from fedmeta.data.sums import Standardisation

AT_ONCE = 1 << 26
"""Bytes of products up to which they are kept."""

WIDE = 256
"""How many numbers a row has at the least for its products to be looked up: below, they are as soon computed."""


@dataclass(frozen=True, eq=False)
class GramCache:
    """The inner products of each site's rows with each other: their Gram matrices.

    Attributes:
        products: Each row's with those of its site, in the site's own order [rows, longest].
        places: Each row's place in that order [rows].
    """

    products: Tensor
    places: Tensor

    def of(self, rows: IntArray, mask: NDArray[np.bool_]) -> Tensor:
        """Returns the inner products of each site's rows [sites, n] with each other, [sites, n, n]; 0 for padding."""
        sites, n = rows.shape
        flat = torch.from_numpy(rows.reshape(-1))
        own = self.products.index_select(0, flat).view(sites, n, -1)
        found = own.gather(2, self.places.index_select(0, flat).view(sites, 1, n).expand(sites, n, n))
        if not mask.all():
            there = torch.from_numpy(mask)
            found.masked_fill_(~(there.unsqueeze(2) & there.unsqueeze(1)), 0)
        return found


@lru_cache(maxsize=2)
def gram_matrices(population: Population, standardisation: Standardisation, dtype: torch.dtype) -> GramCache | None:
    """Returns the inner products of a population's rows; None where they are many, or rows narrow or not as stored.

    Args:
        population: The population; one that is read from a file row by row has none.
        standardisation: The run's; rows that are standardised in each round have none.
        dtype: The type of features.
    """
    if not isinstance(population, ArrayPopulation) or isinstance(population.x, np.memmap):
        return None
    x = torch.from_numpy(population.x).flatten(1)
    as_stored = standardisation.identity and not population.missing and not population.tokens and x.dtype == dtype
    longest = int(population.sites.sizes.max(initial=0))
    if not as_stored or x.shape[1] < WIDE or len(x) * longest * dtype.itemsize > AT_ONCE:
        return None
    products, places = torch.zeros(len(x), longest, dtype=dtype), torch.zeros(len(x), dtype=torch.int64)
    for site in range(len(population)):
        rows = torch.from_numpy(population.sites.of(site))
        own = x[rows]
        products[rows, : len(rows)] = own @ own.T
        places[rows] = torch.arange(len(rows))
    return GramCache(products, places)
