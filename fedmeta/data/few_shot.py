"""Few-shot tasks: N classes of a site's own, renumbered, and k rows of each to adapt on (Vinyals et al. 2016).

Such a population's labels distinguish a site's classes and mean nothing elsewhere; what a model learns is a task's own
numbering, the classes "way 0" to "way N-1". A task depends on the seed, the round, the site's name and its own rows.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.batches import square_sides
from fedmeta.data.episodes import Episodes, Padded
from fedmeta.data.population import ArrayPopulation, Population
from fedmeta.data.ragged import IntArray, Ragged
from fedmeta.data.splits import Split
from fedmeta.data.stratified import first_rows
from fedmeta.errors import FedmetaError
from fedmeta.experiment import Data
from fedmeta.randomness import Keys, draws, row_draws


def few_shot(population: Population, data: Data) -> Population:
    """Returns a population from whose sites tasks of `data.ways` classes are drawn: sites with fewer are left out.

    Raises:
        FedmetaError: Rows have no classes that a task could renumber, no site has enough, or images to be turned
            are not square.
    """
    ways = data.ways or 0
    if not isinstance(population, ArrayPopulation) or population.regression or population.tokens:
        raise FedmetaError(
            f"data.ways = {ways}: few-shot tasks renumber a site's own classes, and the labels of this data set "
            "are not such classes: leave it out"
        )
    if data.rotations:
        square_sides(population.shape)
    sites = population.sites
    pairs = np.unique(np.stack([sites.owners, population.y[sites.rows]]), axis=1)
    classes = np.bincount(pairs[0], minlength=len(sites)) * (4 if data.rotations else 1)
    enough = np.flatnonzero(classes >= ways)
    if not len(enough):
        raise FedmetaError(f"data.ways = {ways}: no site has so many classes; the most that one has is {classes.max()}")
    width = len(str(ways - 1))
    return replace(
        population,
        names=tuple(population.names[site] for site in enough),
        sites=sites.take(enough),
        class_names=tuple(f"way {way:0{width}d}" for way in range(ways)),
    )


def training_tasks(split: Split, sites: IntArray, round_number: int, data: Data) -> Episodes:
    """Returns one task of each site of a cohort, drawn again each round from its train rows.

    Args:
        split: The population, which of its rows train, and the run's seed.
        sites: The cohort, as site numbers.
        round_number: The round.
        data: `ways`, classes of a task (fewer where a site has fewer of two train rows); `shots`, rows of each to
            adapt on (of a class with no more than that, all but one); `query`, rows that score it, as many of each
            class as go into it, one at the least; `rotations`, whether a class turned by a quarter, a half or three
            quarters of a circle is another one (Santoro et al. 2016).
    """
    population, ways = split.population, data.ways or 0
    rows = split.train_rows(sites)
    own = _by_class(population, rows, population.keys(sites), split.seed, "task", round_number)
    drawn = _draw(own, own.counts > 1, ways, data.rotations)
    supports = np.minimum(data.shots, own.counts - 1)
    queries = np.minimum(max(1, data.query // ways), own.counts - supports)
    table = _Table(len(sites), ways, data.rotations)
    return Episodes(
        table.of(own, drawn, own.starts, supports),
        table.of(own, drawn, own.starts + supports, queries),
        scored=False,
    )


def evaluation_tasks(split: Split, sites: IntArray, tasks: int, data: Data) -> Episodes:
    """Returns the tasks that score sites, the same at every evaluation: those of the first site, of the second, ...

    A task adapts on `data.shots` train rows of each of its classes, and all test rows of these classes score it.

    Args:
        split: The population, which of its rows train, and the run's seed.
        sites: Site numbers.
        tasks: Tasks of each site.
        data: As for `training_tasks`.
    """
    population, ways, seed, purpose = split.population, data.ways or 0, split.seed, "evaluation task"
    repeated, numbers = np.repeat(sites, tasks), np.tile(np.arange(tasks), len(sites))
    keys = row_draws(seed, purpose, 0, population.keys(repeated), numbers)
    own = _by_class(population, split.train_rows(repeated), keys, seed, purpose)
    held_out = _by_class(population, split.test_rows(repeated), keys, seed, purpose)
    places = {pair: place for place, pair in enumerate(held_out.pairs())}
    there = np.array([places.get(pair, -1) for pair in own.pairs()], dtype=np.int64)
    drawn = _draw(own, there >= 0, ways, data.rotations)
    scored = drawn._replace(places=there[drawn.places])
    table = _Table(len(repeated), ways, data.rotations)
    return Episodes(
        table.of(own, drawn, own.starts, np.minimum(data.shots, own.counts)),
        table.of(held_out, scored, held_out.starts, held_out.counts),
        scored=True,
    )


class _Classes(NamedTuple):
    """The rows of tasks by class, in a drawn order within each.

    Attributes:
        rows: Row numbers, class by class [rows].
        starts: Where each class begins [classes of all tasks].
        counts: How many rows it has.
        owners: Its task.
        labels: What the population calls it.
        draws: Four random draws of it [classes, quarter turns].
    """

    rows: IntArray
    starts: IntArray
    counts: IntArray
    owners: IntArray
    labels: NDArray[Any]
    draws: Keys

    def pairs(self) -> list[tuple[int, int]]:
        """Returns the task and label of each class."""
        return list(zip(self.owners.tolist(), self.labels.tolist(), strict=True))


class _Drawn(NamedTuple):
    """The classes of tasks: which class, how it is turned, and its number in its task."""

    places: IntArray
    turns: IntArray
    ways: IntArray


def _by_class(
    population: Population, rows: Ragged, keys: Keys, seed: int, purpose: str, round_number: int = 0
) -> _Classes:
    drawn = row_draws(seed, purpose, round_number, keys, rows.positions, rows.owners)
    labels = population.labels(rows.rows)
    order = np.lexsort((drawn, labels, rows.owners))
    labels, owners = labels[order], rows.owners[order]
    starts = first_rows(labels, owners)
    counts = np.diff(np.append(starts, len(order)))
    # Keyed by a row's draw and not by the label, which another node may number otherwise.
    own = drawn[order[starts]]
    each = [draws(seed, f"{purpose} class turned by {turn}", round_number, own) for turn in range(4)]
    return _Classes(rows.rows[order], starts, counts, owners[starts], labels[starts], np.stack(each, axis=1))


def _draw(classes: _Classes, eligible: NDArray[np.bool_], ways: int, rotations: bool) -> _Drawn:
    """Returns the classes of each task: the `ways` eligible ones of lowest draw, numbered in that order."""
    turns = 4 if rotations else 1
    places, turned = np.repeat(np.flatnonzero(eligible), turns), np.tile(np.arange(turns), int(eligible.sum()))
    order = np.lexsort((classes.draws[places, turned], classes.owners[places]))
    owners = classes.owners[places[order]]
    ranks = np.arange(len(order)) - np.searchsorted(owners, owners)
    taken = order[ranks < ways]
    return _Drawn(places[taken], turned[taken], ranks[ranks < ways])


class _Table(NamedTuple):
    """The form of a batch of tasks."""

    tasks: int
    ways: int
    rotations: bool

    def of(self, classes: _Classes, drawn: _Drawn, starts: IntArray, counts: IntArray) -> Padded:
        """Returns a stretch of the rows of each drawn class, with the classes' numbers as labels.

        The classes take turns, one row of each after another: each stretch of a task has them in proportion, as the
        folds of `fedmeta.engines.step_selection` need it.
        """
        columns = np.arange(max(1, int(counts[drawn.places].max(initial=0))))
        there = columns < counts[drawn.places, None]
        shape = (self.tasks, self.ways, len(columns))
        rows, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
        labels, turns = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        at = classes.owners[drawn.places], drawn.ways
        mask[at] = there
        rows[at] = classes.rows[np.where(there, starts[drawn.places, None] + columns, 0)]
        labels[at] = drawn.ways[:, None]
        turns[at] = drawn.turns[:, None]
        # What pads a task comes last.
        order = np.argsort(~mask.swapaxes(1, 2).reshape(self.tasks, -1), axis=1, kind="stable")

        def flat(table: NDArray[Any]) -> NDArray[Any]:
            return np.take_along_axis(table.swapaxes(1, 2).reshape(self.tasks, -1), order, axis=1)

        return Padded(flat(rows), flat(mask), flat(labels), flat(turns) if self.rotations else None)
