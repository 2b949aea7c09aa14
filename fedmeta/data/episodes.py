"""Which rows of a site adapt it and which score it: drawn for a whole cohort at once.

A site's draw depends on the seed, the round, the site's name and its own rows: not on the cohort, nor on its order,
nor on which other sites the node hosts.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.ragged import IntArray, Ragged
from fedmeta.data.splits import Split
from fedmeta.data.stratified import stratified
from fedmeta.minibatches import Minibatches, draw_order
from fedmeta.randomness import Keys, row_draws


class Padded(NamedTuple):
    """Lists of rows, one per site, padded to one length.

    Attributes:
        rows: Row numbers [sites, n]; any row where `mask` is false.
        mask: Whether there is a row [sites, n].
        labels: Each row's code into the population's class names where a task numbers classes itself [sites, n];
            None = the rows' own labels.
        turns: By how many quarter turns each row, an image, is turned [sites, n]; None = as it is.
    """

    rows: IntArray
    mask: NDArray[np.bool_]
    labels: IntArray | None = None
    turns: IntArray | None = None


class Episodes(NamedTuple):
    """The rows that a cohort's sites adapt on, and the rows that score them.

    Attributes:
        support: What each site adapts on.
        query: What scores the adapted model: train rows in training, test rows at evaluation.
        scored: Whether `query` are test rows, so that a row whose label is not in the run's class list counts as
            wrong; in training it counts for nothing.
    """

    support: Padded
    query: Padded
    scored: bool


def training_episodes(split: Split, sites: IntArray, round_number: int, support: int, query: int) -> Episodes:
    """Returns a cohort's support and query rows of one round, drawn again from each site's train rows.

    The rows of a site are put into one order in which every stretch has its classes in proportion, as nearly as whole
    rows allow (at random for regression). Support takes from its front, at most `support` rows and all but one of the
    site's (half of them in a stream); query takes what follows, at most `query` rows. A site with one train row has it
    in query.

    Args:
        split: The population, which of its rows train, and the run's seed.
        sites: The cohort, as site numbers.
        round_number: The round.
        support: Rows that a site adapts on.
        query: Rows that score it.
    """
    order = _drawn_order(split, sites, "episode", round_number)
    supports = np.minimum(support, split.most_support(order.sizes))
    queries = np.minimum(query, order.sizes - supports)
    starts = order.offsets[:-1]
    return Episodes(_pad(order.rows, starts, supports), _pad(order.rows, starts + supports, queries), scored=False)


def training_order(
    split: Split, sites: IntArray, round_number: int, episodes: Episodes, minibatches: Minibatches
) -> IntArray:
    """Returns the order in which a cohort's sites take their rows in a round [sites, epochs, batches, size].

    Args:
        split: The population, and the run's seed.
        sites: The cohort, as site numbers.
        round_number: The round.
        episodes: The rows that the sites have in this round, each site's support rows before its query rows.
        minibatches: How a site goes through them.

    Returns:
        Places among a site's columns of both, -1 for none.
    """
    keys, seed = split.population.keys(sites), split.seed

    def draw(purpose: str, positions: IntArray, owners: IntArray) -> Keys:
        return row_draws(seed, purpose, round_number, keys, positions, owners)

    return draw_order(minibatches, np.concatenate([episodes.support.mask, episodes.query.mask], 1), draw)


def evaluation_episodes(split: Split, sites: IntArray, support: int) -> Episodes:
    """Returns for each site the train rows that it adapts on at every evaluation, and all its test rows.

    The support is drawn once per run, in the manner of `training_episodes`: at most `support` rows, all of a smaller
    site's. A site with one row has no test row: its mask is all false.
    """
    order = _drawn_order(split, sites, "evaluation", 0)
    test = split.test_rows(sites)
    supports = np.minimum(support, order.sizes)
    return Episodes(
        _pad(order.rows, order.offsets[:-1], supports), _pad(test.rows, test.offsets[:-1], test.sizes), scored=True
    )


def beside(one: Padded, other: Padded) -> Padded:
    """Returns two tables of the same sites' rows as one, the columns of the one before those of the other."""

    def together(first: IntArray | None, second: IntArray | None) -> IntArray | None:
        return None if first is None or second is None else np.concatenate([first, second], 1)

    rows, mask = np.concatenate([one.rows, other.rows], 1), np.concatenate([one.mask, other.mask], 1)
    return Padded(rows, mask, together(one.labels, other.labels), together(one.turns, other.turns))


def group_by_size(sizes: IntArray, rows: int) -> list[IntArray]:
    """Returns sites in groups of similar size, so that padding a group to its largest site wastes little.

    Each site of a group has at least three quarters of the rows of its largest one, or two rows fewer, and the padded
    group has at most `rows` rows (a single site may have more).

    Args:
        sizes: Rows of each site [sites].
        rows: The most rows of a padded group.

    Returns:
        Positions in `sizes`, largest sites first; every site is in one group.
    """
    order = np.argsort(-sizes, kind="stable")
    falling = sizes[order]
    groups, start = [], 0
    while start < len(order):
        largest = max(1, int(falling[start]))
        similar = np.searchsorted(-falling, -min(0.75 * largest, largest - 2), side="right")
        stop = max(start + 1, min(int(similar), start + rows // largest))
        groups.append(order[start:stop])
        start = stop
    return groups


def _drawn_order(split: Split, sites: IntArray, purpose: str, round_number: int) -> Ragged:
    """Returns the train rows of each site in a drawn order, stratified by class where there are classes."""
    population, seed, rows = split.population, split.seed, split.train_rows(sites)
    drawn = row_draws(seed, purpose, round_number, population.keys(sites), rows.positions, rows.owners)
    if split.half_life:
        order = np.lexsort((_race(drawn, rows, split.half_life), rows.owners))
    elif population.regression:
        order = np.lexsort((drawn, rows.owners))
    else:
        fractions = stratified(population.labels(rows.rows), rows.owners, drawn, seed, purpose, round_number)
        # Site and fraction (to 40 bits) as one number: one sort where two keys would take two. Equal fractions of two
        # classes stay in the site's own order.
        within = np.minimum(fractions * 2.0**40, 2.0**40 - 1).astype(np.int64)
        order = np.argsort((rows.owners << 40) + within, kind="stable")
    return Ragged(rows.rows[order], rows.offsets)


def _race(drawn: Keys, rows: Ragged, half_life: float) -> NDArray[np.float64]:
    """Returns keys [rows] whose order draws a site's rows one by one, the newest with the largest chance.

    A row of weight w = 2^(-age / half_life) arrives after an exponential time of rate w (Efraimidis and Spirakis 2006);
    the key is the logarithm of that time. Classes are not drawn in proportion: what is old must not count.
    """
    ages = np.repeat(rows.sizes, rows.sizes) - 1 - rows.positions
    chance = np.clip((drawn.astype(np.float64) + 0.5) / 2.0**64, 1e-300, 1 - 2.0**-53)
    keys: NDArray[np.float64] = np.log(-np.log(chance)) + ages * (np.log(2.0) / half_life)
    return keys


def _pad(rows: IntArray, starts: IntArray, counts: IntArray) -> Padded:
    """Returns stretches of `rows` as a padded table of at least one column."""
    columns = np.arange(max(1, int(counts.max(initial=0))))
    mask = columns < counts[:, None]
    return Padded(rows[np.where(mask, starts[:, None] + columns, 0)] if len(rows) else mask.astype(np.int64), mask)
