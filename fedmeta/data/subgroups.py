"""Subgroups of rows by a column: a category's names, or bands of a number; the same at all sites.

A site shows a subgroup only from `evaluation.smallest_subgroup` rows on. Where the rows of a column that stay hidden
are fewer than that together, its smallest shown subgroup is hidden too: else they would be the difference between the
site's figures and those of the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedmeta.data.columns import Categories, feature_names
from fedmeta.data.population import ArrayPopulation
from fedmeta.errors import FedmetaError, nearest
from fedmeta.experiment import Experiment

OTHER = "other"
"""The subgroup of rows whose name the run does not know."""

HIDDEN = -1
"""The code of a row whose cell is missing: it is in no subgroup of that column."""


@dataclass(frozen=True)
class Subgrouping:
    """A column that rows are grouped by.

    Attributes:
        column: Its name.
        edges: Where a number's next band begins, rising; empty for a category.
    """

    column: str
    edges: tuple[float, ...] = ()

    def levels(self, categories: Categories) -> tuple[str, ...]:
        """Returns the names of the subgroups: "sex=F", "age<40", "40<=age<65", "age>=65"."""
        if not self.edges:
            return tuple(f"{self.column}={name}" for name in (*dict(categories).get(self.column, ()), OTHER))
        ends = [f"{edge:g}" for edge in self.edges]
        inner = [f"{low}<={self.column}<{high}" for low, high in pairwise(ends)]
        return (f"{self.column}<{ends[0]}", *inner, f"{self.column}>={ends[-1]}")


def parse(texts: Sequence[str]) -> tuple[Subgrouping, ...]:
    """Returns the groupings that `evaluation.subgroups` names, such as "sex" and "age: 40, 65".

    Raises:
        FedmetaError: A text is no such grouping, or names a column twice.
    """
    found: list[Subgrouping] = []
    for text in texts:
        column, _, bands = text.rpartition(":") if re.search(r":[\s\d.,+-]*$", text) else (text, "", "")
        column = column.strip()
        try:
            edges = tuple(float(edge) for edge in bands.split(",")) if bands.strip() else ()
        except ValueError:
            edges = (np.nan,)
        if not column or not np.isfinite(edges).all() or list(edges) != sorted(set(edges)):
            raise FedmetaError(
                f'[evaluation] subgroups: "{text}": give a column of categories, or a column and rising numbers at '
                'which its bands begin, "age: 40, 65"'
            )
        if column in [each.column for each in found]:
            raise FedmetaError(f'[evaluation] subgroups: "{column}" is there twice')
        found.append(Subgrouping(column, edges))
    return tuple(found)


def check(experiment: Experiment, features: Sequence[str], categories: Categories) -> None:
    """Checks that a run has the columns that its test rows are grouped by; raises `FedmetaError` where not.

    Args:
        experiment: The run's description.
        features: The names of its columns.
        categories: Those of categories, and the names that the run knows.
    """
    groupings = parse(experiment.evaluation.subgroups)
    if groupings and (experiment.data.ways or experiment.privacy.secure_aggregation or not experiment.on_rows):
        why = (
            "privacy.secure_aggregation shows sums over sites alone"
            if experiment.privacy.secure_aggregation
            else "the data have no columns of rows"
            if not experiment.on_rows
            else "few-shot tasks (data.ways) draw rows more than once"
        )
        raise FedmetaError(f"[evaluation] subgroups: leave it out, for {why}")
    known = {name for name, _ in categories}
    for each in groupings:
        if each.column not in features:
            raise FedmetaError(
                f'[evaluation] subgroups: "{each.column}" is no feature of the run{nearest(each.column, features)}'
            )
        if (each.column in known) == bool(each.edges):
            advice = f'name it alone, "{each.column}"' if each.edges else f'give bands, "{each.column}: 40, 65"'
            kind = "holds categories" if each.edges else "holds numbers"
            raise FedmetaError(f'[evaluation] subgroups: "{each.column}" {kind}: {advice}')


def all_levels(groupings: Sequence[Subgrouping], categories: Categories) -> tuple[str, ...]:
    """Returns the names of all subgroups of all groupings, in order."""
    return tuple(level for each in groupings for level in each.levels(categories))


def names_of_run(experiment: Experiment, categories: Categories) -> tuple[str, ...]:
    """Returns the names of the subgroups that a run's sites are asked for at its end."""
    return all_levels(parse(experiment.evaluation.subgroups), categories)


def codes_of(
    population: ArrayPopulation, rows: NDArray[np.int64], grouping: Subgrouping, categories: Categories
) -> NDArray[np.int64]:
    """Returns the place of each row's subgroup among its grouping's levels [rows]; `HIDDEN` where a cell is missing.

    Args:
        population: The rows, with the features that the run has (`fedmeta.data.columns.encoded`), in their own units.
        rows: Which rows.
        grouping: What they are grouped by.
        categories: The names that the run knows.
    """
    places = {name: place for place, name in enumerate(population.feature_names)}
    if grouping.edges:
        values = population.x[rows, places[grouping.column]].astype(np.float64)
        return np.where(np.isnan(values), HIDDEN, np.searchsorted(grouping.edges, values, side="right"))
    names = dict(categories)[grouping.column]
    own = [places[feature] for feature in feature_names((grouping.column,), ((grouping.column, names),))]
    if not own:
        return np.zeros(len(rows), dtype=np.int64)  # the run knows no name: all are other
    cells = population.x[rows][:, own].astype(np.float64)
    found = np.where((cells == 1).any(1), cells.argmax(1), len(names))
    return np.where(np.isnan(cells).any(1), HIDDEN, found)


def shown(counts: NDArray[np.int64], smallest: int) -> NDArray[np.bool_]:
    """Returns which subgroups of one grouping a site shows [levels].

    Args:
        counts: Rows in each [levels].
        smallest: The fewest rows that are shown (rows).
    """
    found = counts >= smallest
    hidden = int(counts[~found].sum())
    if 0 < hidden < smallest and found.any():
        places = np.flatnonzero(found)
        found[places[counts[places].argmin()]] = False
    return found
