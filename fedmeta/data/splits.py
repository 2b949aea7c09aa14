"""Which rows of a site train and which test, and which sites never train."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmeta.data.population import Population
from fedmeta.data.ragged import IntArray, Ragged
from fedmeta.data.stratified import stratified
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import ROW_ORDER, Data
from fedmeta.randomness import draws, row_draws, site_keys


@dataclass(frozen=True)
class Split:
    """The train and test rows of every site, fixed for a run.

    Attributes:
        population: Whose rows.
        seed: The run's seed.
        test: Share of a site's rows that test.
        ordered: The rows of all sites, train before test; None where the population's rows need no order.
    """

    population: Population
    seed: int
    test: float
    ordered: Ragged | None

    def train_sizes(self, sites: IntArray) -> IntArray:
        """Returns how many train rows each site has: one at the least."""
        return self.population.sizes(sites) - self.test_sizes(sites)

    def test_sizes(self, sites: IntArray) -> IntArray:
        """Returns how many test rows each site has: one at the least where it has two rows, else none."""
        sizes = self.population.sizes(sites)
        wanted = np.floor(sizes * self.test + 0.5).astype(np.int64)
        clipped: IntArray = np.clip(wanted, np.minimum(1, sizes - 1), sizes - 1)
        return clipped

    @property
    def half_life(self) -> float:
        """Of how many rows the chance of a row to be drawn halves; 0 = all alike."""
        return 0.0

    def most_support(self, rows: IntArray) -> IntArray:
        """Returns how many of so many train rows [sites] may be support in training: all but one."""
        return rows - 1

    def joining_sizes(self, sites: IntArray) -> tuple[IntArray, IntArray]:
        """Returns how many train and test rows each site announces when it joins."""
        return self.train_sizes(sites), self.test_sizes(sites)

    def train_rows(self, sites: IntArray) -> Ragged:
        """Returns the train rows of each site."""
        ordered, starts = self._ordered(sites)
        return ordered.cut(starts + self._starts(sites), self.train_sizes(sites))

    def test_rows(self, sites: IntArray) -> Ragged:
        """Returns the test rows of each site."""
        ordered, starts = self._ordered(sites)
        return ordered.cut(starts + self._starts(sites) + self.train_sizes(sites), self.test_sizes(sites))

    def _starts(self, sites: IntArray) -> IntArray:
        """Returns the place of each site's first train row among its own."""
        return np.zeros(len(sites), dtype=np.int64)

    def _ordered(self, sites: IntArray) -> tuple[Ragged, IntArray]:
        """Returns rows, train before test, and where in them each site's begin."""
        if self.ordered is not None:
            return self.ordered, self.ordered.offsets[sites]
        rows = self.population.rows(sites)
        return rows, rows.offsets[:-1]


def split(population: Population, data: Data, seed: int) -> Split:
    """Returns which rows of each site train and which test.

    A site's split depends on the seed, its name and how many rows it has, and on nothing else.

    Args:
        population: Whose rows.
        data: `test` (share of a site's rows) and `split` (with "blocks" the last rows in its order test, with "time"
            too, where that order is known to be time; else a draw); with `ways` each class is split so.
        seed: The run's seed.

    Raises:
        FedmetaError: Later rows are to test, and the data have no order in time.
    """
    if data.split == "time":
        check_in_time(population, '[data] split = "time"')
    if population.exchangeable:
        return Split(population, seed, data.test, None)
    rows = population.rows(population.all_sites)
    blocks = data.neighbors_alike
    if blocks and not data.ways:
        return Split(population, seed, data.test, rows)
    keys = population.keys(population.all_sites)
    drawn = row_draws(seed, "split", 0, keys, rows.positions, rows.owners)
    order = np.lexsort((drawn, rows.owners))
    if data.ways:
        labels, within = population.labels(rows.rows), rows.positions if blocks else None
        order = np.lexsort((stratified(labels, rows.owners, drawn, seed, "split", within=within), rows.owners))
    return Split(population, seed, data.test, Ragged(rows.rows[order], rows.offsets))


def check_in_time(population: Population, key: str) -> None:
    """Raises `FedmetaError` where a site's rows are not known to be in time.

    Args:
        population: Whose rows.
        key: The key of the experiment that needs their order.
    """
    if not population.in_time:
        raise FedmetaError(
            f"{key}: the order of rows in time is not known: name its column or array in data.time, or data.time = "
            f'"{ROW_ORDER}" where rows come in time'
        )


def draw_new_sites(names: Sequence[str], new_sites: float | Sequence[str], seed: int) -> tuple[str, ...]:
    """Returns the names, sorted, of the sites that never train: a draw over names that does not depend on their order.

    Args:
        names: The names of all sites.
        new_sites: Below 1 a share of them (one at the least where the share is above 0 and there are two sites; never
            all), from 1 on a count; or their names, and nothing is drawn.
        seed: The run's seed.

    Raises:
        FedmetaError: No training site is left, a count is no whole number, or a named site is not there.
    """
    if not isinstance(new_sites, int | float):
        return _named(names, new_sites)
    most = len(names) - 1
    if new_sites < 1:
        count = min(most, max(1, round(len(names) * new_sites))) if new_sites > 0 else 0
    else:
        count = int(new_sites)
        if count != new_sites:
            raise FedmetaError(f"data.new_sites = {new_sites}: give a share below 1, or a whole number of sites")
        if count > most:
            raise FedmetaError(
                f"data.new_sites = {count} leaves no site to train on: there are {len(names)} sites, so at most {most}"
            )
    return _drawn(names, "new sites", max(0, count), seed)


def draw_validation_sites(names: Sequence[str], validation_sites: float, seed: int) -> tuple[str, ...]:
    """Returns the names, sorted, of the training sites that are split off to choose by: a draw over names.

    Sites are taken in an order that is fixed by the seed: a second draw, from those that a first one left, takes the
    next ones in it.

    Args:
        names: The names of the training sites.
        validation_sites: Below 1 a share of them (one at the least, never all), from 1 on a count.
        seed: The run's seed.

    Raises:
        FedmetaError: No training site is left.
    """
    most = len(names) - 1
    count = min(most, max(1, round(validation_sites * len(names)))) if validation_sites < 1 else int(validation_sites)
    if count > most or most < 1:
        raise FedmetaError(
            f"evaluation.validation_sites = {validation_sites} leaves no site to train on: there are {len(names)} "
            f"training sites, so split off at most {max(0, most)}"
        )
    return _drawn(names, "validation sites", count, seed)


def _drawn(names: Sequence[str], purpose: str, count: int, seed: int) -> tuple[str, ...]:
    """Returns so many of the names, sorted: the first ones in an order that the seed gives each purpose."""
    ordered = sorted(names)
    chosen = np.argsort(draws(seed, purpose, 0, site_keys(ordered)), kind="stable")[:count]
    return tuple(ordered[site] for site in sorted(chosen.tolist()))


def _named(names: Sequence[str], chosen: Sequence[str]) -> tuple[str, ...]:
    there, distinct = set(names), set(chosen)
    for name in chosen:
        if name not in there:
            raise FedmetaError(
                f'data.new_sites: no site "{name}" among {len(names)} sites{nearest(name, names[:10_000])}'
            )
    if len(distinct) == len(there):
        raise FedmetaError("data.new_sites names every site and leaves none to train on")
    return tuple(sorted(distinct))
