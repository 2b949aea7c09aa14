"""A population that is not stored: site i is made from its number, so that a million sites exist and cost nothing."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmeta.data.population import Population, unknown_site
from fedmeta.data.ragged import IntArray, Ragged, ends
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from fedmeta.randomness import Keys, row_draws, site_keys, uniform

_SEED = 0
"""The population is a data set, the same in every run; a run's seed draws who trains and on what."""

_SPREAD = 0.5
"""Standard deviation of a coordinate of a class's common centre; rows have standard deviation 1 about their centre."""


class NumberedNames(Sequence[str]):
    """The names site-0 to site-(count - 1), zero-padded to one width so that they sort by number; made on demand."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._width = len(str(count - 1))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        numbers = range(self._count)[index]
        return self.of([numbers])[0] if isinstance(numbers, int) else self.of(numbers)

    def of(self, numbers: Iterable[int]) -> list[str]:
        """Returns the names of some numbers."""
        width = self._width
        return [f"site-{number:0{width}d}" for number in numbers]

    def numbers(self, names: Sequence[str]) -> list[int]:
        """Returns the numbers of names, all at once; raises `KeyError` with the first that is not one of these."""
        try:
            numbers = [int(name[5:]) for name in names]
        except ValueError:
            numbers = []
        # Making the names again is quicker than looking at each, and sees every other spelling of a number.
        if numbers and min(numbers) >= 0 and max(numbers) < self._count and self.of(numbers) == list(names):
            return numbers
        for name in names:
            if name not in self:
                raise KeyError(name)
        return numbers

    def __iter__(self) -> Iterator[str]:
        return map(f"site-{{:0{self._width}d}}".format, range(self._count))

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str) or len(name) != 5 + self._width or not name[5:].isdecimal():
            return False
        number = int(name[5:])
        return number < self._count and self[number] == name


@dataclass(frozen=True)
class SyntheticPopulation(Population):
    """Sites whose rule from features to classes differs from site to site.

    A row of class c at site i is drawn around the centre m_c + heterogeneity · d_ic with unit variance; m_c is common
    to all sites and d_ic the site's own, both normal with standard deviation 0.5 per feature. The best rule
    at a site is linear in x with weights that are these centres: with heterogeneity 0 one rule serves all sites, and
    the larger it is the more a site gains by adapting.

    Attributes:
        names: The sites' names.
        class_names: "0", "1", ...
        feature_names: "x0", "x1", ...
        site_rows: Rows of a site, the same at each.
        heterogeneity: How far sites differ.
    """

    names: NumberedNames
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    site_rows: int
    heterogeneity: float
    missing: bool = False
    tokens: bool = False
    exchangeable: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a row: one axis."""
        return (len(self.feature_names),)

    def find(self, names: Sequence[str]) -> IntArray:
        """Returns the numbers of the named sites; raises `FedmetaError` where there is no such site."""
        try:
            return np.array(self.names.numbers(names), dtype=np.int64)
        except KeyError as error:
            raise unknown_site(error.args[0], self.names) from None

    def names_of(self, sites: IntArray) -> tuple[str, ...]:
        """Returns the names of some sites."""
        return tuple(self.names.of(sites.tolist()))

    def keys(self, sites: IntArray) -> Keys:
        """Returns the random key of each site."""
        return site_keys(self.names.of(sites.tolist()))

    def sizes(self, sites: IntArray) -> IntArray:
        """Returns how many rows each site has."""
        return np.full(len(sites), self.site_rows, dtype=np.int64)

    def rows(self, sites: IntArray) -> Ragged:
        """Returns the rows of each site: site i has the numbers from i · site_rows."""
        rows = sites[:, None] * self.site_rows + np.arange(self.site_rows)
        return Ragged(rows.reshape(-1), ends(self.sizes(sites)))

    def labels(self, rows: IntArray) -> NDArray[np.int64]:
        """Returns the classes of rows: uniform draws."""
        sites, positions = np.divmod(rows, self.site_rows)
        drawn = uniform(row_draws(_SEED, "synthetic class", 0, sites.astype(np.uint64), positions))
        return (drawn * len(self.class_names)).astype(np.int64)

    def features(self, rows: IntArray) -> Tensor:
        """Returns the features of rows [n] as a new tensor [n, features], float32."""
        sites, positions = np.divmod(rows, self.site_rows)
        width, classes = len(self.feature_names), len(self.class_names)
        common = normals("synthetic centre", np.zeros(1, dtype=np.uint64), classes * width)
        distinct, owners = np.unique(sites, return_inverse=True)
        own = normals("synthetic site", distinct.astype(np.uint64), classes * width)
        own *= np.float32(_SPREAD * self.heterogeneity)
        own += np.float32(_SPREAD) * common
        centres = own.reshape(-1, width)[owners * classes + self.labels(rows)]
        row_keys = row_draws(_SEED, "synthetic row", 0, sites.astype(np.uint64), positions)
        centres += normals("synthetic noise", row_keys, width)
        return torch.from_numpy(centres)

    @property
    def digest(self) -> str:
        """A hash of what the population is made from."""
        made_from = (
            len(self.names),
            self.site_rows,
            len(self.feature_names),
            len(self.class_names),
            self.heterogeneity,
        )
        return blake2b(repr(("synthetic", *made_from)).encode(), digest_size=16).hexdigest()


def load_synthetic(data: Data) -> SyntheticPopulation:
    """Returns the population of `data.sites` sites with `rows` rows of `features` features and `classes` classes."""
    if data.rows < data.min_rows:
        raise FedmetaError(f"data.min_rows = {data.min_rows} leaves no site: synthetic sites have {data.rows} rows")
    return SyntheticPopulation(
        names=NumberedNames(data.sites),
        class_names=tuple(str(label) for label in range(data.classes)),
        feature_names=tuple(f"x{column}" for column in range(data.features if isinstance(data.features, int) else 0)),
        site_rows=data.rows,
        heterogeneity=data.heterogeneity,
    )


def normals(purpose: str, keys: Keys, count: int) -> NDArray[np.float32]:
    """Returns stateless standard normal draws [keys, count], by Box and Muller (1958), two from each 64-bit draw."""
    bits = row_draws(_SEED, purpose, 0, keys[:, None], np.arange((count + 1) // 2)[None])
    radius, angle = (bits >> np.uint64(32)).astype(np.float32), (bits & np.uint64(0xFFFFFFFF)).astype(np.float32)
    radius += np.float32(1)
    radius *= np.float32(2.0**-32)
    np.log(radius, out=radius)
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle *= np.float32(2 * np.pi * 2.0**-32)
    drawn = np.empty((*bits.shape, 2), dtype=np.float32)
    np.multiply(radius, np.cos(angle), out=drawn[..., 0])
    np.multiply(radius, np.sin(angle), out=drawn[..., 1])
    return drawn.reshape(len(keys), -1)[:, :count]
